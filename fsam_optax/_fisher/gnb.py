"""The Gauss-Newton-Bartlett estimator: the square of a sum over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.norms import widen
from fsam_optax._fisher.estimation import power_sums_of, sampled
from fsam_optax._fisher.estimators import Model
from fsam_optax._fisher.labels import drawn_score, expand
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import resolve


def fisher_gnb(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    key: jax.Array,
    standard_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton-Bartlett: D times the squared batch gradient at drawn labels.

        1/D (sum_n sqrt(a_n) sum_t m_nt d log p(y_nt|h_nt) / d params)^2    y ~ p(.|h)

    Unbiased, because the scores of drawn labels have mean 0 and are independent; at
    the labels of the data it would not be. One ordinary backward pass, with any model.
    A single square: its standard deviation is about sqrt(2) times its mean whatever
    the batch size, so average it over many steps.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one.
        likelihood: Its likelihood, in the second case.
        key: PRNG key of the draws. It is copied into the state and split every update.
        standard_error: Whether to keep the standard error of each entry in the state,
            for the given inputs. It is that of the square of a sum, from the second
            and fourth powers of its terms, at the price of `fisher_i1`; its square is
            too large by about 1/N of that of the estimate, for N examples.

    Returns:
        An estimator, called as `fisher_exact` is. The targets in
        `batch` are not read.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: In `update`, if `params` is missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli, diagonal
        >>> estimator = fisher_gnb(lambda w, x: x @ w, bernoulli, key=jax.random.key(0))
        >>> x = jnp.array([[1.0, 2.0]])
        >>> evaluate = jax.jit(diagonal, static_argnums=0)
        >>> print(evaluate(estimator, jnp.zeros((2, 1)), (x, None)).ravel())
        [0.25 1.  ]

    References:
        Liu, Li, Hall, Liang, Ma, Sophia: A Scalable Stochastic Second-order Optimizer
        for Language Model Pre-training, 2023, https://arxiv.org/abs/2305.14342
        (algorithm 2).
    """
    nll = resolve("fisher_gnb", model, likelihood)

    def estimate(problem, key):
        # The square root makes the square of the sum weigh each example by its weight.
        roots = jnp.sqrt(problem.labels.examples)
        total = problem.labels.divisor
        if standard_error:
            return estimate_and_error(problem, roots, total, key)
        h, pull = jax.vjp(lambda w: problem.of_all(w, problem.inputs), problem.params)
        (sums,) = pull(weighed_scores(problem, h, roots, key))
        return jax.tree.map(lambda g: g.astype(widen(g)) ** 2 / total, sums), None

    def weighed_scores(problem, h, roots, key):
        _, present, within = problem.labels.of_examples
        weights = expand(roots, within) * within
        scores = drawn_score(nll.likelihood, h, key, present, weights)
        return jax.tree.map(lambda s, h: s.astype(h.dtype), scores, h)

    def estimate_and_error(problem, roots, total, key):
        # At once for all examples, as without the error: the same draws.
        h = problem.of_all(problem.params, problem.inputs)
        first, second, fourth = power_sums_of(
            problem._replace(
                labels=problem.labels._replace(examples=jnp.ones_like(roots))
            ),
            lambda h, label, scores: jax.tree.map(lambda s: s[None], scores),
            weighed_scores(problem, h, roots, key),
            powers=(1, 2, 4),
        )
        # Var (sum s)^2 = sum E s^4 + 2 (sum E s^2)^2 - 3 sum (E s^2)^2 for independent
        # terms of mean 0. One draw each tells all but the last sum, of order 1/N.
        variances = jax.tree.map(
            lambda s2, s4: jnp.maximum(2 * s2**2 - s4, 0), second, fourth
        )
        return (
            jax.tree.map(lambda s: s**2 / total, first),
            jax.tree.map(lambda v: jnp.sqrt(v) / total, variances),
        )

    return sampled("fisher_gnb", nll, estimate, key, standard_error)
