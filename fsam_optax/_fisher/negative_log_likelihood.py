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


@dataclasses.dataclass(frozen=True, eq=False)
class SquaredScores:
    """An empirical Fisher that is at hand, passed to the estimators to be taken.

    Attributes:
        loss: The loss it belongs to.
        diagonal: Mean over examples of the squared gradient of the loss.
    """

    loss: NegativeLogLikelihood
    diagonal: Any

    def take(self, apply_fn: Any, likelihood: Any) -> Any | None:
        """Returns the diagonal if it is that of this model, else None."""
        # Equal, not identical: `model.apply` is a new object at every mention.
        same = self.loss == NegativeLogLikelihood(apply_fn, likelihood)
        return self.diagonal if same else None


class _Taken(BaseException):
    """Tells that an estimator would take the scores, and ends the probe there.

    No `Exception`, which functions on its way might catch.
    """


class _Probe(SquaredScores):
    def take(self, apply_fn, likelihood):
        if super().take(apply_fn, likelihood) is not None:
            raise _Taken
        return None


def value_grad_and_scores(
    loss: NegativeLogLikelihood, params: Any, batch: Any
) -> tuple[jax.Array, Any, Any]:
    """Returns the loss, its gradient and the empirical Fisher, from one pass."""

    def example_loss(params, example):
        inputs, targets = jax.tree.map(lambda x: x[None], example)
        return loss(params, (inputs, targets))

    value, (grads, squares) = loss_power_sums(
        example_loss, params, batch, powers=(1, 2), has_value=True
    )
    count = max(len(jax.tree.leaves(batch)[0]), 1)
    grads = jax.tree.map(lambda g, w: (g / count).astype(w.dtype), grads, params)
    return value / count, grads, jax.tree.map(lambda f: f / count, squares)


def takes_scores(
    loss: NegativeLogLikelihood, update: Callable[..., Any], params: Any
) -> bool:
    """Tells whether `update(grads, squared_scores=...)` would take the scores."""
    try:
        jax.eval_shape(
            lambda params: update(params, squared_scores=_Probe(loss, params)), params
        )
    except _Taken:
        return True
    return False
