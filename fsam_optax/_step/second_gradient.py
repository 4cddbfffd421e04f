"""The gradient as a function of the parameters, of what a caller passes by name."""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from fsam_optax._common.checks import describe, leaf_shape


def gradient_function(
    caller: str, grad_fn: Any, value_fn: Any, obj_fn: Any
) -> Callable[[Any], Any]:
    """Returns the gradient as a function of the parameters, or says how to pass it."""
    if grad_fn is None:
        objective = value_fn if value_fn is not None else obj_fn
        if callable(objective):
            return jax.grad(_scalar_valued(objective))
    if not callable(grad_fn):
        raise TypeError(
            f"`{caller}` needs the gradient as a function of the parameters, on "
            "the same batch: `update(grads, state, params, grad_fn=lambda p: "
            f"jax.grad(loss)(p, batch))`; got `grad_fn`: {describe(grad_fn)}. Where a "
            "trainer passes nothing on, as `TrainState.apply_gradients` of Flax and "
            "`optax.lookahead` do with `grad_fn=`, call `tx.update` yourself, or give "
            "the trainer the base optimizer and take the gradients from "
            "`fsam_optax.value_and_grad(loss, perturbation)`."
        )
    if _requires_more_than_params(grad_fn):
        raise TypeError(
            "`grad_fn` must take the parameters alone, got a function of "
            f"`{inspect.signature(grad_fn)}`. Close over the batch: `grad_fn=lambda p: "
            "jax.grad(loss)(p, batch)`."
        )
    return grad_fn


def _scalar_valued(objective):
    def value(params):
        loss = objective(params)
        if leaf_shape(loss) != ():
            raise TypeError(
                "`value_fn` (or `obj_fn`) must return the loss, one number, got "
                f"{describe(loss)}: take the mean over the batch, and leave out what "
                "is returned beside it."
            )
        return loss

    return value


def _requires_more_than_params(function):
    if not inspect.isfunction(inspect.unwrap(function)):
        return False
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in positional and p.default is p.empty
    ]
    return len(required) > 1
