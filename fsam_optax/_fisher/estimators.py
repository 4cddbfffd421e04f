"""Estimators of the diagonal of the Fisher information, by squared pullbacks.

    F = 1/D sum_n a_n E_{y ~ p(.|h_n)} [(sum_t m_nt d log p(y_t|h_nt) / d params)^2]

over examples n with outputs h_n = f(x_n), and their labels t. Without weights, and with
one label for each example, it is the mean over the examples. Each estimator chooses,
for one example, vectors c on its outputs whose squared pullbacks (J_n^T c)^2 add up to
that example's share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_count
from fsam_optax._common.norms import divisor
from fsam_optax._engine import Columns
from fsam_optax._fisher.estimation import (
    closed_form,
    draws_of,
    mean_powers,
    Problem,
    sampled,
)
from fsam_optax._fisher.labels import (
    drawn_score,
    factor_columns,
    score,
    signed_factor,
)
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import NegativeLogLikelihood, resolve


Model = NegativeLogLikelihood | Callable[..., Any]


def _mean_square_draws(
    problem: Problem,
    cotangent: Callable,
    key: jax.Array,
    num_samples: int,
    standard_error: bool,
    chunk_bytes: int | None,
) -> tuple[Any, Any]:
    """Averages the squared pullbacks of `num_samples` random cotangents an example.

    Returns the diagonal and, if asked for, its standard error: that of a weighted mean
    of independent draws, from their second moment (the fourth power).
    """

    def draw(h, target, i):
        (_, present, within), keys = target
        return cotangent(problem.likelihood, h, keys[i], present, within)

    w, total = problem.labels.examples, problem.labels.divisor
    diagonal, *fourth = mean_powers(
        problem,
        Columns(lambda h: num_samples, draw),
        jax.random.split(key, (w.size, num_samples)),
        draws=num_samples,
        powers=(2, 4) if standard_error else (2,),
        chunk_bytes=chunk_bytes,
    )
    if not standard_error:
        return diagonal, None
    # The mean over examples, of which the diagonal is a multiple.
    weight, count = draws_of(problem, num_samples)
    multiple = divisor(num_samples * weight) / (num_samples * total)

    def error(second, fourth):
        variance = jnp.maximum(fourth / multiple - (second / multiple) ** 2, 0)
        error = jnp.where(count > 1, jnp.sqrt(variance / divisor(count - 1)), jnp.inf)
        return error * multiple

    return diagonal, jax.tree.map(error, diagonal, *fourth)


MANY_COLUMNS = 10_000


def check_bytes(chunk_bytes: int | None) -> None:
    """Raises ValueError unless `chunk_bytes` is None or an integer of at least 1."""
    if chunk_bytes is not None:
        check_count("chunk_bytes", chunk_bytes)


def many_columns(number: int) -> str:
    """Says what so many columns cost, and what to use instead."""
    return (
        f"The exact Fisher pulls back {number} cotangents an example, one for each "
        "column of the factor of each label, at about .7 gradients each. "
        "`fisher_hutchinson` and `fisher_i1` are unbiased and pull back one."
    )


def exact_cotangents(likelihood: Likelihood) -> Columns:
    """Returns the columns of the factor of all labels, as cotangents."""
    columns = factor_columns(likelihood)

    def number(h):
        found = columns.number(h)
        if found > MANY_COLUMNS:
            warnings.warn(many_columns(found), stacklevel=2)
        return found

    def column(h, target, i):
        label, _ = target
        return columns.column(h, label, i)

    return Columns(number, column)


def fisher_exact(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Diagonal of the Fisher, with the expectation over labels in closed form.

        1/D sum_n a_n sum_tk (m_nt J_nt^T B_ntk)^2      B B^T = I(h|x),  J = dh / dw

    Also the diagonal of the generalised Gauss-Newton matrix of the loss, if h are
    natural parameters and the m are 0 or 1. Exact for the given inputs, whatever the
    labels. It pulls back K cotangents a label, one for each column of the factor (C - 1
    for `categorical`), and T K of them if the model emits T labels: for large
    vocabularies, sample. Beyond 10 000 of them an example a warning says so.

    All estimators share one call, `update(updates, state, params, *, batch, ...)`,
    which returns `(diagonal, state)`. It does not read `updates`. Its extra arguments:

        batch: What the loss takes: `(inputs, targets)` or `(inputs, targets, weights)`
            unless it has an `unpack`. Estimators that draw their labels take
            `(inputs, None)` too; of targets they read which are absent.
        example_weights: Array of shape (N,), not negative, that multiplies the weights.
        loss_args: Tuple of further arguments of the model; keys among them are folded
            with the row of each example, as the loss does.
        loss_kwargs: Dict of further keyword arguments of the model.
        replica: Integer folded into the draws of the sampled estimators, so that
            micro-batches or devices that start from one state draw apart.
        full_params: Parameters to complete masked `params` from; see `by_group`.

    The diagonal is a *mean over labels*, as the loss is: a sum over examples, divided
    by D, the sum of the weights of the labels (`negative_log_likelihood`). Times D it
    is the Fisher of the data, which elastic weight consolidation and Laplace want. If
    the model emits (T, C) for an example, such as T tokens, the T labels are
    independent given the input, and the scores that are squared are those of whole
    examples. Weights of 0 leave out, and all zero gives zeros.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one: `apply_fn(params,
            inputs) -> h` on a whole batch. It is also called on single examples, with
            a leading axis of size 1, so it must treat each example on its own: no
            batch statistics.
        likelihood: Its likelihood, in the second case: distribution of the labels.
        chunk_bytes: Bytes that the backward passes of several cotangents, and
            per-example gradients which have to be formed, may hold on a device; at
            least one cotangent is pulled back at a time. None for as many as keep the
            whole within twice the memory of the gradient, or within about 64 MiB if
            that is more; on a CPU for no more than make it faster, often one. See
            `power_sums`.

    Returns:
        A stateless estimator. Its diagonal has the structure of params, is float32 or
        wider, and no gradient flows through it. Leaves without real numbers get zeros.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: In `update`, if `params` is missing, or labels, weights or outputs
            have another shape than the loss takes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import diagonal, gaussian
        >>> estimator = fisher_exact(lambda w, x: x @ w, gaussian())
        >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> print(diagonal(estimator, jnp.zeros((2, 1)), (x, None)).ravel())
        [5. 2.]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (lemma 3.1). Kunstner, Balles, Hennig, 2019,
        https://arxiv.org/abs/1905.12558 (proposition 1).
    """
    nll = resolve("fisher_exact", model, likelihood)
    check_bytes(chunk_bytes)

    def estimate(problem):
        columns = exact_cotangents(nll.likelihood)
        return mean_powers(problem, columns, chunk_bytes=chunk_bytes)[0]

    return closed_form("fisher_exact", nll, estimate)


def fisher_empirical(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mean squared score at the labels of the data: the empirical Fisher.

        1/D sum_n a_n (sum_t m_nt d log p(y_nt|h_nt) / d params)^2

    Not the Fisher information: it is that only where the model is right. Where the
    data are fitted it vanishes, and the Fisher does not. Not the square of the batch
    gradient either (`squared_gradient`), which is smaller by the variance over the
    examples. What it does measure is the second moment of the gradient noise.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one.
        likelihood: Its likelihood, in the second case.
        chunk_bytes: Bytes that per-example gradients which have to be formed, and the
            backward passes of several cotangents, may hold on a device; see
            `power_sums`. None for what suits the platform.

    Returns:
        A stateless estimator, called as `fisher_exact` is. It costs about one backward
        pass of the batch, and less with `value_and_grad(nll, ...,
        empirical_fisher=True)`, where it shares that of the gradient and `given()`
        reads it.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: In `update`, if `params` is missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli, diagonal, fisher_exact
        >>> evaluate = jax.jit(diagonal, static_argnums=0)
        >>> model = lambda w, x: x @ w
        >>> x, y = jnp.array([[1.0, 2.0], [0.0, 2.0]]), jnp.array([[1], [0]])

        At 0, a logistic regression is as unsure as its labels are random:

        >>> w = jnp.zeros((2, 1))
        >>> print(evaluate(fisher_empirical(model, bernoulli), w, (x, y)).ravel())
        [0.125 1.   ]
        >>> print(evaluate(fisher_exact(model, bernoulli), w, (x, y)).ravel())
        [0.125 1.   ]

    References:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558 (eq. 3).
    """
    nll = resolve("fisher_empirical", model, likelihood)
    check_bytes(chunk_bytes)

    def cotangents(h, label, _):
        targets, _, within = label
        one = score(nll.likelihood, h, targets, within)
        return jax.tree.map(lambda c: c[None], one)

    def estimate(problem):
        return mean_powers(problem, cotangents, chunk_bytes=chunk_bytes)[0]

    return closed_form("fisher_empirical", nll, estimate, needs_labels=True)


def fisher_i1(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    num_samples: int = 1,
    key: jax.Array,
    standard_error: bool = False,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mean squared score at labels drawn from the model: the estimator I1.

        1/(D S) sum_ns a_n (sum_t m_nt d log p(y_nts|h_nt) / d params)^2    y ~ p(.|h)

    Unbiased and not negative. One draw has an unbounded relative error where the model
    is sure: at probabilities p and 1 - p its standard deviation is about p^(-1/2)
    times its mean. Average with `optax.ema`, or use `fisher_hutchinson`, whose error
    is at most sqrt(2) times its mean.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one.
        likelihood: Its likelihood, in the second case.
        num_samples: Draws S of each label; one backward pass each.
        key: PRNG key of the draws. It is copied into the state and split every update.
        standard_error: Whether to keep the standard error of each entry in the state
            (`optax.tree.get(state, "standard_error")`), from the fourth powers in the
            same pass. It takes the S N draws as independent: exact for S = 1, with the
            inputs random too, and for all S never less, on average, than the error
            from the labels alone, of which it may be several times where the inputs
            differ more than their labels. inf for a single draw.
        chunk_bytes: Bytes that per-example gradients which have to be formed, and the
            backward passes of several cotangents, may hold on a device; see
            `power_sums`. None for what suits the platform.

    Returns:
        An estimator, called as `fisher_exact` is. The targets in
        `batch` are not read.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: If num_samples < 1; in `update`, if `params` is missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> model = lambda w, x: x @ w
        >>> estimator = fisher_i1(model, bernoulli, key=jax.random.key(0))
        >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 2.0], [0.0, 2.0]])
        >>> state = estimator.init(w)
        >>> diagonal, state = estimator.update(None, state, w, batch=(x, None))
        >>> print(diagonal.ravel())
        [0.125 1.   ]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (section 2).
    """
    nll = resolve("fisher_i1", model, likelihood)
    check_count("num_samples", num_samples)
    check_bytes(chunk_bytes)

    def estimate(problem, key):
        return _mean_square_draws(
            problem, drawn_score, key, num_samples, standard_error, chunk_bytes
        )

    return sampled("fisher_i1", nll, estimate, key, standard_error, num_samples)


def fisher_hutchinson(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    num_samples: int = 1,
    key: jax.Array,
    standard_error: bool = False,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Squared pullback of a randomly signed factor of I(h|x), for each example.

        1/(D S) sum_ns a_n (sum_t m_nt J_nt^T B_nt xi_nts)^2      B B^T = I(h|x)

    with signs xi = +-1 at random.

    Unbiased and not negative, without labels. The standard deviation of an example's
    share is at most sqrt(2) times its mean, however sure the model is, and the average
    over examples and draws lowers it. Not Hutchinson's estimator of the Hessian: the
    signs live on the outputs, not on the parameters.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one.
        likelihood: Its likelihood, in the second case.
        num_samples: Draws S of the signs; one backward pass each.
        key: PRNG key of the draws. It is copied into the state and split every update.
        standard_error: Whether to keep the standard error of each entry in the state;
            as in `fisher_i1`.
        chunk_bytes: Bytes that per-example gradients which have to be formed, and the
            backward passes of several cotangents, may hold on a device; see
            `power_sums`. None for what suits the platform.

    Returns:
        An estimator, called as `fisher_exact` is. The targets in
        `batch` are not read.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: If num_samples < 1; in `update`, if `params` is missing.

    Examples:
        With two classes the factor has one column, and its sign does not matter:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import categorical, diagonal, fisher_exact
        >>> evaluate = jax.jit(diagonal, static_argnums=0)
        >>> model, w, x = (lambda w, x: x @ w), jnp.ones((1, 2)), jnp.ones((4, 1))
        >>> signs = fisher_hutchinson(model, categorical, key=jax.random.key(0))
        >>> print(evaluate(signs, w, (x, None)).round(3))
        [[0.25 0.25]]
        >>> print(evaluate(fisher_exact(model, categorical), w, (x, None)))
        [[0.25 0.25]]

    References:
        Sun, Deterministic Bounds and Random Estimates of Metric Tensors on
        Neuromanifolds, 2025, https://arxiv.org/abs/2505.13614, which squares the sum
        over the batch; the square of each example has less variance.
    """
    nll = resolve("fisher_hutchinson", model, likelihood)
    check_count("num_samples", num_samples)
    check_bytes(chunk_bytes)

    def estimate(problem, key):
        return _mean_square_draws(
            problem, signed_factor, key, num_samples, standard_error, chunk_bytes
        )

    return sampled("fisher_hutchinson", nll, estimate, key, standard_error, num_samples)
