"""Estimators of the diagonal of the Fisher information, by squared pullbacks.

    F = 1/N sum_n E_{y ~ p(.|h_n)} [(d log p(y|h_n) / d params)^2]       h_n = f(x_n)

Each estimator chooses, for one example, vectors c on its outputs whose squared
pullbacks (J_n^T c)^2 add up to that example's share.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_count
from fsam_optax._common.norms import divisor, widen
from fsam_optax._engine import power_sums
from fsam_optax._fisher.estimation import ApplyFn, closed_form, mean_powers, sampled
from fsam_optax._fisher.likelihoods import check_model, factor_product, Likelihood


def _mean_square_draws(problem, cotangents, key, num_samples, standard_error):
    """Averages the squared pullbacks of `num_samples` random cotangents an example.

    Returns the diagonal and, if asked for, its standard error: that of a weighted mean
    of independent draws, from their second moment (the fourth power).
    """
    keys = jax.random.split(key, problem.weights.size)
    moments = mean_powers(
        problem,
        cotangents,
        keys,
        draws=num_samples,
        powers=(2, 4) if standard_error else (2,),
    )
    if not standard_error:
        return *moments, None
    w = problem.weights
    count = num_samples * jnp.sum(w) ** 2 / divisor(jnp.sum(w * w))

    def error(mean, square):
        variance = jnp.maximum(square - mean**2, 0)
        return jnp.where(count > 1, jnp.sqrt(variance / divisor(count - 1)), jnp.inf)

    return moments[0], jax.tree.map(error, *moments)


def exact_cotangents(likelihood: Likelihood) -> Callable:
    """Returns the columns of the factor of all positions, one position at a time."""

    def cotangents(h, _):
        columns = jnp.swapaxes(likelihood.factor(h), -1, -2)
        columns = columns.reshape(-1, 1, *columns.shape[-2:])  # (T, 1, K, C)
        positions = jnp.eye(len(columns), dtype=bool)[..., None, None]
        columns = jnp.where(positions, columns, 0)  # (T, T, K, C)
        return jnp.swapaxes(columns, 1, 2).reshape(-1, *h.shape)

    return cotangents


def fisher_exact(
    apply_fn: ApplyFn, likelihood: Likelihood
) -> optax.GradientTransformationExtraArgs:
    """Diagonal of the Fisher, with the expectation over labels in closed form.

        1/N sum_n sum_k (J_n^T B_nk)^2        B B^T = I(h|x),  J = dh / d params

    Also the diagonal of the generalised Gauss-Newton matrix, if h are natural
    parameters. Exact for the given inputs, whatever the labels. It pulls back K
    cotangents an example, one for each column of the factor (C - 1 for `categorical`),
    and T K of them if the model emits T positions: for large vocabularies, sample.

    All estimators share one call, `update(updates, state, params, *, batch, ...)`,
    which returns `(diagonal, state)`. It does not read `updates`. Its extra arguments:

        batch: `(inputs, targets)`, two pytrees whose leading axes count N examples.
            Estimators that do not read the targets take `(inputs, None)` as well.
        example_weights: Array of shape (N,), not negative, that makes the mean over
            the examples a weighted one: 0 for padding. All zero gives zeros.
        replica: Integer folded into the draws of the sampled estimators, so that
            micro-batches or devices that start from one state draw apart.
        full_params: Parameters to complete masked `params` from; see `by_group`.

    The diagonal is a *mean per example*: it does not change if a loss is a sum or a
    mean nor, in expectation, with the batch size. An example is one entry of the
    leading axis. If the model emits (T, C) for it, such as T tokens, the T labels are
    independent given the input, and their log-probabilities add up: the Fisher is that
    of the sequence, about T times that of a token.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch. It is
            also called on single examples, with a leading axis of size 1, so it must
            treat each example on its own: no batch statistics.
        likelihood: Distribution of the labels given h.

    Returns:
        A stateless estimator. Its diagonal has the structure of params, is float32 or
        wider, and no gradient flows through it. Leaves without real numbers get zeros.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: In `update`, if `params` is missing.

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
    check_model(apply_fn, likelihood)

    def estimate(problem):
        return mean_powers(problem, exact_cotangents(likelihood), None)[0]

    return closed_form("fisher_exact", apply_fn, estimate)


def fisher_empirical(
    apply_fn: ApplyFn, likelihood: Likelihood
) -> optax.GradientTransformationExtraArgs:
    """Mean squared score at the labels of the data: the empirical Fisher.

        1/N sum_n (d log p(y_n|h_n) / d params)^2

    Not the Fisher information: it is that only where the model is right. Where the
    data are fitted it vanishes, and the Fisher does not. Not the square of the batch
    gradient either (`squared_gradient`), which is smaller by the variance over the
    examples. What it does measure is the second moment of the gradient noise.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the targets given h.

    Returns:
        A stateless estimator, called as `fisher_exact` is. It costs about one backward
        pass of the batch, and less in
        `value_and_grad(negative_log_likelihood(apply_fn, likelihood), ...)`, where it
        shares that of the gradient.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: In `update`, if `params` is missing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli, diagonal, fisher_exact
        >>> model = lambda w, x: x @ w
        >>> x, y = jnp.array([[1.0, 2.0], [0.0, 2.0]]), jnp.array([[1], [0]])

        At 0, a logistic regression is as unsure as its labels are random:

        >>> w = jnp.zeros((2, 1))
        >>> print(diagonal(fisher_empirical(model, bernoulli), w, (x, y)).ravel())
        [0.125 1.   ]
        >>> print(diagonal(fisher_exact(model, bernoulli), w, (x, y)).ravel())
        [0.125 1.   ]

    References:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558 (eq. 3).
    """
    check_model(apply_fn, likelihood)

    def estimate(problem):
        def cotangents(h, y):
            return likelihood.score(h, y)[None]

        return mean_powers(problem, cotangents, problem.targets)[0]

    return closed_form("fisher_empirical", apply_fn, estimate)


def fisher_i1(
    apply_fn: ApplyFn,
    likelihood: Likelihood,
    *,
    num_samples: int = 1,
    key: jax.Array,
    standard_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Mean squared score at labels drawn from the model: the estimator I1.

        1/(N S) sum_ns (d log p(y_ns|h_n) / d params)^2       y_ns ~ p(.|h_n)

    Unbiased and not negative. One draw has an unbounded relative error where the model
    is sure: at probabilities p and 1 - p its standard deviation is about p^(-1/2)
    times its mean. Average with `optax.ema`, or use `fisher_hutchinson`, whose error
    is at most sqrt(2) times its mean.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
        num_samples: Draws S of each label; one backward pass each.
        key: PRNG key of the draws. It is copied into the state and split every update.
        standard_error: Whether to keep the standard error of each entry in the state
            (`optax.tree.get(state, "standard_error")`), from the fourth powers in the
            same pass. It takes the S N draws as independent: exact for S = 1, with the
            inputs random too, and for all S never less, on average, than the error
            from the labels alone, of which it may be several times where the inputs
            differ more than their labels. inf for a single draw.

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
    check_model(apply_fn, likelihood)
    check_count("num_samples", num_samples)

    def cotangents(h, key):
        def draw(key):
            return likelihood.score(h, likelihood.sample(key, h))

        return jax.vmap(draw)(jax.random.split(key, num_samples))

    def estimate(problem, key):
        return _mean_square_draws(problem, cotangents, key, num_samples, standard_error)

    return sampled("fisher_i1", apply_fn, estimate, key, standard_error)


def fisher_hutchinson(
    apply_fn: ApplyFn,
    likelihood: Likelihood,
    *,
    num_samples: int = 1,
    key: jax.Array,
    standard_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Squared pullback of a randomly signed factor of I(h|x), for each example.

        1/(N S) sum_ns (J_n^T B_n xi_ns)^2     B B^T = I(h|x),  xi = +-1 at random

    Unbiased and not negative, without labels. The standard deviation of an example's
    share is at most sqrt(2) times its mean, however sure the model is, and the average
    over examples and draws lowers it. Not Hutchinson's estimator of the Hessian: the
    signs live on the outputs, not on the parameters.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
        num_samples: Draws S of the signs; one backward pass each.
        key: PRNG key of the draws. It is copied into the state and split every update.
        standard_error: Whether to keep the standard error of each entry in the state;
            as in `fisher_i1`.

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
        >>> model, w, x = (lambda w, x: x @ w), jnp.ones((1, 2)), jnp.ones((4, 1))
        >>> signs = fisher_hutchinson(model, categorical, key=jax.random.key(0))
        >>> print(diagonal(signs, w, (x, None)))
        [[0.25 0.25]]
        >>> print(diagonal(fisher_exact(model, categorical), w, (x, None)))
        [[0.25 0.25]]

    References:
        Sun, Deterministic Bounds and Random Estimates of Metric Tensors on
        Neuromanifolds, 2025, https://arxiv.org/abs/2505.13614, which squares the sum
        over the batch; the square of each example has less variance.
    """
    check_model(apply_fn, likelihood)
    check_count("num_samples", num_samples)

    def cotangents(h, key):
        factor = jax.eval_shape(likelihood.factor, h)
        shape = (num_samples, *h.shape[:-1], factor.shape[-1])
        signs = jax.random.rademacher(key, shape, factor.dtype)
        return jax.vmap(lambda v: factor_product(likelihood, h, v))(signs)

    def estimate(problem, key):
        return _mean_square_draws(problem, cotangents, key, num_samples, standard_error)

    return sampled("fisher_hutchinson", apply_fn, estimate, key, standard_error)


def fisher_gnb(
    apply_fn: ApplyFn,
    likelihood: Likelihood,
    *,
    key: jax.Array,
    standard_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton-Bartlett: N times the squared batch gradient at drawn labels.

        N (1/N sum_n d log p(y_n|h_n) / d params)^2           y_n ~ p(.|h_n)

    Unbiased, because the scores of drawn labels have mean 0 and are independent; at
    the labels of the data it would not be. One ordinary backward pass, with any model.
    A single square: its standard deviation is about sqrt(2) times its mean whatever
    the batch size, so average it over many steps.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
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
        >>> print(diagonal(estimator, jnp.zeros((2, 1)), (x, None)).ravel())
        [0.25 1.  ]

    References:
        Liu, Li, Hall, Liang, Ma, Sophia: A Scalable Stochastic Second-order Optimizer
        for Language Model Pre-training, 2023, https://arxiv.org/abs/2305.14342
        (algorithm 2).
    """
    check_model(apply_fn, likelihood)

    def estimate(problem, key):
        # The square root makes the square of the sum weigh each example by its weight.
        roots = jnp.sqrt(problem.weights)
        total = divisor(jnp.sum(problem.weights))
        if standard_error:
            return estimate_and_error(problem, roots, total, key)
        h, pull = jax.vjp(lambda w: problem.model(w, problem.inputs), problem.params)
        scores = likelihood.score(h, likelihood.sample(key, h))
        scores = jnp.expand_dims(roots, range(1, h.ndim)) * scores
        (sums,) = pull(scores.astype(h.dtype))
        return jax.tree.map(lambda g: g.astype(widen(g)) ** 2 / total, sums), None

    def estimate_and_error(problem, roots, total, key):
        h = problem.model(problem.params, problem.inputs)
        labels = likelihood.sample(key, h)
        first, second, fourth = power_sums(
            problem.model,
            problem.params,
            problem.inputs,
            lambda h, y: (y[1] * likelihood.score(h, y[0]))[None],
            (labels, roots),
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

    return sampled("fisher_gnb", apply_fn, estimate, key, standard_error)
