"""Likelihoods p(y | h): what turns the outputs of a model into a Fisher information."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_number
from fsam_optax._common.norms import wide_integers, widen


class MomentBounds(NamedTuple):
    """Bounds on the second and fourth moments of the score d, over unit vectors u.

        fisher_min <= E[(u.d)^2] <= fisher_max
        fourth_min <= E[(u.d)^4] - E[(u.d)^2]^2 <= fourth_max

    Attributes:
        fisher_min: Smallest eigenvalue of I(h|x), or less.  # shape=(...)
        fisher_max: Largest eigenvalue of I(h|x), or more.  # shape=(...)
        fourth_min: Smallest value of the fourth-moment form, or less.  # shape=(...)
        fourth_max: Largest value of the fourth-moment form, or more.  # shape=(...)
    """

    fisher_min: jax.Array
    fisher_max: jax.Array
    fourth_min: jax.Array
    fourth_max: jax.Array


class Likelihood(NamedTuple):
    """A family of distributions of the label y given the model output h.

    Pure functions of h, of shape (..., C). The last axis holds the natural parameter
    of one label; labels at different leading positions are independent given h, so
    that a model may emit (C,) for an example, or (T, C) for a sequence. All of them
    compute in float32 or wider, whatever the dtype of h. Write another one with the
    first four fields; the functions of `fsam_optax.variance` need two more.

    Labels are never broadcast: the likelihoods here raise an error for labels of
    another shape than they say. A label that is there in some examples and absent in
    others is left out by its weight (see `negative_log_likelihood`), or, where labels
    are integers, by a negative number.

    Attributes:
        log_prob: `log_prob(h, y)` is log p(y | h), of shape (...); 0 for an absent
            label and NaN for an impossible one.
        sample: `sample(key, h)` draws labels from p(y | h).
        score: `score(h, y)` is d log p(y | h) / dh, of shape (..., C). Its mean under
            the model is 0. For natural parameters it is t(y) - E[t].
        factor: `factor(h)` is a B with B B^T = I(h|x), the covariance of the score
            under the model. Shape (..., C, K), with any K.
        factor_product: `factor_product(h, v)` is factor(h) v, of shape (..., C), for v
            of shape (..., K), without forming the matrix. None forms it.
        fourth_moment: `fourth_moment(h, u)` is E[(u . score)^4] under the model, of
            shape (...), for u of the shape of h.
        bounds: `bounds(h)` is the `MomentBounds` of the score.
        presence: `presence(h, y)` is 1 where a label is there, 0 where it is absent and
            NaN where it is impossible, of shape (..., 1) or (..., C); it reads nothing
            of h but its shape and dtype, and raises an error if y does not fit them.
            None, or a result of None: all labels are there.
        divergence: `divergence(h, k)` is KL(p(.|h) || p(.|k)), of shape (...). None for
            what follows from `log_prob` where h are natural parameters.
        heads: Structure of the outputs, if they are several; see `heads`.

    Examples:
        A Laplace distribution around h, in float32 and without the optional fields:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> laplace = Likelihood(
        ...     log_prob=lambda h, y: -jnp.sum(jnp.abs(y - h) + jnp.log(2.0), -1),
        ...     sample=lambda key, h: h + jax.random.laplace(key, h.shape),
        ...     score=lambda h, y: jnp.sign(y - h),
        ...     factor=lambda h: jnp.broadcast_to(
        ...         jnp.eye(h.shape[-1]), (*h.shape, h.shape[-1])
        ...     ),
        ... )
        >>> print(laplace.score(jnp.zeros(2), jnp.array([3.0, -0.1])))
        [ 1. -1.]
    """

    log_prob: Callable[[jax.Array, Any], jax.Array]
    sample: Callable[[jax.Array, jax.Array], Any]
    score: Callable[[jax.Array, Any], jax.Array]
    factor: Callable[[jax.Array], jax.Array]
    factor_product: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    fourth_moment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    bounds: Callable[[jax.Array], MomentBounds] | None = None
    presence: Callable[[Any, Any], Any] | None = None
    divergence: Callable[[Any, Any], jax.Array] | None = None
    heads: Any = None


def _float(x):
    return jnp.asarray(x, widen(x))


def factor_product(likelihood: Likelihood, h: jax.Array, v: jax.Array) -> jax.Array:
    """Returns factor(h) v, for v of shape (..., K)."""
    if likelihood.factor_product is not None:
        return likelihood.factor_product(h, v)
    factor = likelihood.factor(h)
    return jnp.einsum("...ck,...k->...c", factor, v, precision="highest")


def _misfit(kind: str, h: Any, y: Any, wanted: str) -> str:
    """Returns the message for labels whose shape does not fit that of the outputs."""
    shape, outputs = jnp.shape(y), tuple(h.shape)
    advice = ""
    if (*shape, 1) == outputs and kind != "categorical":
        advice = " Add the axis: `targets[..., None]`."
    elif shape == outputs[:-1] and kind != "categorical":
        advice = " For one class out of several, use `categorical`."
    elif shape == (*outputs[:-1], 1) and kind == "categorical":
        advice = " Drop the last axis: `targets[..., 0]`."
    return (
        f"Labels of shape {shape} do not fit outputs of shape {outputs}: for a "
        f"{kind} likelihood they must have {wanted}, and are never broadcast.{advice}"
    )


def _is_integer(y):
    return jnp.issubdtype(jnp.result_type(y), jnp.integer)


def _is_soft(h, y):
    """Tells soft labels from integer ones, after checking that they are one or both."""
    kind, shape, outputs = jnp.result_type(y), jnp.shape(y), tuple(h.shape)
    floating = jnp.issubdtype(kind, jnp.floating)
    if floating and shape == outputs:
        return True
    if floating and shape == outputs[:-1]:
        raise TypeError(
            f"Labels of a categorical likelihood must be integers, got {kind} of shape "
            f"{shape} for outputs of shape {outputs}: convert them by "
            "`targets.astype(int)`. Probabilities of the classes, as soft labels, must "
            "have the shape of the outputs."
        )
    if not floating and shape == outputs:
        raise TypeError(
            f"Labels of dtype {kind} and shape {shape}, that of the outputs, look "
            "one-hot. Pass the classes, `jnp.argmax(targets, -1)`, or soft labels, "
            "`targets.astype(jnp.float32)`."
        )
    if shape != outputs[:-1]:
        wanted = f"shape {outputs[:-1]} (integers) or {outputs} (probabilities)"
        raise ValueError(_misfit("categorical", h, y, wanted))
    if not _is_integer(y):
        raise TypeError(
            f"Labels of a categorical likelihood must be integers, got {kind}: convert "
            "them by `targets.astype(int)`."
        )
    return False


def _categorical_presence(h, y) -> Any:
    if _is_soft(h, y):
        return None
    y = jnp.expand_dims(wide_integers(y), -1)
    one = jnp.ones(y.shape, widen(h))
    return jnp.where(y < 0, 0, jnp.where(y >= h.shape[-1], jnp.nan, one))


def _categorical_log_prob(h, y):
    log_p = jax.nn.log_softmax(_float(h))
    if _is_soft(h, y):
        return jnp.sum(jnp.where(y == 0, 0, y * log_p), axis=-1)
    y = jnp.expand_dims(wide_integers(y), -1)
    log_p = jnp.take_along_axis(log_p, jnp.maximum(y, 0), axis=-1, mode="fill")
    return jnp.where(y < 0, 0, log_p).squeeze(-1)


def _categorical_score(h, y):
    h = _float(h)
    if _is_soft(h, y):
        y = jnp.asarray(y, widen(h, y))
        return y - jnp.sum(y, axis=-1, keepdims=True) * jax.nn.softmax(h)
    y = wide_integers(y)
    score = jax.nn.one_hot(y, h.shape[-1], dtype=h.dtype) - jax.nn.softmax(h)
    presence = _categorical_presence(h, y)
    return jnp.where(presence == 0, 0, presence * score)


# With s = sqrt(p), diag(s) - p s^T is a factor that maps s to 0. After the reflection
# that takes s to the first axis, its first column is 0 and can be left out. The C - 1
# others, as many as the rank of I, make the exact Fisher one cotangent cheaper.
def _categorical_factor_product(h, v):
    p = jax.nn.softmax(_float(h))
    s = jnp.sqrt(p)
    first = -jnp.sum(s[..., 1:] * v, axis=-1, keepdims=True) / (1 + s[..., :1])
    # Not a concatenation, which would be an array more in memory.
    v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(1, 0)])
    v = jnp.where(jax.lax.broadcasted_iota(int, v.shape, v.ndim - 1) == 0, first, v)
    return s * v - p * jnp.sum(s * v, axis=-1, keepdims=True)


def _categorical_factor(h):
    columns = jnp.eye(h.shape[-1] - 1, dtype=widen(h))

    def factor(h):
        return jax.vmap(_categorical_factor_product, (None, 0), -1)(h, columns)

    return jnp.vectorize(factor, signature="(c)->(c,k)")(h)


def _categorical_fourth_moment(h, u):
    p = jax.nn.softmax(_float(h))
    return jnp.sum(p * (u - jnp.sum(p * u, axis=-1, keepdims=True)) ** 4, axis=-1)


def _categorical_divergence(h, k):
    p, log_p, log_q = jax.nn.softmax(_float(h)), *map(jax.nn.log_softmax, (h, k))
    # A class that is impossible in both adds nothing, though its logits are -inf.
    change = jnp.where(p > 0, log_p, 0) - jnp.where(p > 0, log_q, 0)
    return jnp.sum(jnp.where(p > 0, p * change, 0), axis=-1)


def _categorical_bounds(h):
    # I has the null vector (1, ..., 1); its largest eigenvalue is at most its trace
    # and at most max p. The fourth moment is at most max_y |e_y - p|^2 times that.
    p = jax.nn.softmax(_float(h))
    trace = jnp.sum(p * (1 - p), axis=-1)
    largest = jnp.minimum(jnp.max(p, axis=-1), trace)
    radius = 2 * (1 - jnp.min(p, axis=-1)) - trace
    return MomentBounds(
        fisher_min=jnp.zeros_like(largest),
        fisher_max=largest,
        fourth_min=jnp.zeros_like(largest),
        fourth_max=radius * largest,
    )


categorical = Likelihood(
    log_prob=_categorical_log_prob,
    sample=lambda key, h: jax.random.categorical(key, _float(h)),
    score=_categorical_score,
    factor=_categorical_factor,
    factor_product=_categorical_factor_product,
    fourth_moment=_categorical_fourth_moment,
    bounds=_categorical_bounds,
    presence=_categorical_presence,
    divergence=_categorical_divergence,
)
"""Softmax classification: h are C logits, y an integer label in 0, ..., C - 1.

    score = e_y - p        I(h|x) = diag(p) - p p^T        p = softmax(h)

Labels are integers, of the shape of h without its last axis: (N,) for outputs (N, C),
(N, T) for a sequence. A negative one is absent (-100 elsewhere: ignore), one of C or
more gives NaN. Or they are soft, probabilities of the shape of h (smoothing, mixup,
distillation); one-hot labels are those if they are floating-point numbers. Integer
one-hots and floating-point classes are errors. The factor has C - 1 columns. The bounds
are m = min(max p, 1 - |p|^2) and at most 2 m (Soen and Sun 2024, theorem 5.2). Logits
of -inf are allowed.
"""


def _independent(
    kind: str,
    log_prob: Callable,
    sample: Callable,
    score: Callable,
    cumulants: Callable,
    divergence: Callable,
    presence: Callable | None = None,
) -> Likelihood:
    """Builds a likelihood of C labels that are independent given h.

    Args:
        kind: Its name.
        log_prob: Log-density of each label, `log_prob(h, y)`, elementwise.
        sample: As in `Likelihood`.
        score: As in `Likelihood`, elementwise.
        cumulants: Second and fourth cumulant of each score, `cumulants(h)`.
        divergence: Of each label, `divergence(h, k)`.
        presence: 1, 0 or NaN for each label, `presence(y)`; None if all are possible.
    """

    def present(h, y) -> Any:
        if jnp.shape(y) != tuple(h.shape):
            raise ValueError(_misfit(kind, h, y, "the same shape"))
        here: Any = None if presence is None else presence(jnp.asarray(y))
        return here if here is None else here.astype(widen(h))

    def where_present(fn):
        def masked(h, y):
            here = present(h, y)
            value = fn(_float(h), jnp.asarray(y))
            if here is None:
                return value
            return jnp.where(here == 0, 0, here * value)

        return masked

    def factor(h):
        variance, _ = cumulants(_float(h))
        return jnp.vectorize(jnp.diag, signature="(c)->(c,c)")(jnp.sqrt(variance))

    def product(h, v):
        variance, _ = cumulants(_float(h))
        return jnp.sqrt(variance) * v

    def fourth_moment(h, u):
        variance, fourth = cumulants(_float(h))
        second_moment = jnp.sum(variance * u**2, axis=-1)
        return jnp.sum(fourth * u**4, axis=-1) + 3 * second_moment**2

    def bounds(h):
        # The form is a quadratic one, with the matrix below, of (u_1^2, ..., u_C^2).
        # These are weights that sum to 1: it lies between the extreme entries.
        variance, fourth = cumulants(_float(h))
        matrix = jnp.vectorize(
            lambda v, k: jnp.diag(k) + 2 * jnp.outer(v, v), signature="(c),(c)->(c,c)"
        )(variance, fourth)
        return MomentBounds(
            fisher_min=jnp.min(variance, axis=-1),
            fisher_max=jnp.max(variance, axis=-1),
            fourth_min=jnp.min(matrix, axis=(-2, -1)),
            fourth_max=jnp.max(matrix, axis=(-2, -1)),
        )

    log_probs = where_present(log_prob)
    return Likelihood(
        log_prob=lambda h, y: jnp.sum(log_probs(h, y), axis=-1),
        sample=lambda key, h: sample(key, _float(h)),
        score=where_present(score),
        factor=factor,
        factor_product=product,
        fourth_moment=fourth_moment,
        bounds=bounds,
        presence=present,
        divergence=lambda h, k: jnp.sum(divergence(_float(h), _float(k)), axis=-1),
    )


def _between(y, low, high):
    """Returns 1 for labels in [low, high], 0 for negative integers, NaN for others."""
    possible = jnp.where((y >= low) & (y <= high), 1.0, jnp.nan)
    return jnp.where(y < 0, 0, possible) if _is_integer(y) else possible


def _bernoulli_divergence(h, k):
    def half(h, k):
        p = jax.nn.sigmoid(h)
        change = jax.nn.log_sigmoid(h) - jax.nn.log_sigmoid(k)
        return jnp.where(p > 0, p * jnp.where(p > 0, change, 0), 0)

    return half(h, k) + half(-h, -k)


def _bernoulli_cumulants(h):
    variance = jax.nn.sigmoid(h) * jax.nn.sigmoid(-h)
    return variance, variance * (1 - 6 * variance)


bernoulli = _independent(
    "bernoulli",
    log_prob=lambda h, y: y * jax.nn.log_sigmoid(h) + (1 - y) * jax.nn.log_sigmoid(-h),
    sample=lambda key, h: jax.random.bernoulli(key, jax.nn.sigmoid(h)).astype("int32"),
    score=lambda h, y: y * jax.nn.sigmoid(-h) - (1 - y) * jax.nn.sigmoid(h),
    cumulants=_bernoulli_cumulants,
    divergence=_bernoulli_divergence,
    presence=lambda y: _between(y, 0, 1),
)
"""C independent yes-or-no labels: h are logits, y is 0 or 1, of the shape of h.

    score = y - p          I(h|x) = diag(p (1 - p))        p = sigmoid(h)

Labels have the shape of h, (N, C): logistic regression is C = 1, with labels (N, 1).
They may be bools, integers, or soft labels in [0, 1]. A negative integer is absent, and
leaves the C - 1 labels beside it; what lies outside of [0, 1] gives NaN. Not the
categorical distribution over C classes.
"""


def gaussian(scale: jax.typing.ArrayLike = 1.0) -> Likelihood:
    """Regression with a known, isotropic noise: y ~ N(h, scale^2).

        score = (y - h) / scale^2          I(h|x) = 1 / scale^2

    `log_prob` is, up to a constant, minus *half* the squared error over scale^2: the
    Fisher of a mean squared error without the half is another one. All `bounds` are
    attained (Soen and Sun 2024, proposition 5.1).

    Args:
        scale: Standard deviation of the noise, > 0; a scalar.

    Returns:
        The likelihood, for real labels of the shape of h: (N, 1), not (N,), for one
        output an example. No number marks a label as absent: give it weight 0.
        Likelihoods of equal Python numbers are equal, and hash alike.

    Raises:
        ValueError: If scale is a Python number that is not positive and finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(gaussian(scale=2.0).score(jnp.array([1.0]), jnp.array([3.0])))
        [0.5]
    """
    check_number("scale", scale, 0, open=True)
    return _known(float(scale)) if isinstance(scale, numbers.Real) else _normal(scale)


def _normal(scale: Any) -> Likelihood:
    def log_prob(h, y):
        return -0.5 * (((y - h) / scale) ** 2 + jnp.log(2 * jnp.pi * scale**2))

    def sample(key, h):
        return h + scale * jax.random.normal(key, h.shape, h.dtype)

    def cumulants(h):
        return jnp.full_like(h, 1 / scale**2), jnp.zeros_like(h)

    def score(h, y):
        return (y - h) / scale**2

    def divergence(h, k):
        return 0.5 * ((h - k) / scale) ** 2

    return _independent("gaussian", log_prob, sample, score, cumulants, divergence)


_known = functools.cache(_normal)


poisson = _independent(
    "poisson",
    log_prob=lambda h, y: y * h - jnp.exp(h) - jax.lax.lgamma(_float(y) + 1),
    sample=lambda key, h: jax.random.poisson(key, jnp.exp(h)),
    score=lambda h, y: y - jnp.exp(h),
    cumulants=lambda h: (jnp.exp(h), jnp.exp(h)),
    divergence=lambda h, k: jnp.exp(h) * (jnp.expm1(k - h) - (k - h)),
    presence=lambda y: _between(y, 0, jnp.inf),
)
"""C independent counts: h are log rates, y is 0, 1, 2, ..., of the shape of h.

    score = y - r          I(h|x) = diag(r)                r = exp(h)

Labels have the shape of h, (N, C). A negative integer is absent, a negative
floating-point number gives NaN.
The rate overflows float32 beyond h = 88, and sampled counts int32 beyond h = 21.
`jax.random.poisson` needs a key of the default `threefry2x32` kind.
"""
