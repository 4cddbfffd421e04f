"""Variances of the estimators I1 and I2 of the Fisher, exact, bounded and sampled.

    V1 = mean_n  u^a u^b u^c u^d (K_abcd - I_ab I_cd)         u = dh_n / dtheta_i
    V2 = mean_n  v^a v^b I_ab                                 v = d^2 h_n / dtheta_i^2
    Var_n(F_n)                                                F_n = u^a u^b I_ab

for every parameter theta_i. I is the covariance of the score d log p / dh under the
model, K its tensor of fourth moments. V1 and V2 speak of *one* label drawn for *one*
input: what `fisher_i1` or `fisher_i2` return from N inputs, with S labels for each,
varies by 1/(N S) of that over the labels. Var_n(F_n) is the part of the error that both
have in common, and no number of labels lowers. All are in the units of the estimators:
of a mean over labels, T for each input of a sequence.

Every function but the last two is called as `f(nll, params, batch)`, with a
`negative_log_likelihood` and what it takes; or with `apply_fn, likelihood` in its place
and then the inputs in the place of the batch. `loss_args=` and `loss_kwargs=` are the
arguments of the model. Labels are drawn: of those in a batch it matters which are
absent. Inputs count as the whole population, one or more. Each function materialises
derivatives of all outputs with respect to all parameters: these are for the study of
small models. What concerns I2 takes nested forward-mode derivatives, which
`jax.custom_vjp` has not. Squares are taken in float32 or wider.

References:
    Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
    https://arxiv.org/abs/2402.05379 (lemma 3.1: V1 and V2; theorem 4.1, corollary 4.2,
    theorem 5.2: their bounds; theorem 4.7, lemma 4.8: between inputs).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_count
from fsam_optax._fisher.estimation import key_data
from fsam_optax._fisher.negative_log_likelihood import (
    NegativeLogLikelihood,
    takes_model,
)
from fsam_optax._study.derivatives import (
    examples_of,
    mean_over_jacobians,
    mean_over_second_derivatives,
    outputs_of,
)
from fsam_optax._study.forms import (
    bounds_of,
    form_of_second,
    form_of_second_bounds,
    fourth_moment_of,
    moment,
    sum_of_fourth,
)
from fsam_optax._study.tradeoff import (
    fisher_variance_joint as fisher_variance_joint,
    prefer as prefer,
)


__all__ = [
    "Bounds",
    "SampledVariance",
    "TraceBounds",
    "fisher_bounds",
    "fisher_variance_between_inputs",
    "fisher_variance_between_inputs_bound",
    "fisher_variance_i1",
    "fisher_variance_i1_bounds",
    "fisher_variance_i1_sampled",
    "fisher_variance_i2",
    "fisher_variance_i2_bounds",
    "fisher_variance_i2_sampled",
    "fisher_variance_joint",
    "fisher_variance_trace_bounds",
    "prefer",
]

_of_inputs = functools.partial(takes_model, inputs_only=True)


class Bounds(NamedTuple):
    """Lower and upper bound of each entry, two trees with the structure of params."""

    lower: Any
    upper: Any


class SampledVariance(NamedTuple):
    """A variance estimated from draws.

    Attributes:
        variance: The estimate, unbiased; structure of params.
        standard_error: Its standard error; structure of params.
    """

    variance: Any
    standard_error: Any


class TraceBounds(NamedTuple):
    """Upper bounds of sums over the entries of each array of parameters.

    Attributes:
        fisher: Bound of the trace of the Fisher; structure of params, scalar leaves.
        i1: Bound of the summed variances of I1; likewise.
        i2: Bound of the summed variances of I2; likewise.
    """

    fisher: Any
    i1: Any
    i2: Any


@_of_inputs
def fisher_variance_i1(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Any:
    """V1: the variance of one squared score over the labels, exactly.

    The likelihood needs `fourth_moment`. Returns a tree with the structure of params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> model, x = (lambda w, x: x * w[None]), jnp.array([[2.0]])

        At p = 1/2 the squared score is the same for both labels, elsewhere not:

        >>> print(fisher_variance_i1(model, bernoulli, jnp.zeros(1), x))
        [0.]
        >>> print(fisher_variance_i1(model, bernoulli, jnp.ones(1), x))
        [0.98]
    """
    fourth_moment = fourth_moment_of(nll.likelihood)

    def form(h, u):
        second = moment(nll.likelihood, h, u)
        return (sum_of_fourth(fourth_moment(h, u) - second**2, second),)

    examples = examples_of(nll, params, batch, **options)
    return mean_over_jacobians(form, params, examples)[0]


@_of_inputs
def fisher_variance_i2(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Any:
    """V2: the variance of one d^2 log p / dtheta^2 over the labels, exactly.

    Zero for every parameter in which h is linear or piecewise linear (derivatives are
    those of autodiff): in the last layer, and throughout a plain ReLU network. It is
    that of `fisher_i2` with its exact Hessian. Returns a tree like params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> model, x = (lambda w, x: x * w[None] ** 2), jnp.array([[3.0]])
        >>> print(fisher_variance_i2(model, gaussian(), jnp.ones(1), x))
        [36.]
    """
    examples = examples_of(nll, params, batch, **options)
    form = form_of_second(nll.likelihood)
    return mean_over_second_derivatives(form, params, examples)[0]


@_of_inputs
def fisher_bounds(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Bounds:
    """Bounds of the Fisher diagonal by the eigenvalues of I(h|x).

        mean_n |u|^2 lambda_min(I)  <=  F  <=  mean_n |u|^2 lambda_max(I)

    The likelihood needs `bounds`. The lower ones are 0 for `categorical`, whose I has a
    null vector.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import poisson
        >>> x, w = jnp.array([[1.0]]), jnp.zeros((1, 2))
        >>> print(*fisher_bounds(lambda w, x: x @ w, poisson, w, x))
        [[1. 1.]] [[1. 1.]]
    """
    examples = examples_of(nll, params, batch, **options)
    form = form_of_second_bounds(nll.likelihood)
    return Bounds(*mean_over_jacobians(form, params, examples))


@_of_inputs
def fisher_variance_i1_bounds(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Bounds:
    """Bounds of V1 by the extreme values of the fourth-moment form.

        mean_n |u|^4 min_M  <=  V1  <=  mean_n |u|^4 max_M

    min_M and max_M are over unit vectors v of v^a v^b v^c v^d (K_abcd - I_ab I_cd),
    from `likelihood.bounds`: both 2 / scale^4 for `gaussian`, at most 2 m with
    m = min(max p, 1 - |p|^2) for `categorical`. (Over several labels, with the products
    between them.)

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[2.0]]), jnp.zeros((1, 1))
        >>> print(*fisher_variance_i1_bounds(lambda w, x: x @ w, gaussian(), w, x))
        [[32.]] [[32.]]
    """
    bounds = bounds_of(nll.likelihood)

    def form(h, u):
        b, squares = bounds(h), jnp.sum(u**2, axis=-1)
        return tuple(
            sum_of_fourth(fourth * squares**2, second * squares)
            for fourth, second in (
                (b.fourth_min, b.fisher_min),
                (b.fourth_max, b.fisher_max),
            )
        )

    examples = examples_of(nll, params, batch, **options)
    return Bounds(*mean_over_jacobians(form, params, examples))


@_of_inputs
def fisher_variance_i2_bounds(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Bounds:
    """Bounds of V2 by the eigenvalues of I(h|x).

        mean_n |v|^2 lambda_min(I)  <=  V2  <=  mean_n |v|^2 lambda_max(I)

    The likelihood needs `bounds`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> w, x = jnp.ones(1), jnp.array([[3.0]])
        >>> model = lambda w, x: x * w[None] ** 2
        >>> bounds = jax.jit(fisher_variance_i2_bounds, static_argnums=(0, 1))
        >>> print(*bounds(model, gaussian(), w, x))
        [36.] [36.]
    """
    examples = examples_of(nll, params, batch, **options)
    form = form_of_second_bounds(nll.likelihood)
    return Bounds(*mean_over_second_derivatives(form, params, examples))


@_of_inputs
def fisher_variance_trace_bounds(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> TraceBounds:
    """Upper bounds of whole traces, one scalar for each array of parameters.

    The sums of the upper bounds of F, V1 and V2 over its entries. Compare i1 with i2 to
    choose the estimator of a layer, or add them up over layers.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[1.0, 2.0]]), jnp.zeros((2, 1))
        >>> evaluate = jax.jit(fisher_variance_trace_bounds, static_argnums=(0, 1))
        >>> bounds = evaluate(lambda w, x: x @ w, gaussian(), w, x)
        >>> print(bounds.fisher, bounds.i1, bounds.i2)
        5.0 34.0 0.0
    """
    bounds = (fisher_bounds, fisher_variance_i1_bounds, fisher_variance_i2_bounds)
    return TraceBounds(
        *(
            jax.tree.map(jnp.sum, bound(nll, params, batch, **options).upper)
            for bound in bounds
        )
    )


def _sampled(mean_over, power, nll, params, batch, num_draws, key, options):
    """Returns the sample variance of (u . score)^power, averaged over examples."""
    check_count("num_draws", num_draws)
    if num_draws < 2:
        raise ValueError(f"`num_draws` must be at least 2, got {num_draws}.")
    key_data(key)  # Raises on anything but a key.
    examples = examples_of(nll, params, batch, **options)

    def draw(x, key):
        h = outputs_of(examples.call, params, x)
        keys = jax.random.split(key, num_draws)
        draws = jax.vmap(lambda k: nll.likelihood.sample(k, h))(keys)
        return jax.vmap(lambda y: nll.likelihood.score(h, y))(draws)

    size = len(examples.scales)
    scores = jax.vmap(draw)(examples.inputs, jax.random.split(key, size))

    def form(h, u, scores):
        del h
        z = jnp.sum(scores * u[None], axis=(1, 2)) ** power
        n = len(z)
        deviation = z - jnp.mean(z)
        variance = jnp.sum(deviation**2) / (n - 1)
        spread = jnp.mean(deviation**4) - (n - 3) / (n - 1) * variance**2
        return variance, jnp.maximum(spread, 0) / n

    variance, spread = mean_over(form, params, examples, scores)
    return SampledVariance(variance, jax.tree.map(lambda s: jnp.sqrt(s / size), spread))


@_of_inputs
def fisher_variance_i1_sampled(
    nll: NegativeLogLikelihood,
    params: Any,
    batch: Any,
    *,
    num_draws: int,
    key: jax.Array,
    **options: Any,
) -> SampledVariance:
    """V1 from draws, for any likelihood: the sample variance of the squared score.

    Unbiased, with its standard error from the fourth moment of `num_draws` >= 2 labels
    for each input. Where the variance comes from labels too rare to be drawn, both are
    too small.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> sampled = fisher_variance_i1_sampled(
        ...     lambda w, x: x @ w, gaussian(), jnp.zeros((1, 1)), jnp.ones((100, 1)),
        ...     num_draws=1000, key=jax.random.key(0),
        ... )
        >>> bool(abs(sampled.variance - 2.0) < 4 * sampled.standard_error)
        True
    """
    args = nll, params, batch, num_draws, key, options
    return _sampled(mean_over_jacobians, 2, *args)


@_of_inputs
def fisher_variance_i2_sampled(
    nll: NegativeLogLikelihood,
    params: Any,
    batch: Any,
    *,
    num_draws: int,
    key: jax.Array,
    **options: Any,
) -> SampledVariance:
    """V2 from draws: the sample variance of d^2 log p / dtheta_i^2; as V1 otherwise.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> sampled = fisher_variance_i2_sampled(
        ...     lambda w, x: x * w[None] ** 2, gaussian(), jnp.ones(1),
        ...     jnp.ones((100, 1)), num_draws=1000, key=jax.random.key(0),
        ... )
        >>> bool(abs(sampled.variance[0] - 4.0) < 4 * sampled.standard_error[0])
        True
    """
    args = nll, params, batch, num_draws, key, options
    return _sampled(mean_over_second_derivatives, 1, *args)


@_of_inputs
def fisher_variance_between_inputs(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Any:
    """Variance over the inputs of their own Fisher diagonals, exactly (divisor N).

    In two passes: where the F_n are alike, a difference of second moments is rounding.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[1.0], [2.0]]), jnp.zeros((1, 1))
        >>> print(fisher_variance_between_inputs(lambda w, x: x @ w, gaussian(), w, x))
        [[2.25]]
    """
    examples = examples_of(nll, params, batch, **options)
    form = form_of_second(nll.likelihood)
    (mean,) = mean_over_jacobians(form, params, examples)

    def squared_deviation(values):
        return (jax.tree.map(lambda f, m: (f - m) ** 2, values[0], mean),)

    return mean_over_jacobians(form, params, examples, after=squared_deviation)[0]


@_of_inputs
def fisher_variance_between_inputs_bound(
    nll: NegativeLogLikelihood, params: Any, batch: Any, **options: Any
) -> Any:
    """Upper bound of the variance over the inputs: mean_n |u|^4 lambda_max(I)^2.

    A second moment, so it is loose where the F_n are alike.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, args = jnp.array([[1.0], [2.0]]), (gaussian(), jnp.zeros((1, 1)))
        >>> print(fisher_variance_between_inputs_bound(lambda w, x: x @ w, *args, x))
        [[8.5]]
    """
    bounds = form_of_second_bounds(nll.likelihood)
    examples = examples_of(nll, params, batch, **options)

    def form(h, u):
        _, upper = bounds(h, u)
        return (upper**2,)

    return mean_over_jacobians(form, params, examples)[0]
