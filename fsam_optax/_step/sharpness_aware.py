"""Sharpness-aware minimisation as an ordinary Optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_count,
    check_dtype,
    check_leaves,
    check_like,
    check_params,
    check_transformation,
    is_real,
)
from fsam_optax._common.mapped_axes import AxisName, merge, replica_index, vary
from fsam_optax._step.ascent import (
    cast_like,
    displace,
    every_kth,
    measure,
    no_metrics,
    took_part,
)


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`.

    Attributes:
        step: Updates made so far; saturates.  # shape=(), dtype=int32
        perturbation: State of the perturbation.
        base: State of the base optimizer.
        metrics: Metrics of the last perturbed step; None if not asked for.
    """

    step: jax.Array
    perturbation: optax.OptState
    base: optax.OptState
    metrics: Any


def sharpness_aware(
    base: optax.GradientTransformation,
    perturbation: optax.GradientTransformation,
    *,
    every: jax.typing.ArrayLike = 1,
    perturb_dtype: jax.typing.DTypeLike | None = None,
    axis_name: AxisName = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Steps with the gradient taken at a worst-case perturbation of the parameters.

        eps = perturbation(g)              g: the gradient passed to `update`
        update = base(grad_fn(w + eps))    applied at w, which never holds w + eps

    eps is a constant: no derivative is taken through it. A step costs two gradients;
    the second is `grad_fn`'s, which must be the gradient on the same batch, with the
    same dropout key. Whatever is chained *before* this transformation sees only the
    first gradient, which only gives eps its direction: clip, add weight decay, skip
    non-finite gradients and accumulate inside `base`. (`optax.MultiSteps` around this
    transformation needs a `grad_fn` over all the accumulated batches.)

    Args:
        base: The optimizer that makes the step. It receives every extra argument.
        perturbation: Maps a gradient to eps, such as `euclidean_ball`,
            `adaptive_ellipsoid` or `fisher_ellipsoid`. Masks belong there: inside
            `optax.masked` or `optax.partition` no `grad_fn` can see all parameters.
            It receives every extra argument, `grad_fn` included.
        every: Perturb only each `every`-th step, from the first on. The steps between
            are those of `base` and cost the one gradient that was passed in.
        perturb_dtype: Dtype in which `grad_fn` sees w + eps. None keeps the dtype of
            the parameters: w + eps then rounds to w in most bfloat16 weights, since
            bfloat16 resolves 1 part in 256 and eps is often smaller.
        axis_name: Mapped axes of `jax.shard_map` or `jax.pmap` over which the second
            gradient is averaged. If the gradient passed to `update` was averaged too,
            all devices have the same eps: SAM on the whole batch. If not, each has its
            own (m-sharpness): with `check_vma=True`, where `jax.grad` at replicated
            parameters sums over the devices by itself, take the first gradient at
            `jax.lax.pcast(params, axis_name, to="varying")`. `value_and_grad` does that
            for you. Either way all return the same update and state. A Fisher
            estimated from the batch is that of the device: to average it as well, use
            `optax.chain(estimator, optax.stateless(lambda f, _: pmean(f, axis_name)))`.
        metrics: Whether to measure each perturbed step. Without, the first gradient
            need not be kept to the end, and the step is the two gradients and no more.

    Returns:
        A transformation whose `update(grads, state, params, *, grad_fn, **extra)`
        takes `grad_fn(params) -> grads`. Read the metrics in its state with
        `optax.tree.get(state, "gradient_cosine")`, and likewise for every field of
        `Metrics`, and `rho`, `dual_norm` and `skipped` of the perturbation.

    Raises:
        ValueError: If every < 1; in `update`, if `params` is missing, differs from the
            gradient in structure or shape, or holds `optax.MaskedNode`.
        TypeError: If base or perturbation is no transformation, or perturb_dtype no
            floating-point dtype; in `update`, if `grad_fn` is missing or returns
            anything but gradients.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> grad_fn = jax.grad(lambda w: jnp.sum(w**4))
        >>> optimizer = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.5))
        >>> w = jnp.array([1.0])
        >>> state = optimizer.init(w)
        >>> update, state = optimizer.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(update, optax.tree.get(state, "perturbed_grad_norm"))
        [-1.35] 13.5

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (algorithm 1).
    """
    check_transformation("base", base, "optax.sgd(0.1)")
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    check_count("every", every)
    check_dtype("perturb_dtype", perturb_dtype)
    base = optax.with_extra_args_support(base)
    ascend = optax.with_extra_args_support(perturbation)

    def init_fn(params):
        return SharpnessAwareState(
            step=jnp.zeros([], jnp.int32),
            perturbation=ascend.init(params),
            base=base.init(params),
            metrics=no_metrics() if metrics else None,
        )

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        check_params("sharpness_aware", params)
        _check_whole(params)
        check_leaves(params, "params")
        check_like("grads", updates, "params", params)
        if not callable(grad_fn):
            raise TypeError(
                "`sharpness_aware` needs the gradient as a function of the parameters, "
                "on the same batch: `update(grads, state, params, "
                "grad_fn=lambda p: jax.grad(loss)(p, batch))`; got "
                f"`grad_fn={grad_fn!r}`."
            )

        def perturbed():
            eps, perturbation_state = ascend.update(
                updates,
                state.perturbation,
                params,
                **{"grad_fn": grad_fn, **replica_index(axis_name), **extra_args},
            )
            point = vary(displace(params, eps, perturb_dtype), axis_name)
            grads = grad_fn(point)
            _check_gradient(grads, params)
            measured = measure(updates, grads, params, point) if metrics else None
            grads = cast_like(merge(grads, axis_name), updates)
            found = took_part(state.perturbation, perturbation_state)
            perturbation_state = merge(perturbation_state, axis_name, found)
            return grads, (perturbation_state, merge(measured, axis_name))

        def plain():
            return merge(updates, axis_name), (state.perturbation, state.metrics)

        grads, (perturbation_state, measured) = every_kth(
            every, state.step, perturbed, plain
        )
        updates, base_state = base.update(grads, state.base, params, **extra_args)
        return updates, SharpnessAwareState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            perturbation=perturbation_state,
            base=base_state,
            metrics=measured,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_whole(params: Any) -> None:
    """Raises ValueError for parameters of which `optax.masked` has cut out a part."""
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    for path, leaf in leaves:
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                "`params` has a MaskedNode at "
                f"{jax.tree_util.keystr(path)}: inside `optax.masked` or "
                "`optax.partition`, `grad_fn` cannot be given all parameters. Put "
                "`sharpness_aware` outside, the masked optimizer into `base`, and "
                "pass `mask=` to the perturbation."
            )


def _check_gradient(grads: Any, params: Any) -> None:
    """Raises TypeError if `grad_fn` returned something else than a gradient."""

    def mismatch(tree):
        try:
            check_like("grad_fn(params)", tree, "params", params)
        except ValueError as error:
            return error
        return None

    error = mismatch(grads)
    if error is None:
        check_leaves(grads, "grad_fn(params)")
        for (path, g), w in zip(
            jax.tree_util.tree_leaves_with_path(grads),
            jax.tree.leaves(params),
            strict=True,
        ):
            if is_real(w) and not is_real(g):
                raise TypeError(
                    f"leaf {jax.tree_util.keystr(path) or 'at the root'} of "
                    f"`grad_fn(params)` has dtype {jnp.asarray(g).dtype}: it must be "
                    "the gradient of a real parameter."
                )
        return
    if isinstance(grads, tuple) and len(grads) == 2:
        first, second = grads
        if mismatch(second) is None:
            raise TypeError(
                "`grad_fn` returned (value, grads), as `jax.value_and_grad` does. "
                "Return the gradient alone: `grad_fn=lambda p: jax.grad(loss)(p, "
                "batch)`, or use `fsam_optax.value_and_grad` instead of this wrapper."
            )
        if mismatch(first) is None:
            raise TypeError(
                "`grad_fn` returned (grads, aux), as `jax.grad(..., has_aux=True)` "
                "does. Return the gradient alone: `grad_fn=lambda p: jax.grad(loss, "
                "has_aux=True)(p, batch)[0]`."
            )
    raise TypeError(f"`grad_fn` must return the gradient. {error}") from error
