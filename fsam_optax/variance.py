"""Variances of the estimators I1 and I2, exact, bounded and sampled.

Everything here concerns *one* label drawn for *one* input. The estimate of
`fisher_i1` or `fisher_i2` from N inputs, with S labels for each, has 1/(N S) of the
variance returned. Each function materialises derivatives of all outputs with respect
to all parameters: these are for the study of small models.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import (
    check_count,
    check_leaves,
    check_like,
    check_number,
)
from fsam_optax._common.norms import widen
from fsam_optax._fisher.estimation import key_data
from fsam_optax._fisher.likelihoods import Likelihood, MomentBounds
from fsam_optax._fisher.negative_log_likelihood import resolve


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


def _outputs(apply_fn, params, x):
    """Returns the outputs for one example, as (T, C) with T positions."""
    h = apply_fn(params, jax.tree.map(lambda x: x[None], x))[0]
    return h.reshape(-1, h.shape[-1]).astype(widen(h))


def _examples(inputs):
    """Returns the inputs as arrays, after checking that they hold examples."""
    check_leaves(inputs, "inputs", data=True)
    leaves, structure = jax.tree.flatten(inputs)
    sizes = {jnp.shape(x)[:1] for x in leaves}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "`inputs` must be arrays whose leading axes count the examples, one or "
            f"more, got shapes {[jnp.shape(x) for x in leaves]}."
        )
    return structure.unflatten([jnp.asarray(x) for x in leaves])


def _mean_over_jacobians(form, apply_fn, params, inputs, *extra):
    """Returns the mean over examples of `form(h, dh/dtheta_i, *extra)` for every i.

    Args:
        form: Maps outputs (T, C), a direction (T, C) and one entry of each array in
            `extra` to a tuple of scalars.
        apply_fn: The model.
        params: Its parameters.
        inputs: Inputs of N examples.
        *extra: Arrays whose leading axes count the examples.

    Returns:
        A tuple of trees with the structure of params.
    """
    inputs = _examples(inputs)

    def share(example):
        x, *rest = example
        h = _outputs(apply_fn, params, x)
        jacobian = jax.jacrev(_outputs, argnums=1)(apply_fn, params, x)

        def entries(w, rows):
            directions = rows.reshape(h.size, -1).T.reshape(-1, *h.shape)
            values = jax.vmap(lambda u: form(h, u, *rest))(directions)
            return tuple(v.reshape(jnp.shape(w)) for v in values)

        return jax.tree.map(entries, params, jacobian)

    def add(total, example):
        return jax.tree.map(jnp.add, total, share(example)), None

    examples = (inputs, *extra)
    size = len(jax.tree.leaves(inputs)[0])
    first = jax.tree.map(lambda x: x[0], examples)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(share, first)
    )
    total, _ = jax.lax.scan(add, zero, examples)
    return _unzip(params, jax.tree.map(lambda x: x / size, total))


def _mean_over_second_derivatives(form, apply_fn, params, inputs, *extra):
    """Returns the mean of `form(h, d^2h/dtheta_i^2, *extra)`; otherwise as above."""
    inputs = _examples(inputs)
    leaves, structure = jax.tree.flatten(params)
    all_outputs = jax.vmap(lambda p, x: _outputs(apply_fn, p, x), (None, 0))
    h = all_outputs(params, inputs)

    def entries(i, w):
        def model(leaf):
            return all_outputs(
                structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]]), inputs
            )

        def entry(j):
            unit = jnp.zeros(w.size, w.dtype).at[j].set(1).reshape(w.shape)

            def slope(w):
                return jax.jvp(model, (w,), (unit,))[1]

            _, curvature = jax.jvp(slope, (w,), (unit,))
            values = jax.vmap(form)(h, curvature, *extra)
            return tuple(jnp.mean(v) for v in values)

        values = jax.lax.map(entry, jnp.arange(w.size), batch_size=64)
        return tuple(v.reshape(w.shape) for v in values)

    pairs = [entries(i, jnp.asarray(w)) for i, w in enumerate(leaves)]
    return _unzip(params, structure.unflatten(pairs))


def _unzip(params, tuples):
    """Turns a tree of tuples into a tuple of trees."""
    structure = jax.tree.structure(params)
    columns = zip(*structure.flatten_up_to(tuples), strict=True)
    return tuple(structure.unflatten(column) for column in columns)


def _moment(likelihood: Likelihood, h: jax.Array, u: jax.Array) -> jax.Array:
    """Returns u^T I(h|x) u for each position."""
    rows = jnp.einsum("tck,tc->tk", likelihood.factor(h), u, precision="highest")
    return jnp.sum(rows**2, axis=-1)


def _sum_of_fourth(fourth, second):
    """Combines positions: E[(sum_t z_t)^4] - E[(sum_t z_t)^2]^2 for independent z_t.

    Args:
        fourth: E[z_t^4] - E[z_t^2]^2.
        second: E[z_t^2].
    """
    # Fourth cumulants, E[z^4] - 3 E[z^2]^2, add up.
    value = jnp.sum(fourth - 2 * second**2) + 2 * jnp.sum(second) ** 2
    return jnp.maximum(value, 0)


def _fourth_moment(likelihood: Likelihood) -> Callable:
    if likelihood.fourth_moment is None:
        raise ValueError("`likelihood` must define `fourth_moment` to know this.")
    return likelihood.fourth_moment


def _bounds(likelihood: Likelihood) -> Callable[[jax.Array], MomentBounds]:
    if likelihood.bounds is None:
        raise ValueError("`likelihood` must define `bounds` to know this.")
    return likelihood.bounds


def fisher_variance_i1(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Any:
    """Variance of I1 over the labels: the fourth moment of the score, exactly.

        V1 = mean_n  u^a u^b u^c u^d (K_abcd - I_ab I_cd)         u = dh_n / dtheta_i

    I is the covariance of the score d log p / dh under the model and K its tensor of
    fourth moments.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h; needs `fourth_moment`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        For every parameter, the variance of one squared score at one input, averaged
        over the inputs; structure of params. The variance of `fisher_i1` on these
        inputs is 1/(N num_samples) of that.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> model, x = (lambda w, x: x * w[None]), jnp.array([[2.0]])

        At p = 1/2 the squared score is the same for both labels, elsewhere not:

        >>> print(fisher_variance_i1(model, bernoulli, jnp.zeros(1), x))
        [0.]
        >>> print(fisher_variance_i1(model, bernoulli, jnp.ones(1), x))
        [0.98]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (lemma 3.1).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    fourth_moment = _fourth_moment(likelihood)

    def form(h, u):
        second = _moment(likelihood, h, u)
        return (_sum_of_fourth(fourth_moment(h, u) - second**2, second),)

    return _mean_over_jacobians(form, apply_fn, params, inputs)[0]


def fisher_variance_i2(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Any:
    """Variance of I2 over the labels: a second moment of the score, exactly.

        V2 = mean_n  u^a u^b I_ab                          u = d^2 h_n / dtheta_i^2

    Zero for every parameter in which h is linear or piecewise linear (derivatives are
    those of autodiff): in the last layer, and throughout a plain ReLU network. It
    takes two nested forward-mode derivatives for every parameter.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch. It must
            have forward-mode derivatives, which `jax.custom_vjp` has not.
        likelihood: Distribution of the labels given h.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        For every parameter, the variance of one d^2 log p / dtheta^2 at one input,
        averaged over the inputs; structure of params. The variance of `fisher_i2` on
        these inputs, with its exact Hessian, is 1/(N num_samples) of that.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> model, x = (lambda w, x: x * w[None] ** 2), jnp.array([[3.0]])
        >>> print(fisher_variance_i2(model, gaussian(), jnp.ones(1), x))
        [36.]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (lemma 3.1).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)

    def form(h, u):
        return (jnp.sum(_moment(likelihood, h, u)),)

    return _mean_over_second_derivatives(form, apply_fn, params, inputs)[0]


def fisher_bounds(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Bounds:
    """Bounds of the Fisher diagonal by the eigenvalues of I(h|x).

        mean_n |u|^2 lambda_min(I)  <=  F  <=  mean_n |u|^2 lambda_max(I)
        u = dh_n / dtheta_i

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h; needs `bounds`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        Bounds of what `fisher_exact` computes on these inputs. The lower ones are 0
        for `categorical`, whose I has a null vector.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import poisson
        >>> x, w = jnp.array([[1.0]]), jnp.zeros((1, 2))
        >>> print(*fisher_bounds(lambda w, x: x @ w, poisson, w, x))
        [[1. 1.]] [[1. 1.]]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (theorem 4.1).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    return Bounds(
        *_mean_over_jacobians(_second_bounds(likelihood), apply_fn, params, inputs)
    )


def _second_bounds(likelihood):
    bounds = _bounds(likelihood)

    def form(h, u):
        b, squares = bounds(h), jnp.sum(u**2, axis=-1)
        return jnp.sum(b.fisher_min * squares), jnp.sum(b.fisher_max * squares)

    return form


def fisher_variance_i1_bounds(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Bounds:
    """Bounds of V1 by the extreme values of the fourth-moment form.

        mean_n |u|^4 min_M  <=  V1  <=  mean_n |u|^4 max_M        u = dh_n / dtheta_i

    min_M and max_M are over unit vectors v of v^a v^b v^c v^d (K_abcd - I_ab I_cd),
    from `likelihood.bounds`: both 2 / scale^4 for `gaussian`, at most 2 m with
    m = min(max p, 1 - |p|^2) for `categorical`. (Over several positions, with the
    products between them.)

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h; needs `bounds`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        Bounds of what `fisher_variance_i1` computes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[2.0]]), jnp.zeros((1, 1))
        >>> print(*fisher_variance_i1_bounds(lambda w, x: x @ w, gaussian(), w, x))
        [[32.]] [[32.]]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (theorem 4.1, corollary 4.2, theorem 5.2).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    bounds = _bounds(likelihood)

    def form(h, u):
        b, squares = bounds(h), jnp.sum(u**2, axis=-1)
        return tuple(
            _sum_of_fourth(fourth * squares**2, second * squares)
            for fourth, second in (
                (b.fourth_min, b.fisher_min),
                (b.fourth_max, b.fisher_max),
            )
        )

    return Bounds(*_mean_over_jacobians(form, apply_fn, params, inputs))


def fisher_variance_i2_bounds(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Bounds:
    """Bounds of V2 by the eigenvalues of I(h|x).

        mean_n |u|^2 lambda_min(I)  <=  V2  <=  mean_n |u|^2 lambda_max(I)
        u = d^2 h_n / dtheta_i^2

    Args:
        apply_fn: The model, as in `fisher_variance_i2`.
        likelihood: Distribution of the labels given h; needs `bounds`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        Bounds of what `fisher_variance_i2` computes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> w, x = jnp.ones(1), jnp.array([[3.0]])
        >>> model = lambda w, x: x * w[None] ** 2
        >>> print(*fisher_variance_i2_bounds(model, gaussian(), w, x))
        [36.] [36.]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (theorem 4.1).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    form = _second_bounds(likelihood)
    return Bounds(*_mean_over_second_derivatives(form, apply_fn, params, inputs))


def fisher_variance_trace_bounds(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> TraceBounds:
    """Upper bounds of whole traces, for each array of parameters.

        tr F <= mean_n sum_i |u_i|^2 lambda_max      u_i = dh_n / dtheta_i
        tr V1 <= mean_n sum_i |u_i|^4 max_M
        tr V2 <= mean_n sum_i |d^2 h_n / dtheta_i^2|^2 lambda_max

    Args:
        apply_fn: The model, as in `fisher_variance_i2`.
        likelihood: Distribution of the labels given h; needs `bounds`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.

    Returns:
        One scalar for each leaf of params: compare i1 with i2 to choose the estimator
        of a layer, or add them up over layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[1.0, 2.0]]), jnp.zeros((2, 1))
        >>> bounds = fisher_variance_trace_bounds(lambda w, x: x @ w, gaussian(), w, x)
        >>> print(bounds.fisher, bounds.i1, bounds.i2)
        5.0 34.0 0.0

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (sums of theorem 4.1 over the entries).
    """
    bounds = (fisher_bounds, fisher_variance_i1_bounds, fisher_variance_i2_bounds)
    return TraceBounds(
        *(
            jax.tree.map(jnp.sum, bound(apply_fn, likelihood, params, inputs).upper)
            for bound in bounds
        )
    )


def _draw_scores(apply_fn, likelihood, params, inputs, num_draws, key):
    """Returns scores of labels drawn from the model, of shape (N, num_draws, T, C)."""
    inputs = _examples(inputs)
    check_count("num_draws", num_draws)
    if num_draws < 2:
        raise ValueError(f"`num_draws` must be at least 2, got {num_draws}.")

    def draw(x, key):
        h = _outputs(apply_fn, params, x)
        keys = jax.random.split(key, num_draws)
        return jax.vmap(lambda k: likelihood.score(h, likelihood.sample(k, h)))(keys)

    key_data(key)  # Raises on anything but a key.

    size = len(jax.tree.leaves(inputs)[0])
    return jax.vmap(draw)(inputs, jax.random.split(key, size))


def _sample_variance(power):
    """Returns a form: variance of (u . score)^power, and the variance of that."""

    def form(h, u, scores):
        del h
        z = jnp.sum(scores * u[None], axis=(1, 2)) ** power
        n = len(z)
        deviation = z - jnp.mean(z)
        variance = jnp.sum(deviation**2) / (n - 1)
        spread = jnp.mean(deviation**4) - (n - 3) / (n - 1) * variance**2
        return variance, jnp.maximum(spread, 0) / n

    return form


def _with_standard_error(moments, inputs):
    variance, spread = moments
    size = len(jax.tree.leaves(inputs)[0])
    return SampledVariance(variance, jax.tree.map(lambda s: jnp.sqrt(s / size), spread))


def fisher_variance_i1_sampled(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: Any,
    inputs: Any,
    *,
    num_draws: int,
    key: jax.Array,
) -> SampledVariance:
    """V1 from draws, for any likelihood: the sample variance of the squared score.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.
        num_draws: Labels drawn for each input, >= 2.
        key: PRNG key of the draws.

    Returns:
        An unbiased estimate of what `fisher_variance_i1` computes, and its standard
        error, itself estimated from the fourth moment of the draws. Where the variance
        comes from labels too rare to be drawn, both are too small.

    Raises:
        ValueError: If num_draws < 2.

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
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    scores = _draw_scores(apply_fn, likelihood, params, inputs, num_draws, key)
    moments = _mean_over_jacobians(
        _sample_variance(2), apply_fn, params, inputs, scores
    )
    return _with_standard_error(moments, inputs)


def fisher_variance_i2_sampled(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: Any,
    inputs: Any,
    *,
    num_draws: int,
    key: jax.Array,
) -> SampledVariance:
    """V2 from draws: the sample variance of d^2 log p / dtheta_i^2.

    Args:
        apply_fn: The model, as in `fisher_variance_i2`.
        likelihood: Distribution of the labels given h.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples.
        num_draws: Labels drawn for each input, >= 2.
        key: PRNG key of the draws.

    Returns:
        An unbiased estimate of what `fisher_variance_i2` computes, and its standard
        error, itself estimated from the fourth moment of the draws.

    Raises:
        ValueError: If num_draws < 2.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> sampled = fisher_variance_i2_sampled(
        ...     lambda w, x: x * w[None] ** 2,
        ...     gaussian(),
        ...     jnp.ones(1),
        ...     jnp.ones((100, 1)),
        ...     num_draws=1000, key=jax.random.key(0),
        ... )
        >>> bool(abs(sampled.variance[0] - 4.0) < 4 * sampled.standard_error[0])
        True
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    scores = _draw_scores(apply_fn, likelihood, params, inputs, num_draws, key)
    moments = _mean_over_second_derivatives(
        _sample_variance(1), apply_fn, params, inputs, scores
    )
    return _with_standard_error(moments, inputs)


def fisher_variance_between_inputs(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Any:
    """Variance over the inputs of their own Fisher diagonals, exactly.

        Var_n(F_n)              F_n = u^T I(h_n) u,  u = dh_n / dtheta_i

    This part of the error is common to I1 and I2: no number of labels lowers it.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples, taken as the whole population.

    Returns:
        The variance for every parameter (with divisor N); structure of params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[1.0], [2.0]]), jnp.zeros((1, 1))
        >>> print(fisher_variance_between_inputs(lambda w, x: x @ w, gaussian(), w, x))
        [[2.25]]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (theorem 4.7).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)

    def form(h, u):
        fisher = jnp.sum(_moment(likelihood, h, u))
        return fisher, fisher**2

    moments = _mean_over_jacobians(form, apply_fn, params, inputs)
    return jax.tree.map(lambda m, s: jnp.maximum(s - m**2, 0), *moments)


def fisher_variance_between_inputs_bound(
    apply_fn: Callable, likelihood: Likelihood, params: Any, inputs: Any
) -> Any:
    """Upper bound of the variance over the inputs, by the eigenvalues of I(h|x).

        Var_n(F_n)  <=  mean_n |u|^4 lambda_max(I)^2          u = dh_n / dtheta_i

    A second moment, so it is loose where the F_n are alike.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h; needs `bounds`.
        params: Parameters at which to evaluate.
        inputs: Inputs of N examples, taken as the whole population.

    Returns:
        A bound of `fisher_variance_between_inputs`; structure of params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x, w = jnp.array([[1.0], [2.0]]), jnp.zeros((1, 1))
        >>> print(
        ...     fisher_variance_between_inputs_bound(
        ...         lambda w, x: x @ w, gaussian(), w, x
        ...     )
        ... )
        [[8.5]]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (lemma 4.8).
    """
    resolve("fisher_variance", apply_fn, likelihood)
    check_leaves(params, "params", real=True)
    bounds = _second_bounds(likelihood)

    def form(h, u):
        _, upper = bounds(h, u)
        return (upper**2,)

    return _mean_over_jacobians(form, apply_fn, params, inputs)[0]


def fisher_variance_joint(
    conditional: Any,
    between_inputs: Any,
    *,
    num_inputs: jax.typing.ArrayLike,
    num_samples: jax.typing.ArrayLike = 1,
) -> Any:
    """Variance of an estimator whose inputs are drawn at random too.

        (Var(F_n) + V / num_samples) / num_inputs

    Args:
        conditional: V, from `fisher_variance_i1` or `fisher_variance_i2`, their
            bounds, or their sampled versions.
        between_inputs: Var(F_n), from `fisher_variance_between_inputs`.
        num_inputs: Inputs drawn, independently, for an estimate.
        num_samples: Labels drawn for each of them.

    Returns:
        The variance for every parameter; structure of params.

    Examples:
        >>> print(fisher_variance_joint(8.0, 2.0, num_inputs=2, num_samples=4))
        2.0

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (theorem 4.7).
    """
    check_like("between_inputs", between_inputs, "conditional", conditional)
    for name, count in (("num_inputs", num_inputs), ("num_samples", num_samples)):
        if not hasattr(count, "dtype"):
            check_number(name, count, 0, open=True)
    return jax.tree.map(
        lambda v, b: (b + v / num_samples) / num_inputs, conditional, between_inputs
    )


def prefer(
    labels: Any | Callable[[Any], Any], variance_i1: Any, variance_i2: Any
) -> dict[Hashable, Literal["i1", "i2"]]:
    """Says for each group of parameters which of I1 and I2 varies less.

    Compares the sums over each group. The variances may be exact, upper bounds or
    sampled ones, but both of one kind. It says nothing of cost: I2 needs second
    derivatives.

    Args:
        labels: Tree of labels that is a prefix of the parameters, or a function of a
            tree with their structure that returns one; as in `by_group`.
        variance_i1: Variances of I1; structure of params.
        variance_i2: Variances of I2; structure of params.

    Returns:
        "i1" or "i2" for each label; "i2" if the sums are equal. Not under `jax.jit`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import by_group, fisher_i1, fisher_i2, gaussian
        >>> def model(params, x):
        ...     return (x * params["body"][None]) ** 3 * params["head"][None]
        >>> params, x = {"body": jnp.ones(1), "head": jnp.ones(1)}, jnp.ones((4, 1))
        >>> names = {"body": "body", "head": "head"}
        >>> args = (model, gaussian(), params, x)
        >>> best = prefer(names, fisher_variance_i1(*args), fisher_variance_i2(*args))
        >>> print(best)
        {'body': 'i2', 'head': 'i2'}
        >>> estimators = {
        ...     "i1": fisher_i1(model, gaussian(), key=jax.random.key(0)),
        ...     "i2": fisher_i2(model, gaussian(), key=jax.random.key(0)),
        ... }
        >>> estimator = by_group(names, {k: estimators[v] for k, v in best.items()})

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (section 4).
    """
    check_like("variance_i2", variance_i2, "variance_i1", variance_i1)
    labels = labels(variance_i1) if callable(labels) else labels
    excess: dict[Hashable, float] = {}  # Of I1 over I2.

    def add(label, *subtrees):
        i1, i2 = (
            sum(float(jnp.sum(x)) for x in jax.tree.leaves(tree)) for tree in subtrees
        )
        excess[label] = excess.get(label, 0.0) + i1 - i2

    try:
        jax.tree.map(add, labels, variance_i1, variance_i2)
    except ValueError as error:
        raise ValueError(
            "`labels` must have the structure of the parameters, or of their upper "
            f"levels: {error}"
        ) from error
    return {label: "i1" if value < 0 else "i2" for label, value in excess.items()}
