"""Natural gradients: with any estimated diagonal, or densely for small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_number,
    check_params,
    check_transformation,
)
from fsam_optax._common.mapped_axes import axes_of_shards, vary
from fsam_optax._common.norms import divisor, widen
from fsam_optax._fisher.labels import factor_columns, log_likelihood, score, weigh
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    NegativeLogLikelihood,
    outputs_like,
    parts_of,
    takes_model,
)
from fsam_optax._fisher.outputs import of_example, row_numbers


def scale_by_inverse_fisher(
    estimator: optax.GradientTransformation, *, damping: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradient by an estimated diagonal: the diagonal natural gradient.

        update = g / (max(F, 0) + damping)

    F is a mean, so g should be the gradient of a *mean* loss; then a
    learning rate of 1 is the natural one. With `fisher_empirical` this is not natural
    gradient descent: its steps are long where gradients are small. Where F + damping
    is 0, so is the update. A diagonal that is not finite is passed through.

    Args:
        estimator: Any estimator, or a chain that starts with one, such as
            `optax.chain(fisher_i1(...), optax.ema(0.95))`.
        damping: Added to F, >= 0, in units of F.

    Returns:
        A transformation of the gradient, uphill like the gradient: follow it by
        `optax.scale_by_learning_rate`. It hands every extra argument to the estimator,
        so `update` needs `batch=`. Its state is that of the estimator.

    Raises:
        TypeError: If estimator is no transformation.
        ValueError: If damping is a negative Python number; in `update`, if `params` is
            missing or the diagonal has not the structure of the gradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import fisher_exact, gaussian
        >>> estimator = fisher_exact(lambda w, x: x * w[None], gaussian())
        >>> optimizer = scale_by_inverse_fisher(estimator, damping=1.0)
        >>> w, x = jnp.zeros(1), jnp.array([[1.0], [3.0]])
        >>> update, _ = optimizer.update(
        ...     jnp.array([12.0]), optimizer.init(w), w, batch=(x, None)
        ... )
        >>> print(update)
        [2.]

    References:
        Amari, Natural Gradient Works Efficiently in Learning, 1998. Kunstner, Balles,
        Hennig, 2019, https://arxiv.org/abs/1905.12558 (section 3).
    """
    check_transformation("estimator", estimator, "fisher_exact(apply_fn, categorical)")
    check_number("damping", damping, 0)
    estimator = optax.with_extra_args_support(estimator)

    def scale(g, f):
        f = jnp.maximum(jnp.asarray(f, widen(f)), 0) + damping
        return jnp.where(f == 0, 0, g / jnp.where(f == 0, 1, f)).astype(g.dtype)

    def update_fn(updates, state, params=None, **extra_args):
        check_params("scale_by_inverse_fisher", params)
        diagonal, state = estimator.update(updates, state, params, **extra_args)
        check_like("the estimator's output", diagonal, "grads", updates)
        return jax.tree.map(scale, updates, diagonal), state

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)


def _mean_of_products(nll, params, batch, args, kwargs, factors, reader=None):
    """Returns the weighted mean over examples of A^T B, of shape (P, P).

    `factors(h, pull, label)` returns the rows of A and of B for one example with
    outputs h and label `(targets, present, m)`, where `pull` maps a cotangent on h to
    one on the flat parameters. `reader` is the name of what reads labels, if it does.
    """
    check_leaves(params, "params", real=True)
    call = call_of(nll, args, kwargs)
    inputs, targets, weights = parts_of(nll, batch)
    if not jax.tree.leaves(targets):
        if reader:
            raise TypeError(
                f"`{reader}` reads the labels, but the targets in `batch` are None: "
                "pass `batch=(inputs, targets)`."
            )
        targets = None
    outputs = outputs_like(nll, params, inputs, call)
    labels = weigh(nll.likelihood, outputs, targets, weights)
    # The derivatives are of the examples of this device, not summed over all.
    params = vary(params, axes_of_shards(inputs) or None)
    flat, unravel = ravel_pytree(params)

    def rows(x, row, label):
        def output(flat):
            return of_example(call, unravel(flat), (x, row))[0]

        h, pull = jax.vjp(output, flat)

        def pulled(c):
            c = jax.tree.map(lambda c, h: c.astype(h.dtype), c, h)
            return pull(c)[0].astype(widen(flat))

        return factors(h, pulled, label)

    inputs = jax.tree.map(jnp.asarray, inputs)
    rows_of_keys = row_numbers(inputs) if call.one_by_one else None
    a, b = jax.vmap(rows)(inputs, rows_of_keys, labels.of_examples)
    a = labels.examples[:, None, None] * a
    product = jnp.einsum("nkp,nkq->pq", a, b, precision="highest")
    return product / labels.divisor


@takes_model
def dense_fisher(
    nll: NegativeLogLikelihood, params: Any, batch: Any, *args: Any, **kwargs: Any
) -> jax.Array:
    """Computes the whole Fisher information matrix, for small models.

        1/D sum_n a_n J_n^T I(h_n) J_n

    Args:
        nll: A `negative_log_likelihood`, or `apply_fn, likelihood` in its place.
        params: Parameters at which to evaluate, P numbers in all.
        batch: What the loss takes; the targets may be None.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        A matrix of shape (P, P), mean over the labels, in the order of
        `jax.flatten_util.ravel_pytree(params)`. It needs memory for P^2 and for the
        pulled-back factors, K rows of P for each example.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> model, w = (lambda w, x: x @ w), jnp.ones((2, 1))
        >>> print(dense_fisher(model, gaussian(), w, (x, None)))
        [[5. 1.]
         [1. 2.]]

    References:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558 (eq. 2),
        where it is a sum over examples.
    """
    columns = factor_columns(nll.likelihood)

    def factors(h, pull, label):
        index = jnp.arange(columns.number(h))
        rows = jax.vmap(lambda i: pull(columns.column(h, label, i)))(index)
        return rows, rows

    return _mean_of_products(nll, params, batch, args, kwargs, factors)


@takes_model
def dense_empirical_fisher(
    nll: NegativeLogLikelihood, params: Any, batch: Any, *args: Any, **kwargs: Any
) -> jax.Array:
    """Computes the whole empirical Fisher matrix, for small models.

        1/D sum_n a_n g_n g_n^T                 g_n = J_n^T score(h_n, y_n)

    Not the Fisher, and no approximation of the Hessian either, unless the model is
    right and the data are many: it vanishes where the data are fitted.

    Args:
        nll: A `negative_log_likelihood`, or `apply_fn, likelihood` in its place.
        params: Parameters at which to evaluate, P numbers in all.
        batch: What the loss takes.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        A matrix of shape (P, P), mean over the labels, in the order of
        `jax.flatten_util.ravel_pytree(params)`.

    Examples:
        A line through all points: the scores are 0, and the Fisher is not.

        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> x = jnp.array([[1.0], [3.0]])
        >>> model, w = (lambda w, x: x @ w), jnp.ones((1, 1))
        >>> print(dense_empirical_fisher(model, gaussian(), w, (x, x)))
        [[0.]]
        >>> print(dense_fisher(model, gaussian(), w, (x, x)))
        [[5.]]

    References:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558 (eq. 3).
    """

    def factors(h, pull, label):
        targets, _, within = label
        row = pull(score(nll.likelihood, h, targets, within))[None]
        return row, row

    return _mean_of_products(
        nll, params, batch, args, kwargs, factors, "dense_empirical_fisher"
    )


@takes_model
def dense_ggn(
    nll: NegativeLogLikelihood, params: Any, batch: Any, *args: Any, **kwargs: Any
) -> jax.Array:
    """Computes the whole generalised Gauss-Newton matrix, for small models.

        1/D sum_n a_n J_n^T (- d^2 log p(y_n|h_n) / dh^2) J_n

    The second derivative is taken by autodiff of `log_prob`. If h are natural
    parameters, as in all likelihoods here, it does not depend on y, and the matrix is
    `dense_fisher` (for labels of one example that all weigh the same or nothing: the
    weights of a loss count once, those of scores by their squares). It is not the
    Hessian, which has the curvature of the model too.

    Args:
        nll: A `negative_log_likelihood`, or `apply_fn, likelihood` in its place.
        params: Parameters at which to evaluate, P numbers in all.
        batch: What the loss takes.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        A matrix of shape (P, P), mean over the labels, in the order of
        `jax.flatten_util.ravel_pytree(params)`. It needs memory for P^2 and for all
        Jacobians, one row of P for each output of each example.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([[1]])
        >>> ggn = jax.jit(dense_ggn, static_argnums=(0, 1))
        >>> print(ggn(lambda w, x: x @ w, bernoulli, jnp.zeros((2, 1)), (x, y)))
        [[0.25 0.5 ]
         [0.5  1.  ]]

    References:
        Kunstner, Balles, Hennig, Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558
        (proposition 1).
    """

    def factors(h, pull, label):
        targets, _, within = label
        flat, unravel = ravel_pytree(jax.tree.map(lambda h: h.astype(widen(h)), h))

        def loss(flat):
            h = unravel(flat)
            return -jnp.sum(log_likelihood(nll.likelihood, h, targets, within))

        jacobian = jax.vmap(lambda c: pull(unravel(c)))(jnp.eye(flat.size))
        hessian = jax.hessian(loss)(flat)
        return jacobian, jnp.matmul(hessian, jacobian, precision="highest")

    return _mean_of_products(nll, params, batch, args, kwargs, factors, "dense_ggn")


def scale_by_inverse_dense(
    matrix_fn: Callable[[Any, Any], jax.Array], *, damping: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Solves with a whole curvature matrix: the natural gradient of small models.

        update = (M + damping I)^-1 g                    M = matrix_fn(params, batch)

    M is symmetrised and its negative eigenvalues, which a Fisher matrix only has by
    rounding, count as 0. Directions in which M + damping I is 0 get no update.

    Args:
        matrix_fn: Returns a matrix of shape (P, P) in the order of
            `jax.flatten_util.ravel_pytree`, of a mean, such as
            `functools.partial(dense_fisher, nll)`.
        damping: Added to the diagonal, >= 0, in units of M. Rounding leaves about
            1e-7 of the largest eigenvalue in float32: damp by more where M is singular.

    Returns:
        A stateless transformation of the gradient of a *mean* loss, uphill like the
        gradient; its `update` needs `params` and `batch=(inputs, targets)`.

    Raises:
        TypeError: If matrix_fn is not callable; in `update`, if `batch` is missing.
        ValueError: If damping is a negative Python number; in `update`, if `params` is
            missing or the matrix has another shape.

    Examples:
        One natural-gradient step solves a linear least-squares problem:

        >>> import functools
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import dense_fisher, gaussian
        >>> model = lambda w, x: x @ w
        >>> x, w = jnp.array([[1.0, 2.0], [3.0, 1.0]]), jnp.zeros((2, 1))
        >>> y = x @ jnp.array([[4.0], [-1.0]])
        >>> grads = jax.grad(lambda w: jnp.mean((model(w, x) - y) ** 2) / 2)(w)
        >>> natural = scale_by_inverse_dense(
        ...     functools.partial(dense_fisher, model, gaussian()), damping=0.0
        ... )
        >>> update = jax.jit(natural.update)
        >>> step, _ = update(grads, natural.init(w), w, batch=(x, y))
        >>> print((w - step).ravel())
        [ 4. -1.]

    References:
        Amari, Natural Gradient Works Efficiently in Learning, 1998. Kunstner, Balles,
        Hennig, 2019, https://arxiv.org/abs/1905.12558 (section 3).
    """
    if not callable(matrix_fn):
        raise TypeError(
            "`matrix_fn` must be a function of (params, batch), such as "
            "`functools.partial(dense_fisher, apply_fn, likelihood)`, got "
            f"{matrix_fn!r}."
        )
    check_number("damping", damping, 0)

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, batch=None, **extra_args):
        del extra_args
        check_params("scale_by_inverse_dense", params)
        if batch is None:
            raise TypeError(
                "`scale_by_inverse_dense` needs the batch as an extra argument: "
                "`update(grads, state, params, batch=(inputs, targets))`."
            )
        g, unravel = ravel_pytree(updates)
        matrix = matrix_fn(params, batch)
        if jnp.shape(matrix) != (g.size, g.size):
            raise ValueError(
                f"`matrix_fn` must return a matrix of shape {(g.size, g.size)}, with a "
                f"row for each parameter, got {jnp.shape(matrix)}."
            )
        values, vectors = jnp.linalg.eigh(matrix)
        values = jnp.maximum(values, 0) + damping
        with jax.default_matmul_precision("highest"):
            step = vectors @ jnp.where(values > 0, vectors.T @ g / divisor(values), 0)
        return unravel(step.astype(g.dtype)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
