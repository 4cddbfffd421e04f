"""The estimator I2: minus the Hessian diagonal of the log-likelihood."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_choice, check_count
from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._common.norms import widen
from fsam_optax._engine import (
    added_up,
    apart,
    DEFAULT_CHUNK_BYTES,
    depends,
    entries,
    mappable,
    most_bytes,
    share_of,
    sum_of_products,
)
from fsam_optax._fisher.estimation import mean_powers, Problem, sampled
from fsam_optax._fisher.estimators import check_bytes, exact_cotangents, Model
from fsam_optax._fisher.labels import drawn_score
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import resolve
from fsam_optax._fisher.outputs import row_numbers


def _by_unit_vector(fn: Callable, leaf: jax.Array, budget: int) -> jax.Array:
    """Returns an array like a leaf, of what `fn` maps each of its unit vectors to.

    As many at a time as hold no more than a budget of bytes.
    """

    def entry(i):
        return fn(jnp.zeros(leaf.size, leaf.dtype).at[i].set(1).reshape(leaf.shape))

    # Half of it: what the products were linearised at is held as well.
    several = min(max(budget // (2 * most_bytes(entry, 0)), 1), 64)
    entries = jax.lax.map(entry, jnp.arange(leaf.size), batch_size=several)
    return entries.reshape(leaf.shape)


def _mean_over(fn: Callable, xs: jax.Array) -> jax.Array:
    """Returns the mean of fn(x) over xs, without stacking it."""
    first = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))
    zero = vary_like(jnp.zeros(first.shape, first.dtype), fn(xs[0]))
    total, _ = jax.lax.scan(lambda sums, x: (sums + fn(x), None), zero, xs)
    return total / len(xs)


def _curvature(
    problem: Problem,
    scores: jax.Array,
    key: jax.Array,
    exact: bool,
    num_probes: int,
    budget: int,
) -> Any:
    """Returns the Hessian diagonal of `sum(h * scores)`, one array at a time.

    Every device sums up its own examples first, however many products it takes: only
    the sums of all are exchanged.

    An array in which h is linear, or piecewise linear, while the others are held fixed
    has a Hessian that JAX knows to be zero without computing it.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, problem.params))
    examples = problem.inputs, problem.rows
    numbers = row_numbers(problem.inputs)
    spots = entries(
        lambda params, example: _as_one(problem.of_one(params, example), 0),
        problem.params,
        examples,
    )

    def block(leaf, spot, key, i):
        if not leaf.size:
            return jnp.zeros(leaf.shape, widen(leaf))
        of_device = functools.partial(of_examples, leaf, spot, key, i)
        share = share_of(examples, problem.params)
        return added_up(apart(of_device, share, [0] * 3, (examples, numbers, scores)))

    def of_examples(leaf, spot, key, i, examples, numbers, scores):
        def along(delta):
            if spot:
                h = jax.vmap(spot.onward)(delta, examples)
            else:
                moved = structure.unflatten(
                    [*leaves[:i], leaf + delta, *leaves[i + 1 :]]
                )
                one = functools.partial(problem.of_one, moved)
                h = jax.vmap(lambda x: _as_one(one(x), 0))(examples)
            return jnp.sum(h.astype(scores.dtype) * scores)

        here = jnp.zeros_like(leaf)
        if spot:
            here = jnp.zeros((len(scores), *spot.shape), spot.dtype)
        here = vary_like(here, scores)
        _, product = jax.linearize(mappable(jax.grad(along), here), here)
        if not depends(product, here):
            return jnp.zeros(leaf.shape, widen(leaf))
        if exact and not (spot and math.prod(spot.shape) < leaf.size):
            # The unit vectors of the parameters, of which there are fewer.
            def curvature(unit):
                v = unit
                if spot:
                    v = jax.vmap(functools.partial(spot.enter, unit))(examples)
                return jnp.sum((v * product(v)).astype(widen(leaf)))

            return _by_unit_vector(curvature, leaf, budget)

        def seen_along(v):
            if spot:
                return sum_of_products(spot, leaf, examples, v, product(v))
            return (v * product(v)).astype(widen(leaf))

        def signs(key):
            if spot:  # Of each example the same, whatever device it is on.
                keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
                shape = here.shape[1:]
                return jax.vmap(lambda k: jax.random.rademacher(k, shape, here.dtype))(
                    keys
                )
            return jax.random.rademacher(key, here.shape, here.dtype)

        if not exact:
            keys = jax.random.split(key, num_probes)
            return _mean_over(lambda key: seen_along(signs(key)), keys)
        # The unit vectors, each for all examples at once.
        shape = here.shape[1:]
        size = math.prod(shape)

        def unit(k):
            v = jnp.zeros(size, here.dtype).at[k].set(1).reshape(shape)
            return jnp.broadcast_to(v, here.shape)

        return size * _mean_over(lambda k: seen_along(unit(k)), jnp.arange(size))

    keys = jax.random.split(key, len(leaves)) if leaves else []
    return structure.unflatten(
        [
            block(leaf, spot, key, i)
            for i, (leaf, spot, key) in enumerate(zip(leaves, spots, keys, strict=True))
        ]
    )


def _as_one(h: Any, batch_axes: int) -> jax.Array:
    """Returns the outputs of several heads as one array, that of one as it is."""
    leaves = jax.tree.leaves(h)
    if len(leaves) == 1:
        return leaves[0]
    flat = [x.reshape(*x.shape[:batch_axes], -1) for x in leaves]
    return jnp.concatenate(flat, axis=batch_axes)


def fisher_i2(
    model: Model,
    likelihood: Likelihood | None = None,
    *,
    num_samples: int = 1,
    key: jax.Array,
    hessian: Literal["exact", "hutchinson"] = "exact",
    standard_error: bool = False,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Minus the mean Hessian diagonal of log p at labels from the model: I2.

        -1/(D S) sum_nts a_n m_nt^2 d^2 log p(y_nts|h_nt) / d params^2    y ~ p(.|h)
        = F  -  1/(D S) sum_nts a_n m_nt^2 score_nts . d^2 h_nt / d params^2

    with D, a and m as in `negative_log_likelihood`: a mean over the labels.

    It is computed by the second line. F there is `fisher_exact` and costs what that
    costs; only the sum is random, with mean 0. So I2 is unbiased but
    *may be negative* (`fisher_ellipsoid` and `scale_by_inverse_fisher` clip it at 0),
    and it is exact, with no variance, for each array of parameters in which h is
    linear or piecewise linear while the other arrays are held fixed: in the last
    layer of any model, and in every layer of a plain ReLU network. Where
    `fisher_exact` is affordable it is always the better buy: I2 adds cost and
    variance to it. I2 is here to study that variance, and to compare with `fisher_i1`.

    Derivatives are those that autodiff returns, zero at the kinks of a ReLU. If h are
    not natural parameters (a custom likelihood), the second line still is unbiased,
    but the first one may have another variance.

    Args:
        model: A `negative_log_likelihood`, or the `apply_fn` of one.
        likelihood: Its likelihood, in the second case.
        num_samples: Draws S of each label, and of the probes of "hutchinson". More
            labels cost nothing: their scores are averaged before differentiation.
        key: PRNG key of the draws. It is copied into the state and split every update.
        hessian: How to find the diagonal of d^2 h, one array of parameters at a time.
            "exact" takes one Hessian-vector product for each pre-activation of an
            example, or for each parameter if there are fewer: for small models.
            "hutchinson" takes S per array, at random signs: still unbiased, and still
            exact where the last paragraph but one says so, but elsewhere with an error
            that the entries off the diagonal bring in. The signs are put on the
            pre-activations of each example where the array enters through one product,
            convolution or look-up, or is no larger than they are; on the parameters
            themselves, with a much larger error, where it is reused (recurrence, tied
            weights) or reparametrised.
        standard_error: Whether to keep the standard error of each entry in the state,
            for the given inputs, from S draws that are then carried out one by one.
            inf for a single draw.
        chunk_bytes: Bytes that per-example gradients which have to be formed, and the
            backward passes of several cotangents, may hold on a device; see
            `power_sums`. None for what suits the platform.

    Returns:
        An estimator, called as `fisher_exact` is. The targets in `batch` are not read.

    Raises:
        TypeError: In `update`, if `batch` is missing.
        ValueError: If num_samples < 1, or `hessian` is none of the two; in `update`,
            if `params` is missing.

    Examples:
        A linear model: no second derivative, so no variance.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli, diagonal
        >>> estimator = fisher_i2(lambda w, x: x @ w, bernoulli, key=jax.random.key(0))
        >>> x = jnp.array([[1.0, 2.0]])
        >>> evaluate = jax.jit(diagonal, static_argnums=0)
        >>> print(evaluate(estimator, jnp.zeros((2, 1)), (x, None)).ravel())
        [0.25 1.  ]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (section 2 and remark 4.4). It rules I2 out
        for ReLU networks, whose Hessian does not exist everywhere; almost everywhere
        it does, and with that one I2 is exact.
    """
    check_count("num_samples", num_samples)
    check_bytes(chunk_bytes)
    check_choice("hessian", hessian, "exact", "hutchinson")
    nll = resolve("fisher_i2", model, likelihood)

    def estimate(problem, key):
        h = problem.of_all(problem.params, problem.inputs)
        _, present, within = problem.labels.of_examples
        # The curvature of a label counts as its square does: by m^2.
        shares = problem.labels.weights * within / problem.labels.divisor

        def score(key):
            drawn = drawn_score(nll.likelihood, h, key, present, shares)
            return _as_one(drawn, 1)

        def curvature(scores, key, num_probes):
            exact = hessian == "exact"
            budget = chunk_bytes or DEFAULT_CHUNK_BYTES
            return _curvature(problem, scores, key, exact, num_probes, budget)

        columns = exact_cotangents(nll.likelihood)
        (fisher,) = mean_powers(problem, columns, chunk_bytes=chunk_bytes)
        label_key, probe_key = jax.random.split(key)
        keys = jax.random.split(label_key, num_samples)
        if not standard_error:
            scores = jnp.mean(jax.lax.map(score, keys), axis=0)
            mean, error = curvature(scores, probe_key, num_samples), None
        else:
            draws = jax.lax.map(
                lambda keys: curvature(score(keys[0]), keys[1], 1),
                (keys, jax.random.split(probe_key, num_samples)),
            )
            mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), draws)
            error = jax.tree.map(_error_of_mean, draws)
        return jax.tree.map(jnp.subtract, fisher, mean), error

    return sampled("fisher_i2", nll, estimate, key, standard_error)


def _error_of_mean(draws: jax.Array) -> jax.Array:
    """Returns the standard error of the mean over the leading axis."""
    number = len(draws)
    if number == 1:
        return jnp.full(draws.shape[1:], jnp.inf, draws.dtype)
    return jnp.std(draws, axis=0, ddof=1) / number**0.5
