"""The loss whose gradient and empirical Fisher come from one backward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._engine import loss_power_sums
from fsam_optax._fisher.likelihoods import check_model, Likelihood


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood:
    """A loss that knows its model and its likelihood; see `negative_log_likelihood`.

    Attributes:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the targets given h.
    """

    apply_fn: Callable[[Any, Any], jax.Array]
    likelihood: Likelihood

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """Returns the mean over examples of `-log p(y_n | h_n)`."""
        inputs, targets = batch
        log_prob = self.likelihood.log_prob(self.apply_fn(params, inputs), targets)
        return -jnp.sum(log_prob) / max(len(log_prob), 1)


def negative_log_likelihood(
    apply_fn: Callable[[Any, Any], jax.Array], likelihood: Likelihood
) -> NegativeLogLikelihood:
    """Returns the loss `-1/N sum_n log p(y_n | h_n)` of a batch `(inputs, targets)`.

    The positions of a sequence are summed, and examples averaged: this is the loss of
    which `fisher_empirical(apply_fn, likelihood)` is the mean squared gradient over
    examples. `value_and_grad` recognises the two by equal `apply_fn` and `likelihood`,
    and computes both in one pass.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch. It must
            not mix examples, as BatchNorm in training mode does.
        likelihood: Distribution of the targets given h.

    Returns:
        A function `loss(params, batch) -> scalar`, in nats per example.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> loss = negative_log_likelihood(lambda w, x: x @ w, bernoulli)
        >>> x, y = jnp.array([[1.0, 2.0], [0.0, 2.0]]), jnp.array([[1], [0]])
        >>> print(loss(jnp.zeros((2, 1)), (x, y)))  # log 2
        0.6931472
    """
    check_model(apply_fn, likelihood)
    return NegativeLogLikelihood(apply_fn, likelihood)


def value_grad_and_fisher(
    loss: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Any]:
    """Returns the loss, its gradient and the empirical Fisher, from one pass."""
    del args, kwargs

    def example_loss(params, example):
        inputs, targets = jax.tree.map(lambda x: x[None], example)
        return loss(params, (inputs, targets))

    value, (grads, squares) = loss_power_sums(
        example_loss, params, batch, powers=(1, 2), has_value=True
    )
    count = max(len(jax.tree.leaves(batch)[0]), 1)
    grads = jax.tree.map(lambda g, w: (g / count).astype(w.dtype), grads, params)
    return (value / count, None), grads, jax.tree.map(lambda f: f / count, squares)


def total_weight(
    loss: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> jax.Array:
    """Returns the divisor of the loss."""
    del loss, params, args, kwargs
    return jnp.asarray(len(jax.tree.leaves(batch)[0]), jnp.float32)


def value_grad_and_pull(
    loss: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Callable[[Any], tuple[jax.Array, Any]]]:
    """Returns loss and gradient, and the pull-back of its output gradient."""
    del args, kwargs
    inputs, targets = batch

    def of_outputs(h):
        log_prob = loss.likelihood.log_prob(h, targets)
        return -jnp.sum(log_prob) / max(len(log_prob), 1)

    h, pull = jax.vjp(lambda p: loss.apply_fn(p, inputs), params)
    value, output_grads = jax.value_and_grad(of_outputs)(h)

    def pulled_back(point):
        h, pull = jax.vjp(lambda p: loss.apply_fn(p, inputs), point)
        return of_outputs(h), pull(output_grads)[0]

    return (value, None), pull(output_grads)[0], pulled_back
