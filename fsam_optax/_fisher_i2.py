"""The estimator I2: minus the Hessian diagonal of the log-likelihood."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fsam_optax._checks import check_count
from fsam_optax._estimation import ApplyFn, mean_powers, sampled
from fsam_optax._fisher import exact_cotangents
from fsam_optax._likelihoods import Likelihood
from fsam_optax._norms import divisor, widen


def _exact_diagonal(product: Callable, leaf: jax.Array, key: jax.Array, _) -> jax.Array:
    """Reads the diagonal of a linear map off its products with the unit vectors."""
    del key

    def entry(i):
        unit = jnp.zeros(leaf.size, leaf.dtype).at[i].set(1)
        return product(unit.reshape(leaf.shape)).ravel()[i]

    entries = jax.lax.map(entry, jnp.arange(leaf.size), batch_size=64)
    return entries.reshape(leaf.shape)


def _probed_diagonal(
    product: Callable, leaf: jax.Array, key: jax.Array, num_probes: int
) -> jax.Array:
    """Estimates the diagonal of a linear map from products with random signs."""

    def probe(key):
        signs = jax.random.rademacher(key, leaf.shape, leaf.dtype)
        return (signs * product(signs)).astype(widen(leaf))

    return jnp.mean(jax.lax.map(probe, jax.random.split(key, num_probes)), axis=0)


def _hessian_diagonal(fn: Callable, params: Any, diagonal: Callable, key: Any) -> Any:
    """Applies `diagonal` to the Hessian of `fn` in each leaf, the others held fixed.

    A leaf in which `fn` is linear, or piecewise linear, has a Hessian that JAX knows
    to be zero without computing it, whatever the other leaves do.
    """
    leaves, structure = jax.tree.flatten(params)

    def block(i, key):
        def gradient(leaf):
            def fn_of_leaf(leaf):
                return fn(structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]]))

            return jax.grad(fn_of_leaf)(leaf)

        leaf = jnp.asarray(leaves[i])
        if not leaf.size:
            return jnp.zeros(leaf.shape, widen(leaf))
        _, product = jax.linearize(gradient, leaf)
        return diagonal(product, leaf, key).astype(widen(leaf))

    keys = jax.random.split(key, len(leaves)) if leaves else []
    return structure.unflatten([block(i, key) for i, key in enumerate(keys)])


def fisher_i2(
    apply_fn: ApplyFn,
    likelihood: Likelihood,
    *,
    num_samples: int = 1,
    key: jax.Array,
    hessian: Literal["exact", "hutchinson"] = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Minus the mean Hessian diagonal of log p at labels from the model: I2.

        -1/(N S) sum_ns d^2 log p(y_ns|h_n) / d params^2      y_ns ~ p(.|h_n)
        = 1/N sum_n J_n^T I(h_n) J_n  -  1/(N S) sum_ns score_ns . d^2 h_n / d params^2

    It is computed by the second line. The first sum there is `fisher_exact` and costs
    what that costs; only the second one is random, with mean 0. So I2 is unbiased but
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
        apply_fn: The model, `apply_fn(params, inputs) -> h` on a whole batch.
        likelihood: Distribution of the labels given h.
        num_samples: Draws S of each label, and of the probes of "hutchinson". More
            labels cost nothing: their scores are averaged before differentiation.
        key: PRNG key of the draws. It is copied into the state and split every update.
        hessian: How to find the diagonal of d^2 h, one array of parameters at a time.
            "exact" takes one Hessian-vector product per *parameter*: for small models.
            "hutchinson" takes S per array, at random signs in parameter space: still
            unbiased, and still exact where the last paragraph but one says so, but
            elsewhere with an error that the entries off the diagonal of that array's
            Hessian bring in, often much larger than the diagonal.

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
        >>> print(diagonal(estimator, jnp.zeros((2, 1)), (x, None)).ravel())
        [0.25 1.  ]

    References:
        Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix Estimators, 2024,
        https://arxiv.org/abs/2402.05379 (section 2 and remark 4.4). It rules I2 out
        for ReLU networks, whose Hessian does not exist everywhere; almost everywhere
        it does, and with that one I2 is exact.
    """
    check_count("num_samples", num_samples)
    if hessian not in ("exact", "hutchinson"):
        raise ValueError(f"`hessian` must be 'exact' or 'hutchinson', got {hessian!r}.")

    def diagonal(product, leaf, key):
        read = _exact_diagonal if hessian == "exact" else _probed_diagonal
        return read(product, leaf, key, num_samples)

    def estimate(problem, key):
        label_key, probe_key = jax.random.split(key)
        h = problem.model(problem.params, problem.inputs)

        def draw(key):
            return likelihood.score(h, likelihood.sample(key, h))

        keys = jax.random.split(label_key, num_samples)
        scores = jnp.mean(jax.lax.map(draw, keys), axis=0)
        weights = problem.weights / divisor(jnp.sum(problem.weights))
        scores = jnp.expand_dims(weights, range(1, h.ndim)) * scores

        def along_scores(params):
            h = problem.model(params, problem.inputs)
            return jnp.sum(h.astype(scores.dtype) * scores)

        (exact,) = mean_powers(problem, exact_cotangents(likelihood), None)
        curvature = _hessian_diagonal(along_scores, problem.params, diagonal, probe_key)
        return jax.tree.map(jnp.subtract, exact, curvature), None

    return sampled("fisher_i2", apply_fn, estimate, key)
