"""Functional SAM: the output gradient at w, pulled back at w + eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from fsam_optax._common.checks import check_leaves
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    labels_of,
    mean_loss,
    NegativeLogLikelihood,
    parts_of,
    resolve,
)
from fsam_optax._fisher.outputs import check_outputs, of_batch


def value_grad_and_pull(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Callable[[Any], tuple[jax.Array, Any]]]:
    """Returns `((loss, aux), gradient, pull)`, where `pull(point) -> (loss, gradient)`.

    `pull` evaluates the loss at another point, and pulls the gradient by the outputs at
    `params` back there: J(point)^T dloss/dh(params).
    """
    parts = parts_of(nll, batch)
    call = call_of(nll, args, kwargs)

    def outputs(params):
        return of_batch(call, params, parts[0])

    h, pull_back, aux = jax.vjp(outputs, params, has_aux=True)
    check_outputs(h, nll.likelihood, parts[0])
    labels = labels_of(nll, h, parts)

    def loss_of(h):
        return mean_loss(nll, h, labels)

    value, cotangent = jax.value_and_grad(loss_of)(h)

    def pull(point):
        there, pull_back, _ = jax.vjp(outputs, point, has_aux=True)
        return loss_of(there), pull_back(_cast(cotangent, there))[0]

    return (value, aux), pull_back(cotangent)[0], pull


def _cast(tree, like):
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def functional_gradient(
    nll: NegativeLogLikelihood, params: Any, batch: Any, *args: Any, **kwargs: Any
) -> Callable[[Any], Any]:
    """Returns the gradient of Functional SAM as a function of the perturbed point.

        grad_fn(v) = J(v)^T dloss/dh(w)               J = dh / dw, h: outputs

    The gradient of the loss by the outputs is that at `params` w, and only the Jacobian
    is perturbed: what is left is the sharpness of the model as a function, without that
    of the loss. At v = w it is the gradient.

    Args:
        nll: The loss, from `negative_log_likelihood`.
        params: Parameters w.
        batch: What the loss takes.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        `grad_fn(point) -> grads`, to pass to `sharpness_aware(...).update` as
        `grad_fn`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian, negative_log_likelihood
        >>> model = lambda w, x: (x * w)[:, None] ** 2
        >>> nll = negative_log_likelihood(model, gaussian())
        >>> batch = (jnp.array([1.0]), jnp.array([[0.0]]))
        >>> grad_fn = functional_gradient(nll, jnp.array(1.0), batch)
        >>> print(grad_fn(jnp.array(1.0)), grad_fn(jnp.array(3.0)))  # 1 x 2 v
        2.0 6.0

    References:
        Singh, Mobahi, Agarwala, Dauphin, Avoiding spurious sharpness minimization
        broadens applicability of SAM, 2025, https://arxiv.org/abs/2502.02407.
    """
    nll = resolve("functional_gradient", nll)
    check_leaves(params, "params", real=True)
    _, _, pull = value_grad_and_pull(nll, params, batch, args, kwargs)
    return lambda point: pull(point)[1]
