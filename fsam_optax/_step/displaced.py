"""The displaced optimizer: what the trainer holds is w + eps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.guard import ascend
from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_transformation,
    is_real,
)
from fsam_optax._common.norms import widen
from fsam_optax._step.advice import check_ascends, check_no_ball


class DisplacedState(NamedTuple):
    """State of `displaced`.

    Attributes:
        displacement: What the trainer holds minus w, in float32 or wider.
        perturbation: State of the perturbation.
        base: State of the base optimizer.
    """

    displacement: Any
    perturbation: optax.OptState
    base: optax.OptState


def displaced(
    base: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation by an ordinary optimizer: one gradient a step.

        the trainer holds w + eps, and passes the gradient h there
        w <- w + base(h at w)          eps <- perturbation(h at w, before the step)

    eps is that of the gradient before, so that a step needs no second one and no
    `grad_fn`: `update(grads, state, params)` is all, as every trainer calls it. The
    first step is not perturbed. Base and perturbation see w: decoupled weight decay
    acts there. What is chained *before* it sees w + eps, and what follows it in a chain
    would move eps: put the learning rate into `base`, and this last.

    Evaluate, average and publish `eval_params(state, params)`, which is w. Checkpoints
    hold both the parameters and the state, and resume exactly. Inside
    `optax.MultiSteps` the accumulated gradient is one at w + eps, and eps changes with
    the step; around `base`, w stays for a while and eps does not.

    The displacement is stored as rounding left it: w is recovered exactly, also from
    narrow dtypes and whatever the radius did meanwhile, in every weight that is not
    small beside its displacement, and up to one rounding of the displacement in the
    others. A gradient that is not finite sets eps to 0 and is not remembered by the
    perturbation; what the base makes of it is its own matter (`optax.apply_if_finite`
    around `base`, or around all of it).

    Args:
        base: The optimizer that makes the step.
        perturbation: Maps a gradient to eps. Momentum SAM is
            `optax.chain(optax.trace(0.9), optax.scale(-1.0), euclidean_ball(rho))`.
            It must do without `grad_fn`: `multi_step` cannot be used.

    Returns:
        A transformation whose `update(grads, state, params)` takes any extra arguments
        and passes them on. `params` may be None where base and perturbation need none;
        rounding then adds up in narrow dtypes.

    Raises:
        TypeError: If base or perturbation is no transformation.
        ValueError: In `update`, if the gradient differs from the parameters in
            structure or shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> optimizer = displaced(optax.sgd(0.1), euclidean_ball(0.5))
        >>> params = jnp.array([1.0])
        >>> state = optimizer.init(params)
        >>> grads = 2 * params
        >>> updates, state = optimizer.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, eval_params(state, params))  # w + eps, w
        [1.3] [0.8]

    References:
        Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without
        Computational Overhead, 2024, https://arxiv.org/abs/2401.12033 (which perturbs
        against the momentum, and in the SGD form of the authors' code decays at
        w + eps).
    """
    check_transformation("base", base, "optax.sgd(0.1)")
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    base = optax.with_extra_args_support(base)
    inner = optax.with_extra_args_support(perturbation)

    def init_fn(params):
        perturbation, base_state = inner.init(params), base.init(params)
        check_ascends(perturbation)
        check_no_ball(
            "base",
            base_state,
            "The arguments are `displaced(base, perturbation)`: the optimizer comes "
            "first.",
        )
        return DisplacedState(no_displacement(params), perturbation, base_state)

    def update_fn(updates, state, params=None, **extra_args):
        grads = updates
        if params is not None:
            check_leaves(params, "params")
            check_like("grads", grads, "params", params)
        w = None if params is None else _minus(params, state.displacement)
        steps, base_state = base.update(grads, state.base, w, **extra_args)
        ascent = ascend(inner, grads, state.perturbation, w, extra_args)
        check_like("the perturbation's output", ascent.eps, "grads", grads)
        if params is None:
            moved = jax.tree.map(_without_params, grads, steps, ascent.eps, state[0])
        else:
            moved = jax.tree.map(_with_params, params, w, steps, ascent.eps, state[0])
        structure = jax.tree.structure(grads)
        pairs = structure.flatten_up_to(moved)
        updates = structure.unflatten([update for update, _ in pairs])
        displacement = structure.unflatten([d for _, d in pairs])
        return updates, DisplacedState(displacement, ascent.state, base_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns w, given the state of a displaced optimizer and w + eps.

    Args:
        state: A state that contains that of `displaced`, however deep inside
            `optax.chain`, `optax.masked`, `optax.partition`, `optax.MultiSteps`,
            `optax.inject_hyperparams` and the like. Several of them may each displace a
            part of the parameters.
        params: What the trainer holds.

    Returns:
        The parameters without their displacement, in the dtypes of `params`.

    Raises:
        ValueError: If there is no displaced state, or its shapes are not those of
            `params`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> optimizer = optax.chain(
        ...     optax.clip(1.0), displaced(optax.sgd(0.0), euclidean_ball(0.5))
        ... )
        >>> params = jnp.array([1.0])
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, eval_params(state, params))
        [1.5] [1.]
    """
    found = [
        node.displacement
        for node in jax.tree.leaves(state, is_leaf=_is_displaced)
        if _is_displaced(node)
    ]
    if not found:
        raise ValueError(
            "`eval_params` found no state of `displaced` in `state`. Pass the state of "
            "the whole optimizer first, then the parameters: `eval_params(state, "
            "params)`."
        )
    for displacement in found:
        params = _minus(params, displacement)
    return params


def no_displacement(params: Any) -> Any:
    """Returns a displacement of 0, in float32 or wider."""

    def zeros(w):
        if is_real(w):
            return jnp.zeros_like(w, widen(w))
        return jnp.zeros(jnp.shape(w), widen())

    return jax.tree.map(zeros, params)


def _is_displaced(node: Any) -> bool:
    return isinstance(node, DisplacedState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _minus(params: Any, displacement: Any) -> Any:
    """Returns the parameters without a displacement, where it is not masked."""

    def leaf(path, d, p):
        if _is_masked(d) or _is_masked(p) or not is_real(p):
            return p
        if jnp.shape(p) != jnp.shape(d):
            where = jax.tree_util.keystr(path) or "at the root"
            raise ValueError(
                f"`params` leaf {where} has shape {jnp.shape(p)}, but its "
                f"displacement has {jnp.shape(d)}."
            )
        p = jnp.asarray(p)
        return (p.astype(d.dtype) - d).astype(p.dtype)

    return jax.tree_util.tree_map_with_path(
        leaf, displacement, params, is_leaf=_is_masked
    )


def _with_params(p, w, step, eps, d):
    """Returns the update of what the trainer holds, and what rounding makes of eps."""
    if not is_real(p):
        return step, d
    p = jnp.asarray(p)
    wide, dtype = d.dtype, p.dtype

    def rounded(x):
        """Rounds to the dtype of p. A cast to it and back might be optimized away."""
        if dtype == wide:
            return x
        info = jnp.finfo(dtype)
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)

    next_w = rounded(jnp.asarray(w, wide) + jnp.asarray(step, wide))
    target = rounded(next_w + jnp.asarray(eps, wide))
    # The trainer adds the update as it is here, not what a compiler would fuse it from.
    update = jax.lax.optimization_barrier(rounded(target - p.astype(wide)))
    held = rounded(p.astype(wide) + update)
    return update.astype(dtype), held - next_w


def _without_params(grad, step, eps, d):
    """Returns the same of parameters that are not known, in the dtype of the step."""
    if not is_real(grad):
        return step, d
    step = jnp.asarray(step)
    wide = widen(step, d)
    update = jnp.asarray(step, wide) + jnp.asarray(eps, wide) - d
    if step.dtype != wide:
        info = jnp.finfo(step.dtype)
        update = jax.lax.reduce_precision(update, info.nexp, info.nmant)
    update = jax.lax.optimization_barrier(update)
    displacement = d + update - jnp.asarray(step, wide)
    return update.astype(step.dtype), displacement.astype(d.dtype)
