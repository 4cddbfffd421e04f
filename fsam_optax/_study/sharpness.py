"""Measures of sharpness: the rise of the loss in a ball, the change of the output."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_count,
    check_function,
    check_leaves,
    check_like,
    check_params,
    check_transformation,
    leaf_shape,
)
from fsam_optax._common.displacement import displace
from fsam_optax._common.norms import widen
from fsam_optax._fisher.labels import Labels, weigh
from fsam_optax._fisher.likelihoods import factor_product, Likelihood
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    NegativeLogLikelihood,
    parts_of,
    takes_model,
)
from fsam_optax._fisher.outputs import check_outputs, of_batch


def _scalar(loss: Any) -> jax.Array:
    if leaf_shape(loss) != ():
        raise TypeError(
            "`loss_fn` must return a scalar loss, got "
            f"{getattr(loss, 'shape', type(loss).__name__)}."
        )
    return jnp.asarray(loss, widen(loss))


def sharpness(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    perturbation: optax.GradientTransformation,
    steps: int = 1,
    **extra_args: Any,
) -> jax.Array:
    """Rise of the loss within the ball of a perturbation, at given parameters.

        steps = 1:  loss(w + eps) - loss(w)             eps = perturbation(grad loss(w))
        more:       eps <- eps + s (perturbation(grad loss(w + eps)) - eps)

    The perturbation returns the point of its ball that is farthest along a gradient:
    this is the Frank-Wolfe ascent, which stays in any convex ball without a projection
    or a norm. It starts at eps = 0 with s = 1, halves s where the loss would not rise
    and doubles it, up to 1, where it did. On a convex loss no full step ever falls.

    Only a lower bound of the sharpness that its name promises, the largest rise in the
    ball: the ascent may end in another local maximum. Not comparable between
    geometries, nor, with a ball that is not adapted to them, between networks that
    differ by a rescaling of their weights.

    Args:
        loss_fn: `loss_fn(params, batch)` returns a scalar.
        params: Parameters w at which to evaluate.
        batch: What goes to `loss_fn`, and to the perturbation as `batch`.
        perturbation: Any map from a gradient to eps, such as `euclidean_ball(0.05)`,
            from a fresh state in each step: a schedule of rho gives its first value,
            and an estimator that draws labels draws the same ones. Its T is that at w;
            only an estimator that reads the gradient, `squared_gradient`, would turn
            the ball from step to step: with several steps give its output at w to
            `given()` by `fisher=` instead. That also saves estimators their repetition.
        steps: Points of the ball to try, a Python number; each costs a gradient.
        **extra_args: Passed on to the perturbation.

    Returns:
        A scalar, float32 or wider. With one step, the `sharpness` that `value_and_grad`
        measures, which is negative where eps leads too far. With more, the rise at the
        highest point seen: never below 0 nor below that of one step, and never falling
        with `steps`; points where the loss is NaN are passed over. 0 if the gradient
        is not finite, NaN if the loss at w is not.

    Raises:
        TypeError: If loss_fn is no function or returns no scalar, or perturbation is no
            transformation.
        ValueError: If steps < 1.

    Examples:
        Where the loss is quadratic, the gradient at 0 misses the steepest direction:

        >>> import jax.numpy as jnp
        >>> from fsam_optax import euclidean_ball
        >>> def loss_fn(w, batch):
        ...     return w[0] + 0.01 * w[1] + jnp.sum(batch * w**2)
        >>> w, batch = jnp.zeros(2), jnp.array([0.0, 20.0])
        >>> print(sharpness(loss_fn, w, batch, euclidean_ball(0.5)))
        0.5005
        >>> print(sharpness(loss_fn, w, batch, euclidean_ball(0.5), steps=20).round(3))
        5.017

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412. Frank, Wolfe,
        An Algorithm for Quadratic Programming, 1956.
    """
    check_function("loss_fn", loss_fn)
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    check_count("steps", steps)
    check_params("sharpness", params)
    check_leaves(params, "params", real=True)
    # Without weak types, so that the loop keeps the dtypes it starts with.
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.asarray(w).dtype), params)
    ascend = optax.with_extra_args_support(perturbation)
    start = ascend.init(params)

    def loss_at(eps):
        return _scalar(loss_fn(displace(params, eps, None), batch))

    def farthest(grads):
        eps, _ = ascend.update(grads, start, params, batch=batch, **extra_args)
        return eps

    def clean_loss(params):
        return _scalar(loss_fn(params, batch))

    loss, grads = jax.value_and_grad(clean_loss)(params)
    eps = farthest(grads)
    if operator.index(steps) == 1:
        return loss_at(eps) - loss

    def climb(_, carry):
        eps, target, highest, size = carry
        candidate = jax.tree.map(lambda e, t: e + size * (t - e), eps, target)
        value, grads = jax.value_and_grad(loss_at)(candidate)
        rises = value > highest
        eps, target = jax.tree.map(
            lambda new, old: jnp.where(rises, new, old),
            (candidate, farthest(grads)),
            (eps, target),
        )
        size = jnp.where(rises, jnp.minimum(2 * size, 1), size / 2)
        return eps, target, jnp.where(rises, value, highest), size

    origin = jax.tree.map(jnp.zeros_like, eps)
    carry = (origin, eps, loss, jnp.ones([], widen()))
    _, _, highest, _ = jax.lax.fori_loop(0, operator.index(steps), climb, carry)
    return highest - loss


def _widened(params, eps):
    """Returns params and eps in one dtype for each leaf, float32 or wider."""
    check_leaves(params, "params", real=True)
    check_like("eps", eps, "params", params)
    params, eps = (
        jax.tree.map(lambda x, w, e: jnp.asarray(x, widen(w, e)), tree, params, eps)
        for tree in (params, eps)
    )
    return params, eps


def _outputs_and_labels(nll, params, eps, batch, args, kwargs):
    """Returns the outputs as a function of the parameters, and the labels."""
    call = call_of(nll, args, kwargs)
    inputs, targets, weights = parts_of(nll, batch)

    def outputs(params):
        h, _ = of_batch(call, params, inputs)
        check_outputs(h, nll.likelihood, inputs)
        return jax.tree.map(lambda x: jnp.asarray(x, widen(x)), h)

    targets = targets if jax.tree.leaves(targets) else None

    def labels(h):
        return weigh(nll.likelihood, h, targets, weights)

    return outputs, labels


def _mean_over_labels(values: jax.Array, labels: Labels) -> jax.Array:
    w = labels.weights
    return jnp.sum(jnp.where(w == 0, 0, w * values)) / labels.divisor


def _where_present(labels: Labels, tree: Any, otherwise: Any) -> Any:
    """Returns `otherwise` at the labels that are absent beside others."""
    if labels.present is None:
        return tree
    return jax.tree.map(
        lambda here, x, y: jnp.where(here == 0, y, x), labels.present, tree, otherwise
    )


def _divergence(likelihood: Likelihood, before: Any, after: Any) -> jax.Array:
    if likelihood.divergence is not None:
        return likelihood.divergence(before, after)
    # Any possible labels, of the kind of key that every sampler takes.
    y = likelihood.sample(jax.random.key(0, impl="threefry2x32"), before)
    first_order = jax.tree.map(
        lambda s, h, k: jnp.sum((k - h) * s, axis=-1),
        likelihood.score(before, y),
        before,
        after,
    )
    change = likelihood.log_prob(before, y) - likelihood.log_prob(after, y)
    return change + sum(jax.tree.leaves(first_order))


@functools.partial(takes_model, inputs_only=True)
def kl_divergence(
    nll: NegativeLogLikelihood,
    params: Any,
    eps: Any,
    batch: Any,
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """Mean divergence of the predictions at w + eps from those at w.

        1/D sum_nt w_nt KL(p(. | h_nt) || p(. | h'_nt))    h, h': outputs at w, w + eps

    D is the sum of the weights, as in the loss. The labels of the data have no part in
    it, but for those that are absent. Unlike its prediction `kl_divergence_quadratic`,
    it is exact for an eps of any length.

    Args:
        nll: A `negative_log_likelihood`; or `apply_fn, likelihood` in its place, and
            then the inputs in the place of `batch`. A likelihood of one's own without
            `divergence` must be an exponential family with h its natural parameter:
            log p(y|h) - log p(y|h') + (h' - h) . score(h, y) then is the same for all.
        params: Parameters w.
        eps: Perturbation, with the structure of params.
        batch: What the loss takes; the targets may be None.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        A scalar in nats per label, float32 or wider. w + eps is formed in float32 or
        wider, whatever the dtype of params. In float32, the divergence of one label is
        uncertain by about 1e-7 of its log-probabilities, and may come out below 0.

    Raises:
        ValueError: If eps differs from params in structure or shape.
        TypeError: If nll is neither of the two, or a leaf of params does not hold real
            numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> model, x = (lambda w, x: x @ w), jnp.array([[1.0, 2.0], [3.0, 0.0]])
        >>> w, eps = jnp.ones((2, 1)), jnp.array([[1.0], [0.0]])
        >>> print(kl_divergence(model, gaussian(), w, eps, x))  # (1 + 9) / 4
        2.5

    References:
        Banerjee, Merugu, Dhillon, Ghosh, Clustering with Bregman Divergences, 2005
        (the divergence in an exponential family is the Bregman divergence of the
        log-normaliser).
    """
    params, eps = _widened(params, eps)
    outputs, labels_of = _outputs_and_labels(nll, params, eps, batch, args, kwargs)
    before = outputs(params)
    after = outputs(jax.tree.map(jnp.add, params, eps))
    labels = labels_of(before)
    after = _where_present(labels, after, before)
    return _mean_over_labels(_divergence(nll.likelihood, before, after), labels)


@functools.partial(takes_model, inputs_only=True)
def kl_divergence_quadratic(
    nll: NegativeLogLikelihood,
    params: Any,
    eps: Any,
    batch: Any,
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """Predicts `kl_divergence` by the whole Fisher information F, not its diagonal.

        1/2 eps^T F eps = 1/(2D) sum_nt w_nt |B_nt^T J_nt eps|^2      B B^T = I(h_nt)

    The second-order term of the divergence at eps = 0, from one forward-mode
    derivative; F is never formed. Equal to the divergence for a `gaussian` of linear
    h, and close to it only where eps moves the outputs by little.

    Args:
        nll: A `negative_log_likelihood`; or `apply_fn, likelihood` in its place, and
            then the inputs in the place of `batch`. The model must have forward-mode
            derivatives, which `jax.custom_vjp` has not.
        params: Parameters w.
        eps: Perturbation, with the structure of params.
        batch: What the loss takes; the targets may be None.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        A scalar in nats per label, float32 or wider.

    Raises:
        ValueError: If eps differs from params in structure or shape.
        TypeError: If nll is neither of the two, or a leaf of params does not hold real
            numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> model, x, w = (lambda w, x: x @ w), jnp.array([[2.0]]), jnp.zeros((1, 1))
        >>> eps = jnp.array([[0.5]])
        >>> print(kl_divergence_quadratic(model, bernoulli, w, eps, x))  # p (1-p) / 2
        0.125
        >>> print(kl_divergence(model, bernoulli, w, eps, x))
        0.1201145

    References:
        Kim, Li, Hu, Hospedales, Fisher SAM: Information Geometry and Sharpness Aware
        Minimisation, 2022, https://arxiv.org/abs/2206.04920.
    """
    params, eps = _widened(params, eps)
    outputs, labels_of = _outputs_and_labels(nll, params, eps, batch, args, kwargs)
    h, change = jax.jvp(outputs, (params,), (eps,))
    labels = labels_of(h)
    change = _where_present(labels, change, jax.tree.map(jnp.zeros_like, change))
    factors = jax.eval_shape(nll.likelihood.factor, h)
    pull = jax.linear_transpose(
        lambda v: factor_product(nll.likelihood, h, v),
        jax.tree.map(
            lambda f: jax.ShapeDtypeStruct((*f.shape[:-2], f.shape[-1]), f.dtype),
            factors,
        ),
    )
    (rows,) = pull(change)
    squares = [jnp.sum(jnp.square(r), axis=-1) for r in jax.tree.leaves(rows)]
    return _mean_over_labels(sum(squares[1:], squares[0]), labels) / 2


def _losses(loss_fn, params, directions, lengths):
    """Returns the loss at w + sum of lengths x directions, for each row of lengths."""
    check_function("loss_fn", loss_fn)
    check_leaves(params, "params", real=True)
    for name, direction in directions.items():
        check_like(name, direction, "params", params)

    def loss_at(row):
        def along(*leaves):
            return sum(
                length * jnp.asarray(d, widen(d))
                for length, d in zip(row, leaves, strict=True)
            )

        eps = jax.tree.map(along, *directions.values())
        return _scalar(loss_fn(displace(params, eps, None)))

    return jax.lax.map(loss_at, lengths)


def loss_along(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    direction: Any,
    alphas: jax.typing.ArrayLike,
) -> jax.Array:
    """Evaluates the loss along a line: loss(w + alpha d) for every alpha.

    One point after the other, in the memory of one evaluation.

    Args:
        loss_fn: `loss_fn(params)` returns a scalar; close it over a batch.
        params: Parameters w.
        direction: The direction d, with the structure of params, of any length.
        alphas: Where to evaluate, in lengths of d; any shape.

    Returns:
        The losses, of the shape of alphas, float32 or wider. w + alpha d is formed in
        float32 or wider and rounded to the dtypes of params.

    Raises:
        ValueError: If direction differs from params in structure or shape.
        TypeError: If loss_fn is no function or returns no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> w, d = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
        >>> print(loss_along(lambda w: jnp.sum(w**2), w, d, jnp.arange(3)))
        [ 1.  5. 17.]
    """
    alphas = jnp.asarray(alphas, widen(alphas))
    losses = _losses(loss_fn, params, {"direction": direction}, alphas.reshape(-1, 1))
    return losses.reshape(alphas.shape)


def loss_over_plane(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    first: Any,
    second: Any,
    alphas: jax.typing.ArrayLike,
    betas: jax.typing.ArrayLike,
) -> jax.Array:
    """Evaluates the loss over a plane: loss(w + alpha d + beta e) on a grid.

    Directions are taken as they are. Those of `random_direction` have the lengths of
    the filters, so that networks which differ by a rescaling can be compared.

    Args:
        loss_fn: `loss_fn(params)` returns a scalar; close it over a batch.
        params: Parameters w.
        first: The direction d, with the structure of params.
        second: The direction e, with the structure of params.
        alphas: Lengths along d, of shape (A,).
        betas: Lengths along e, of shape (B,).

    Returns:
        The losses, of shape (A, B), float32 or wider; `matplotlib` wants the
        transpose to have alpha run across. One evaluation at a time.

    Raises:
        ValueError: If a direction differs from params in structure or shape.
        TypeError: If loss_fn is no function or returns no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> def loss(w):
        ...     return w[0] ** 2 + 10 * w[1]
        >>> w, (d, e) = jnp.zeros(2), jnp.eye(2)
        >>> print(loss_over_plane(loss, w, d, e, jnp.array([0.0, 3.0]), jnp.arange(2)))
        [[ 0. 10.]
         [ 9. 19.]]

    References:
        Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural
        Nets, 2018, https://arxiv.org/abs/1712.09913.
    """
    alphas, betas = (jnp.asarray(x, widen(x)) for x in (alphas, betas))
    grid = jnp.stack(jnp.meshgrid(alphas, betas, indexing="ij"), axis=-1)
    directions = {"first": first, "second": second}
    return _losses(loss_fn, params, directions, grid.reshape(-1, 2)).reshape(
        grid.shape[:-1]
    )
