"""Sharpness-aware minimisation as an ordinary Optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.arguments import check_flag
from fsam_optax._common.checks import (
    check_dtype,
    check_every,
    check_leaves,
    check_like,
    check_no_module,
    check_params,
    check_state,
    check_transformation,
    is_real,
    leaf_shape,
)
from fsam_optax._common.mapped_axes import (
    AxisName,
    check_axes,
    merge,
    replica_index,
)
from fsam_optax._step.advice import check_no_ball, explaining
from fsam_optax._step.second_gradient import gradient_function
from fsam_optax._step.step import (
    first_memory,
    first_metrics,
    Memory,
    on_schedule,
    perturbed_step,
    plain_step,
    Rule,
)


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`.

    Attributes:
        step: Updates made so far; saturates.  # shape=(), dtype=int32
        perturbation: State of the perturbation.
        descent: State of the descent; empty without one.
        metrics: Metrics of the last perturbed step; None if not asked for.
        base: State of the base optimizer.
    """

    step: jax.Array
    perturbation: optax.OptState
    descent: optax.OptState
    metrics: Any
    base: optax.OptState


def sharpness_aware(
    base: optax.GradientTransformation,
    perturbation: optax.GradientTransformation,
    *,
    descent: optax.GradientTransformation | None = None,
    every: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 1,
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
        base: The optimizer that makes the step. It receives every extra argument but
            `grad_fn`. What it freezes is perturbed all the same: leave that out with
            the perturbation's `mask` too (the metric `leaf_perturbation_norms` shows
            where eps lies).
        perturbation: Maps a gradient to eps, uphill (an optimizer here is an error if
            its state tells it, as Adam's does; plain `optax.sgd` is not seen), such as
            `euclidean_ball`, `adaptive_ellipsoid` or `fisher_ellipsoid`. Masks belong
            there: inside
            `optax.masked` or `optax.partition` no `grad_fn` can see all parameters.
            It receives every extra argument, `grad_fn` included.
        descent: Makes the direction of the step from both gradients, such as
            `surrogate_gap`, `extrapolate` or `reuse`. None is SAM: the second one.
        every: Perturb only each `every`-th step, from the first on, or the steps for
            which a function of the step, counted from 0, returns True. The others are
            those of `base` and cost the one gradient that was passed in.
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
        takes `grad_fn(params) -> grads`, or in its place the loss, `value_fn` or
        `obj_fn(params) -> loss`, which then reaches `base` as well. Read the metrics
        in its state with `optax.tree.get(state, "gradient_cosine")`, and likewise for
        every field of `Metrics`, and `rho`, `dual_norm` and `skipped` of the
        perturbation.

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
    if descent is not None:
        check_transformation("descent", descent, "surrogate_gap(0.4)")
        descent = optax.with_extra_args_support(descent)
    check_every(every)
    check_dtype("perturb_dtype", perturb_dtype)
    check_flag("metrics", metrics, "It turns measuring on or off.")
    base = optax.with_extra_args_support(base)
    ascend = optax.with_extra_args_support(perturbation)
    rule = Rule(ascend, descent, every, perturb_dtype, axis_name, metrics)

    def init_fn(params):
        base_state = base.init(params)
        check_no_ball(
            "base",
            base_state,
            "The arguments are `sharpness_aware(base, perturbation)`: the optimizer "
            "comes first.",
        )
        return SharpnessAwareState(
            step=jnp.zeros([], jnp.int32),
            **first_memory(rule, params)._asdict(),
            metrics=first_metrics(rule, params),
            base=base_state,
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        grad_fn=None,
        value_fn=None,
        obj_fn=None,
        **extra_args,
    ):
        check_params("sharpness_aware", params)
        check_no_module("sharpness_aware", params, "value_and_grad")
        _check_whole(params)
        check_leaves(params, "params")
        check_like("grads", updates, "params", params)
        check_state("optimizer", state, SharpnessAwareState, init_fn, params)
        check_axes("axis_name", axis_name)
        gradient = gradient_function("sharpness_aware", grad_fn, value_fn, obj_fn)
        passed_on = {"value_fn": value_fn, "obj_fn": obj_fn}
        passed_on = {k: v for k, v in passed_on.items() if v is not None} | extra_args
        extra = {"grad_fn": gradient, **replica_index(axis_name), **extra_args}
        memory = Memory(state.perturbation, state.descent)

        def checked_gradient(point):
            with explaining("grad_fn", point):
                grads = gradient(point)
            _check_gradient(grads, params)
            return None, grads

        def merged(stride):
            weight = jnp.where(stride.found, jnp.ones([], jnp.float32), 0)
            return (
                *merge((stride.direction, stride.metrics), axis_name),
                merge(stride.memory, axis_name, weight, memory),
            )

        grads, metrics, memory = on_schedule(
            every,
            state.step,
            lambda: merged(
                perturbed_step(rule, memory, params, updates, checked_gradient, extra)
            ),
            lambda: merged(
                plain_step(rule, memory, params, updates, extra, state.metrics)
            ),
        )
        updates, base_state = base.update(grads, state.base, params, **passed_on)
        return updates, SharpnessAwareState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            **memory._asdict(),
            metrics=metrics,
            base=base_state,
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
    if leaf_shape(grads) == ():
        raise TypeError(
            "`grad_fn` returned one number, as a loss does: pass its gradient, "
            "`grad_fn=lambda p: jax.grad(loss)(p, batch)`, or the loss itself as "
            "`value_fn=lambda p: loss(p, batch)`."
        )
    raise TypeError(f"`grad_fn` must return the gradient. {error}") from error
