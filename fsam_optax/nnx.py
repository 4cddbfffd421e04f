"""The gradient oracle for Flax NNX: `from fsam_optax import nnx as fsam_nnx`.

Needs `flax`, which importing `fsam_optax` alone does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from fsam_optax._common.mapped_axes import AxisName, merge, merge_stacked
from fsam_optax._step import value_and_grad as _value_and_grad
from fsam_optax._step.passes import loss_and_aux
from fsam_optax._step.value_and_grad import ValueAndGrad


def value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    micro_batches: int | None = None,
    every: jax.typing.ArrayLike = 1,
    perturb_dtype: jax.typing.DTypeLike | None = None,
    axis_name: AxisName = None,
    metrics: bool = True,
) -> ValueAndGrad:
    """Returns the loss of a module at w and its gradient at w + eps.

    Does for `flax.nnx.value_and_grad` what `fsam_optax.value_and_grad` does for
    `jax.value_and_grad`. The model is split into the variables of `wrt` and the rest.
    Both passes start from the same rest, so that dropout draws the same mask in both;
    afterwards the model holds the rest that the clean pass left: BatchNorm statistics
    and counts of random streams advance once, with unperturbed weights.

    Args:
        loss_fn: `loss_fn(model, batch, *args, **kwargs)` returns a scalar, a mean over
            the batch, or `(scalar, aux)`.
        perturbation: Maps a gradient to eps.
        has_aux: Whether `loss_fn` returns `(scalar, aux)`.
        wrt: Filter for the variables to differentiate, perturb and train.
        micro_batches: See `fsam_optax.value_and_grad`. Every micro-batch starts from
            the same rest; afterwards floating-point entries are averaged over them.
        every: See `fsam_optax.value_and_grad`.
        perturb_dtype: See `fsam_optax.value_and_grad`.
        axis_name: See `fsam_optax.value_and_grad`. The rest is averaged over devices.
        metrics: See `fsam_optax.value_and_grad`.

    Returns:
        An oracle `f`. `f.init(model)` makes its state, and
        `f(model, state, batch, *args, **kwargs)` updates the rest of the model in
        place and returns `(value, grads, state)`, or `((value, aux), grads, state)`.
        `grads` is the `nnx.State` that `nnx.Optimizer.update(model, grads)` takes.

    Raises:
        TypeError: In a call, if `loss_fn` does not return what `has_aux` says.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        >>> def loss_fn(model, batch):
        ...     return jnp.mean(model(batch) ** 2)
        >>> f = value_and_grad(loss_fn, euclidean_ball(0.05))
        >>> state = f.init(model)
        >>> value, grads, state = f(model, state, jnp.ones((4, 2)))
        >>> _ = optimizer.update(model, grads)
        >>> print(optax.tree.get(state, "perturbation_norm"))
        0.05
    """
    options = {
        "has_aux": True,
        "micro_batches": micro_batches,
        "every": every,
        "perturb_dtype": perturb_dtype,
        "axis_name": axis_name,
        "metrics": metrics,
    }
    checked = _value_and_grad.value_and_grad(loss_fn, perturbation, **options)

    def init_fn(model):
        return checked.init(nnx.state(model, wrt))

    def apply_fn(model, state, batch, *args, extra_args=None, **kwargs):
        graphdef, params, rest = nnx.split(model, wrt, ...)

        def pure_loss(params, batch, *args, **kwargs):
            copy = nnx.merge(graphdef, params, rest, copy=True)
            result = loss_fn(copy, batch, *args, **kwargs)
            loss, aux = loss_and_aux(result, has_aux)
            return loss, (aux, nnx.split(copy, wrt, ...)[2])

        oracle = _value_and_grad.value_and_grad(pure_loss, perturbation, **options)
        (value, (aux, new_rest)), grads, state = oracle(
            params, state, batch, *args, extra_args=extra_args, **kwargs
        )
        if micro_batches is not None:
            new_rest = merge_stacked(new_rest)
        nnx.update(model, merge(new_rest, axis_name))
        return ((value, aux) if has_aux else value), grads, state

    def explain_fn(model, batch, *args, extra_args=None, **kwargs):
        graphdef, params, rest = nnx.split(model, wrt, ...)

        def pure_loss(params, batch, *args, **kwargs):
            copy = nnx.merge(graphdef, params, rest, copy=True)
            return loss_and_aux(loss_fn(copy, batch, *args, **kwargs), has_aux)

        oracle = _value_and_grad.value_and_grad(pure_loss, perturbation, **options)
        return oracle.explain(params, batch, *args, extra_args=extra_args, **kwargs)

    return ValueAndGrad(init_fn, apply_fn, explain_fn)
