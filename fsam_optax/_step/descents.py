"""Descents: the direction of a step, from the gradients at w and at w + eps.

    update(h, state, params, *, clean_grads, eps, **extra) -> (d, state)

h is the gradient at w + eps and `clean_grads` g, that at w. On a step without
perturbation eps is None, which is known while tracing, and h is g. Every part of a
batch descends by itself; then the directions are averaged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_like, check_number, is_real
from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._common.norms import direction, norm, Reciprocal, widen
from fsam_optax._common.pairs import component


def surrogate_gap(
    alpha: jax.typing.ArrayLike,
    *,
    minimize_clean: bool = False,
    shard_axes: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Descent of GSAM: close the gap between the losses at w + eps and at w.

        d = h - alpha (g - <g, h> h / |h|^2)
        d = g + alpha (h - <h, g> g / |g|^2)      minimize_clean

    The first lowers the loss at w + eps, and *raises* that at w along what is
    orthogonal to it, so that the two meet. alpha = 0 is SAM bit for bit. Where h = 0
    there is nothing to be orthogonal to, and d = -alpha g, as in the authors' code.

    Args:
        alpha: Weight of the orthogonal part, >= 0. The authors take 0.4 to 1 for
            vision transformers and 0.01 for residual networks.
        minimize_clean: Lower the loss at w and add what of h is orthogonal to g: the
            form `minimize_fp=False` of the authors' code. alpha = 0 is then the base
            optimizer.
        shard_axes: Mapped axes of `jax.shard_map` over which parameters are sharded by
            hand, as in `euclidean_ball`.

    Returns:
        A descent, for `descent=` of either front end. It holds no state; a schedule of
        alpha is `optax.inject_hyperparams(surrogate_gap)(alpha=schedule)`.

    Raises:
        ValueError: If alpha is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> descent = surrogate_gap(0.5)
        >>> g, h = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
        >>> state = descent.init(g)
        >>> d, state = descent.update(h, state, clean_grads=g, eps=0.1 * g)
        >>> print(d)  # Along h in full; against what of g is orthogonal to it.
        [ 2.  -0.5]

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training,
        2022, https://arxiv.org/abs/2203.08065 (algorithm 1).
    """
    check_number("alpha", alpha, 0)

    def descend(h, g):
        if minimize_clean:
            c = component(_real(h), _real(g), shard_axes)
            return _map(lambda h, g: g + alpha * (h - c * g), h, g)
        c = component(_real(g), _real(h), shard_axes)
        return _map(lambda h, g: h - alpha * (g - c * h), h, g)

    return _without_memory(descend)


def extrapolate(alpha: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Descent between and beyond the two gradients: WSAM, gradient norm penalty.

        d = g + alpha (h - g)

    alpha = 0 is the base optimizer and 1 is SAM, bit for bit. More than 1 weighs the
    sharpness higher than SAM does: d is the gradient of `L(w) + alpha (L(w + eps) -
    L(w))`. WSAM with weight gamma has alpha = gamma / (1 - gamma); the penalty
    `lambda |g|` with radius rho has alpha = lambda / rho.

    Args:
        alpha: Weight of the sharpness, >= 0.

    Returns:
        A descent, for `descent=` of either front end. It holds no state; a schedule of
        alpha is `optax.inject_hyperparams(extrapolate)(alpha=schedule)`.

    Raises:
        ValueError: If alpha is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> descent = extrapolate(3.0)
        >>> g, h = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
        >>> d, _ = descent.update(h, descent.init(g), clean_grads=g, eps=0.1 * g)
        >>> print(d)
        [ 4. -2.]

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
        Regularization Term, 2023, https://arxiv.org/abs/2305.15817 (the coupled form).
        Zhao, Zhang, Hu, Penalizing Gradient Norm for Efficiently Improving
        Generalization in Deep Learning, 2022, https://arxiv.org/abs/2202.03599.
    """
    check_number("alpha", alpha, 0)

    def descend(h, g):
        # From the nearer end, so that both ends are exact.
        near_clean = jnp.asarray(alpha) < 0.5
        start = jnp.where(near_clean, 0.0, 1.0)

        def leaf(h, g):
            change = h - g
            # At an end, whatever the other gradient is.
            known = jnp.isfinite(change) | (alpha != start)
            change = jnp.where(known, change, 0)
            return jnp.where(near_clean, g, h) + (alpha - start) * change

        return _map(leaf, h, g)

    return _without_memory(descend)


class ReuseState(NamedTuple):
    """State of `reuse`.

    Attributes:
        orthogonal: Unit vector along what of the last perturbed gradient was orthogonal
            to the clean one, like the parameters in float32 or wider; 0 before the
            first. The mean of those of all parts of a batch, which may be shorter.
    """

    orthogonal: Any


def reuse(
    alpha: jax.typing.ArrayLike, *, shard_axes: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Descent of LookSAM: between the perturbed steps, use what the last one found.

        perturbed step:  d = h,    v = h - <h, g> g / |g|^2
        plain step:      d = g + alpha |g| v / |v|

    For `every=k`: a step costs 1 + 1/k gradients in the mean. v holds the direction in
    which the sharpness falls; it changes slower than g does. Where h is g up to
    rounding there is no v, and the plain steps are those of the base optimizer.

    Args:
        alpha: Length of what is added to the clean gradient, relative to it, >= 0; 0.7
            is usual.
        shard_axes: Mapped axes of `jax.shard_map` over which parameters are sharded by
            hand, as in `euclidean_ball`.

    Returns:
        A descent, for `descent=` of either front end, with a state of the size of the
        parameters. A gradient h that is not finite is not remembered.

    Raises:
        ValueError: If alpha is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> descent = reuse(0.5)
        >>> g, h = jnp.array([2.0, 0.0]), jnp.array([2.0, 1.0])
        >>> state = descent.init(g)
        >>> d, state = descent.update(h, state, clean_grads=g, eps=0.1 * g)
        >>> print(d)
        [2. 1.]
        >>> g = jnp.array([4.0, 0.0])  # A step without perturbation:
        >>> d, state = descent.update(g, state, clean_grads=g, eps=None)
        >>> print(d)
        [4. 2.]

    References:
        Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware
        Minimization, 2022, https://arxiv.org/abs/2203.02714 (algorithm 1).
    """
    check_number("alpha", alpha, 0)

    def init_fn(params):
        return ReuseState(jax.tree.map(_zeros_like, params))

    def update_fn(
        updates, state, params=None, *, clean_grads=None, eps=None, **extra_args
    ):
        del params, extra_args
        _check_clean(clean_grads, updates)
        if eps is None:
            v = _real(state.orthogonal)
            length = norm(v, 2, shard_axes)
            factor = alpha * norm(_real(clean_grads), 2, shard_axes)
            unit = Reciprocal.of(length)

            def add(h, v):
                return h + jnp.where(length > 0, factor * direction(v, unit, 1), 0)

            return _map(add, updates, state.orthogonal), state
        c = component(_real(updates), _real(clean_grads), shard_axes)
        v = jax.tree.map(
            lambda h, g: (
                jnp.asarray(h, widen(h, g)) - c * jnp.asarray(g, widen(h, g))
                if is_real(h)
                else jnp.zeros(jnp.shape(h), widen())
            ),
            updates,
            clean_grads,
        )
        length = norm(_real(v), 2, shard_axes)
        unit = Reciprocal.of(length)
        noise = _rounding(_real(updates)) * norm(_real(updates), 2, shard_axes)

        def remember(v, old):
            new = jnp.where(length > noise, direction(v, unit, 1), 0)
            return jnp.where(jnp.isfinite(length), new, old).astype(old.dtype)

        return updates, ReuseState(jax.tree.map(remember, v, state.orthogonal))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_clean(clean_grads: Any, grads: Any) -> None:
    if clean_grads is None:
        raise TypeError(
            "A descent needs both gradients: pass it as `descent=` to `sharpness_aware`"
            " or `value_and_grad`, or call `update(h, state, params, clean_grads=g, "
            "eps=eps)`."
        )
    check_like("clean_grads", clean_grads, "grads", grads)


def _rounding(leaves: list[jax.Array]) -> float:
    """Returns the relative size of what two equal gradients may differ by."""
    if not leaves:
        return 0.0
    stored = max(float(jnp.finfo(x.dtype).eps) for x in leaves)
    return max(stored, 64 * float(jnp.finfo(widen(*leaves)).eps))


def _real(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_real(x)]


def _zeros_like(x: Any) -> jax.Array:
    if is_real(x):
        return jnp.zeros_like(x, widen(x))
    return jnp.zeros(jnp.shape(x), widen())


def _map(rule: Any, h: Any, other: Any) -> Any:
    """Applies a rule to the real leaves, in float32 or wider; the rest is that of h."""

    def leaf(h, other):
        if not is_real(h):
            return h
        h = jnp.asarray(h)
        wide = widen(h, other)
        return rule(h.astype(wide), jnp.asarray(other, wide)).astype(h.dtype)

    return jax.tree.map(leaf, h, other)


def _without_memory(descend: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a descent of a function of h and g; a plain step is that of the base."""

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(
        updates, state, params=None, *, clean_grads=None, eps=None, **extra_args
    ):
        del params, extra_args
        _check_clean(clean_grads, updates)
        d = updates if eps is None else descend(updates, clean_grads)
        return d, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
