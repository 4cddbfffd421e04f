"""The gradient oracle, the loss and the estimators for Flax NNX modules.

Import it as `from fsam_optax import nnx as fsam_nnx`. It needs `flax`, which importing
`fsam_optax` alone does not. Perturbations and optimizers are those of `fsam_optax`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from fsam_optax._common.mapped_axes import AxisName, merge, merge_stacked
from fsam_optax._nnx import modules
from fsam_optax._step import value_and_grad as _plain
from fsam_optax._step.value_and_grad import ValueAndGrad, ValueAndGradState


__all__ = ["value_and_grad"]


def value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    wrt: Any = nnx.Param,
    descent: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    micro_batches: int | None = None,
    merge_aux: Callable[[Any], Any] | None = None,
    every: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 1,
    empirical_fisher: bool = False,
    functional: bool = False,
    perturb_dtype: jax.typing.DTypeLike | None = None,
    axis_name: AxisName = None,
    metrics: bool = True,
) -> ValueAndGrad:
    """Returns the loss of a module at w and its gradient at w + eps.

    Does for `flax.nnx.value_and_grad` what `fsam_optax.value_and_grad` does for
    `jax.value_and_grad`. The module, and every other graph node among the arguments of
    the loss (`nnx.Rngs`, further modules, metrics), starts both passes from the same
    state, so that dropout draws the same mask in both; afterwards it holds what the
    clean pass left: BatchNorm statistics, counts of random streams and metrics advance
    once, with unperturbed weights.

    Args:
        loss_fn: `loss_fn(model, batch, *args, **kwargs)` returns a scalar, a mean over
            the batch, or `(scalar, aux)`.
        perturbation: Maps a gradient to eps.
        wrt: Filter for the variables of the model to differentiate, perturb and train.
        descent: See `fsam_optax.value_and_grad`.
        has_aux: Whether `loss_fn` returns `(scalar, aux)`.
        micro_batches: See `fsam_optax.value_and_grad`. Every micro-batch starts from
            the same state, but for PRNG keys, into which its number is folded.
            Afterwards floating-point variables are averaged over the micro-batches,
            and keys are what they were before: only their counts advance.
        merge_aux: See `fsam_optax.value_and_grad`.
        every: See `fsam_optax.value_and_grad`.
        empirical_fisher: See `fsam_optax.value_and_grad`.
        functional: See `fsam_optax.value_and_grad`.
        perturb_dtype: See `fsam_optax.value_and_grad`.
        axis_name: See `fsam_optax.value_and_grad`. What the clean pass left is averaged
            over devices, as over micro-batches.
        metrics: See `fsam_optax.value_and_grad`.

    Returns:
        An oracle `f`. `f.init(model)` makes its state, and
        `f(model, state, batch, *args, **kwargs)` updates the graph nodes among its
        arguments in place, the parameters excepted, and returns
        `(value, grads, state)`, or `((value, aux), grads, state)`. `grads` is the
        `nnx.State` that `nnx.Optimizer.update(model, grads)` takes.

    Raises:
        TypeError: In a call, if model is no NNX module, or if `loss_fn` does not return
            what `has_aux` says.
        ValueError: In a call, if `wrt` selects no variable; and as
            `fsam_optax.value_and_grad`.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> from fsam_optax import nnx as fsam_nnx
        >>> model, rngs = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        >>> dropout = nnx.Dropout(0.5)
        >>> def loss_fn(model, batch, rngs):
        ...     return jnp.mean(dropout(model(batch), rngs=rngs) ** 2)
        >>> f = fsam_nnx.value_and_grad(loss_fn, euclidean_ball(0.05))
        >>> state = f.init(model)
        >>> value, grads, state = f(model, state, jnp.ones((4, 2)), rngs)
        >>> _ = optimizer.update(model, grads)
        >>> print(optax.tree.get(state, "perturbation_norm"), rngs.dropout.count[...])
        0.05 1
    """
    _plain.check_merge_aux(merge_aux, micro_batches, has_aux)
    pure = modules.PureLoss(loss_fn, has_aux)
    oracle = _plain.value_and_grad(
        pure,
        perturbation,
        descent=descent,
        has_aux=True,
        micro_batches=micro_batches,
        merge_aux=_merge_parts(merge_aux, micro_batches),
        every=every,
        empirical_fisher=empirical_fisher,
        functional=functional,
        perturb_dtype=perturb_dtype,
        axis_name=axis_name,
        metrics=metrics,
    )

    def init_fn(model: Any) -> ValueAndGradState:
        return oracle.init(modules.params_of(model, wrt))

    def apply_fn(model, state, batch, *args, extra_args=None, **kwargs):
        if isinstance(model, ValueAndGradState):
            raise TypeError(
                "`model` is a state of `value_and_grad`: call `f(model, state, batch)`."
            )
        if modules.has_nodes(batch):
            raise TypeError(
                "`batch` must hold arrays alone, but there is a graph node in it: pass "
                "it as a further argument, `f(model, state, batch, node)`."
            )
        call = modules.split(model, args, kwargs, wrt)
        (value, (aux, changes)), grads, state = oracle(
            call.params, state, batch, *call.args, extra_args=extra_args, **call.kwargs
        )
        modules.write(call, merge(changes, axis_name))
        return ((value, aux) if has_aux else value), grads, state

    def explain_fn(model, batch, *args, extra_args=None, **kwargs):
        call = modules.split(model, args, kwargs, wrt)
        return oracle.explain(
            call.params, batch, *call.args, extra_args=extra_args, **call.kwargs
        )

    return ValueAndGrad(init_fn, apply_fn, explain_fn)


def _merge_parts(merge_aux, micro_batches):
    """Returns what merges aux and changes of micro-batches; None if there is one."""
    if micro_batches is None:
        return None

    def merged(stacked):
        aux, changes = stacked
        return (merge_aux(aux) if merge_aux else aux), merge_stacked(changes)

    return merged
