"""The clean pass over a part of the batch, and what it hands on to the second one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import describe, leaf_shape
from fsam_optax._engine import after_point
from fsam_optax._fisher.functional import value_grad_and_pull
from fsam_optax._fisher.negative_log_likelihood import (
    NegativeLogLikelihood,
    total_weight,
)
from fsam_optax._fisher.one_pass import value_grad_and_fisher
from fsam_optax._step.advice import explaining
from fsam_optax._step.parts import Data


class CleanPass(NamedTuple):
    """What is known after the pass at w.

    Attributes:
        value: The loss.  # shape=()
        aux: What it returned beside; None if nothing.
        grads: Its gradient.
        extra: What the perturbation is given by name.
        gradient: `gradient(point) -> (loss, gradient)` at w + eps.
    """

    value: jax.Array
    aux: Any
    grads: Any
    extra: dict[str, Any]
    gradient: Callable[[Any], tuple[jax.Array, Any]]

    def grad_fn(self, point: Any) -> Any:
        """Returns the gradient alone."""
        return self.gradient(point)[1]


def clean_pass(loss_fn: Any, has_aux: bool, params: Any, data: Data) -> CleanPass:
    """Takes the gradient at w, and the second one like it at w + eps."""
    (value, aux), grads = _differentiated(loss_fn, has_aux, data)(params)
    return CleanPass(value, aux, grads, {}, _gradient(loss_fn, has_aux, data))


def clean_pass_with_fisher(
    loss_fn: Any, has_aux: bool, params: Any, data: Data
) -> CleanPass:
    """Takes gradient and exact empirical Fisher from one pass at w."""
    (value, aux), grads, fisher = value_grad_and_fisher(loss_fn, params, *data)
    gradient = _gradient(loss_fn, has_aux, data)

    def next_gradient(point):
        # What it adds up in would be held beside gradient and Fisher.
        return after_point(point, value, gradient)

    return CleanPass(value, aux, grads, {"fisher": fisher}, next_gradient)


def _differentiated(loss_fn, has_aux, data):
    def loss(params):
        with explaining("loss_fn", params):
            result = loss_fn(params, data.batch, *data.args, **data.kwargs)
        return loss_and_aux(result, has_aux)

    return jax.value_and_grad(loss, has_aux=True)


def _gradient(loss_fn, has_aux, data):
    def gradient(point):
        (value, _), grads = _differentiated(loss_fn, has_aux, data)(point)
        return value, grads

    return gradient


def functional_clean_pass(
    loss_fn: Any, has_aux: bool, params: Any, data: Data
) -> CleanPass:
    """Takes the gradient at w, whose output gradient is pulled back at w + eps too."""
    del has_aux
    (value, aux), grads, pull = value_grad_and_pull(loss_fn, params, *data)
    return CleanPass(value, aux, grads, {}, pull)


def weight_of(loss_fn: Any, params: Any, data: Data) -> jax.Array:
    """Returns how much a part of a batch counts: the weight of its labels, if known."""
    if isinstance(loss_fn, NegativeLogLikelihood):
        return total_weight(loss_fn, params, *data)
    return jnp.ones([], jnp.float32)


def loss_and_aux(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """Returns (loss, aux), or raises TypeError if `loss_fn` returned anything else."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "With `has_aux=True`, `loss_fn` must return `(loss, aux)`, got "
            f"{describe(result)}."
        )
    loss, aux = result if has_aux else (result, None)
    if leaf_shape(loss) != ():
        hint = (
            "Pass `has_aux=True` if it returns `(loss, aux)`."
            if isinstance(loss, tuple)
            else "Take the mean over the batch."
            if leaf_shape(loss) is not None
            else "Pass the loss itself, not its gradient."
        )
        raise TypeError(
            f"`loss_fn` must return a scalar loss, got {describe(loss)}. {hint}"
        )
    return jnp.asarray(loss), aux
