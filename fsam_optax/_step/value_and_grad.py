"""Sharpness-aware minimisation as a drop-in for `jax.value_and_grad`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_count,
    check_dtype,
    check_leaves,
    check_params,
    check_transformation,
    is_real,
    leaf_shape,
)
from fsam_optax._common.mapped_axes import (
    AxisName,
    merge,
    merge_next,
    replica_index,
    vary,
    vary_like,
)
from fsam_optax._common.norms import widen
from fsam_optax._fisher.negative_log_likelihood import (
    NegativeLogLikelihood,
    SquaredScores,
    takes_scores,
    value_grad_and_scores,
)
from fsam_optax._step.ascent import (
    always,
    cast_like,
    displace,
    every_kth,
    measure,
    Metrics,
    no_metrics,
    took_part,
)


class ValueAndGradState(NamedTuple):
    """State of `value_and_grad`.

    Attributes:
        step: Calls made so far; saturates.  # shape=(), dtype=int32
        perturbation: State of the perturbation.
        metrics: Metrics of the last perturbed step; None if not asked for.
        sharpness: Loss at w + eps minus loss at w, at the last perturbed step.
            # shape=(), dtype=float32
    """

    step: jax.Array
    perturbation: optax.OptState
    metrics: Metrics | None
    sharpness: jax.Array


@dataclasses.dataclass(frozen=True)
class ValueAndGrad:
    """A gradient oracle: call it as `f(params, state, batch, *args, **kwargs)`.

    Attributes:
        init: `init(params) -> state`.
        apply: What calling the oracle does.
    """

    init: Callable[[optax.Params], ValueAndGradState]
    apply: Callable[..., tuple[Any, optax.Updates, ValueAndGradState]]

    def __call__(
        self,
        params: optax.Params,
        state: ValueAndGradState,
        batch: Any,
        *args,
        **kwargs,
    ) -> tuple[Any, optax.Updates, ValueAndGradState]:
        """Returns `(value, grads, state)`, or `((value, aux), grads, state)`."""
        return self.apply(params, state, batch, *args, **kwargs)


def value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    micro_batches: int | None = None,
    every: jax.typing.ArrayLike = 1,
    perturb_dtype: jax.typing.DTypeLike | None = None,
    axis_name: AxisName = None,
    fused: bool = True,
    metrics: bool = True,
) -> ValueAndGrad:
    """Returns the loss at w and its gradient at the perturbed parameters w + eps.

        value = loss(w)
        grads = grad loss(w + eps)         eps = perturbation(grad loss(w))

    With several micro-batches, each has an eps of its own and the gradients are
    averaged (m-sharpness, m the size of a micro-batch), however many devices there
    are. The gradients then go to any optimizer, wrapper or train state: clipping,
    weight decay, `optax.MultiSteps` and `optax.apply_if_finite` act on them.

    Args:
        loss_fn: `loss_fn(params, batch, *args, **kwargs)` returns a scalar, a mean
            over the batch, or `(scalar, aux)`.
        perturbation: Maps a gradient to eps. It receives `batch` and the entries of
            `extra_args` as extra arguments.
        has_aux: Whether `loss_fn` returns `(scalar, aux)`.
        micro_batches: Number of equal parts into which the leading axis of every leaf
            of `batch` is cut. They are worked through one after the other, so memory
            falls with their number. `aux` gains a leading axis of this size.
        every: Perturb only each `every`-th step, from the first on. The steps between
            return the plain gradient and cost only that.
        perturb_dtype: Dtype in which the second pass sees w + eps. None keeps the
            dtype of the parameters; see `sharpness_aware`.
        axis_name: Mapped axes of `jax.shard_map` or `jax.pmap`: each device perturbs
            for the batch it holds, then value and gradient are averaged (m-sharpness
            over devices). `aux` is left as each device has it. For one eps over all
            devices, use `jax.jit` on a sharded batch instead.
        fused: Take gradient and empirical Fisher from one pass, if `loss_fn` is
            `negative_log_likelihood(apply_fn, likelihood)`, the perturbation contains
            `fisher_empirical` of the same two, and `every` is 1. The result is the
            same up to rounding; anything else costs a pass of its own.
        metrics: Whether to measure each perturbed step; see `sharpness_aware`. The
            rise of the loss, `sharpness`, costs nothing and is always there.

    Returns:
        An oracle `f`. `f.init(params)` makes its state, and
        `f(params, state, batch, *args, **kwargs)` returns `(value, grads, state)`,
        or `((value, aux), grads, state)`. `*args` and `**kwargs` go to both passes, so
        that dropout draws the same mask in both. Value and `aux` come from the clean
        pass: BatchNorm statistics are updated once, with unperturbed weights. The
        keyword `extra_args`, a dict, is kept for the perturbation. Read metrics with
        `optax.tree.get(state, "sharpness")`; names as in `sharpness_aware`.

    Raises:
        ValueError: If every or micro_batches < 1; in a call, if a leaf of the batch
            cannot be cut into `micro_batches` parts.
        TypeError: If `perturbation` is no transformation, or perturb_dtype no
            floating-point dtype; in a call, if `loss_fn`
            does not return what `has_aux` says.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> def loss_fn(w, batch):
        ...     return jnp.mean((batch @ w) ** 4)
        >>> f = value_and_grad(loss_fn, euclidean_ball(0.5))
        >>> w = jnp.array([1.0, 0.0])
        >>> state = f.init(w)
        >>> value, grads, state = f(w, state, jnp.eye(2))
        >>> print(value, grads, optax.tree.get(state, "sharpness"))
        0.5 [6.75 0.  ] 2.03125

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (algorithm 1;
        m-sharpness: section 4.1).
    """
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function, got {loss_fn!r}.")
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    check_count("every", every)
    check_dtype("perturb_dtype", perturb_dtype)
    if micro_batches is not None:
        check_count("micro_batches", micro_batches)
    ascend = optax.with_extra_args_support(perturbation)

    def init_fn(params):
        return ValueAndGradState(
            step=jnp.zeros([], jnp.int32),
            perturbation=ascend.init(params),
            metrics=no_metrics() if metrics else None,
            sharpness=jnp.zeros([], jnp.float32),
        )

    def apply_fn(
        params,
        state,
        batch,
        *args,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        check_params("value_and_grad", params)
        check_leaves(params, "params", real=True)

        def checked_loss(params, batch):
            return loss_and_aux(loss_fn(params, batch, *args, **kwargs), has_aux)

        gradient = jax.value_and_grad(checked_loss, has_aux=True)
        alone = always(every) and not (args or kwargs or has_aux)
        likelihood_loss = None
        if isinstance(loss_fn, NegativeLogLikelihood) and fused and alone:
            likelihood_loss = loss_fn

        def sam_gradient(batch, index=None):
            replica = replica_index(axis_name, index, micro_batches)

            def perturbation_of(grads, **scores):
                extra = {"batch": batch, **replica, **scores, **(extra_args or {})}
                return ascend.update(grads, state.perturbation, params, **extra)

            local_params = vary(params, axis_name)
            if likelihood_loss and takes_scores(
                likelihood_loss, perturbation_of, params
            ):
                aux = None
                value, grads, squares = value_grad_and_scores(
                    likelihood_loss, local_params, batch
                )
                scores = {"squared_scores": SquaredScores(likelihood_loss, squares)}
            else:
                (value, aux), grads = gradient(local_params, batch)
                scores = {}

            def perturbed():
                eps, perturbation_state = perturbation_of(grads, **scores)
                point = vary(displace(params, eps, perturb_dtype), axis_name)
                (perturbed_value, _), perturbed_grads = gradient(point, batch)
                perturbed_grads = cast_like(perturbed_grads, grads)
                wide = widen(value, perturbed_value)
                rise = perturbed_value.astype(wide) - value.astype(wide)
                return (
                    perturbed_grads,
                    perturbation_state,
                    measure(grads, perturbed_grads, params, point) if metrics else None,
                    jnp.asarray(rise, jnp.float32),
                )

            def plain():
                return grads, state.perturbation, state.metrics, state.sharpness

            # Both branches must agree on what may differ between the devices.
            perturbed, plain = (
                lambda branch=branch: vary(branch(), axis_name)
                for branch in (perturbed, plain)
            )
            grads, perturbation_state, step_metrics, sharpness = every_kth(
                every, state.step, perturbed, plain
            )
            found = took_part(state.perturbation, perturbation_state)
            measured = grads, step_metrics, sharpness
            return measured, (perturbation_state, found), (value, aux)

        if micro_batches is None:
            measured, (perturbation_state, found), (value, aux) = sam_gradient(batch)
        else:
            # Overwritten by the first micro-batch, but of the right types.
            zeros = vary_like(jax.tree.map(jnp.zeros_like, params), params)
            start = (zeros, state.metrics, state.sharpness), state.perturbation

            def body(merged, indexed_batch):
                (measured, perturbation_state), before = merged
                index, micro_batch = indexed_batch
                new, (new_state, found), value_and_aux = sam_gradient(
                    micro_batch, index
                )
                merged = (
                    merge_next(measured, new, index, index),
                    merge_next(perturbation_state, new_state, index, before, found),
                )
                return (merged, before + found), value_and_aux

            (merged, number_found), (value, aux) = jax.lax.scan(
                body,
                vary((jax.tree.map(_widened, start), jnp.zeros([], int)), axis_name),
                (jnp.arange(micro_batches), _cut(batch, micro_batches)),
            )
            measured, perturbation_state = jax.tree.map(_narrowed, merged, start)
            value, found = jnp.mean(value), number_found > 0
        value, (grads, step_metrics, sharpness) = merge((value, measured), axis_name)
        perturbation_state = merge(perturbation_state, axis_name, found)
        state = ValueAndGradState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            perturbation=perturbation_state,
            metrics=step_metrics,
            sharpness=sharpness,
        )
        return ((value, aux) if has_aux else value), grads, state

    return ValueAndGrad(init_fn, apply_fn)


def loss_and_aux(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """Returns (loss, aux), or raises TypeError if `loss_fn` returned anything else."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "With `has_aux=True`, `loss_fn` must return `(loss, aux)`, got "
            f"{type(result).__name__}."
        )
    loss, aux = result if has_aux else (result, None)
    if leaf_shape(loss) != ():
        hint = (
            "Pass `has_aux=True` if it returns `(loss, aux)`."
            if isinstance(loss, tuple)
            else "Take the mean over the batch."
        )
        raise TypeError(
            "`loss_fn` must return a scalar loss, got "
            f"{getattr(loss, 'shape', type(loss).__name__)}. {hint}"
        )
    return jnp.asarray(loss), aux


def _widened(x: jax.Array) -> jax.Array:
    """Returns floating-point leaves as what means are accumulated in."""
    return x.astype(widen(x)) if is_real(x) else x


def _narrowed(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns what was accumulated in the dtype it has at the end."""
    return x.astype(like.dtype) if is_real(like) else x


def _cut(batch: Any, parts: int) -> Any:
    """Reshapes the leading axis of every leaf from (n,) to (parts, n / parts)."""

    def cut(path, x):
        if not jnp.ndim(x) or len(x) % parts:
            raise ValueError(
                f"`batch` leaf {jax.tree_util.keystr(path) or 'at the root'} of shape "
                f"{jnp.shape(x)} cannot be cut into `micro_batches={parts}` equal "
                "parts along its leading axis."
            )
        return jnp.reshape(x, (parts, len(x) // parts, *jnp.shape(x)[1:]))

    return jax.tree_util.tree_map_with_path(cut, batch)
