"""Likelihoods of several outputs, and of a mean with its variance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._common.norms import widen
from fsam_optax._fisher.likelihoods import factor_product, Likelihood, MomentBounds


def heads(likelihoods: Any) -> Likelihood:
    """Combines likelihoods of several outputs: labels that are independent given them.

        log p(y | h) = sum_i log p_i(y_i | h_i)

    A label is then a pytree, one for each head, and its scores add up: the loss is the
    sum of those of the heads, each mean over the labels. Weigh a head against another
    by the likelihood it has, such as the scale of `gaussian`. A label that is absent in
    one head is there in the others.

    Args:
        likelihoods: Pytree of likelihoods, such as a dict.

    Returns:
        A likelihood for a model whose outputs are a pytree like it, of shapes (N, C_i),
        or (N, T, C_i) with the same T, and for targets like it. Equal arguments give
        equal likelihoods.

    Raises:
        TypeError: If a leaf is no `Likelihood`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import categorical, gaussian, negative_log_likelihood
        >>> def apply_fn(params, x):
        ...     return {"class": x @ params["class"], "size": x @ params["size"]}
        >>> both = heads({"class": categorical, "size": gaussian()})
        >>> params = {"class": jnp.zeros((3, 4)), "size": jnp.zeros((3, 1))}
        >>> targets = {"class": jnp.array([0, 3]), "size": jnp.ones((2, 1))}
        >>> loss = negative_log_likelihood(apply_fn, both)
        >>> print(loss(params, (jnp.ones((2, 3)), targets)))
        2.805233
    """
    leaves, structure = jax.tree.flatten(likelihoods, is_leaf=_is_likelihood)
    for leaf in leaves:
        if not _is_likelihood(leaf):
            raise TypeError(f"`likelihoods` must hold likelihoods, got {leaf!r}.")
    if not leaves:
        raise TypeError("`likelihoods` holds none.")
    return _heads(structure, tuple(leaves))


def _is_likelihood(x):
    return isinstance(x, Likelihood)


def _sum(values: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The likelihoods of the heads: what the functions of all of them start from."""

    structure: Any
    likelihoods: tuple[Likelihood, ...]

    def split(self, *trees):
        """Yields each likelihood with its parts of some trees."""
        parts = [self.structure.flatten_up_to(tree) for tree in trees]
        return zip(self.likelihoods, *parts, strict=True)

    def together(self, parts):
        """Returns the tree of what the heads have made."""
        return self.structure.unflatten(list(parts))


@dataclasses.dataclass(frozen=True)
class _Of:
    """A function of the heads and more: equal to another one where both are."""

    function: Callable[..., Any]
    heads: _Heads

    def __call__(self, *args: Any) -> Any:
        """Returns what the function makes of the heads and its arguments."""
        return self.function(self.heads, *args)


def _all_log_prob(heads, h, y):
    return _sum([one.log_prob(h, y) for one, h, y in heads.split(h, y)])


def _all_sample(heads, key, h):
    keys = jax.random.split(key, len(heads.likelihoods))
    draws = zip(keys, heads.split(h), strict=True)
    return heads.together(one.sample(key, h) for key, (one, h) in draws)


def _all_presence(heads, h, y) -> Any:
    each = [one.presence and one.presence(h, y) for one, h, y in heads.split(h, y)]
    if all(here is None for here in each):
        return None
    return heads.together(
        jnp.ones((*h.shape[:-1], 1), widen(h)) if here is None else here
        for here, (_, h) in zip(each, heads.split(h), strict=True)
    )


def _all_fourth_moment(heads, h, u):
    # Of a sum of independent terms of mean 0.
    fourth, variances = [], []
    for one, own, v in heads.split(h, u):
        if one.fourth_moment is None:
            raise TypeError("A head has a likelihood without `fourth_moment`.")
        rows = jnp.einsum("...ck,...c->...k", one.factor(own), v, precision="highest")
        variances.append(jnp.sum(rows**2, axis=-1))
        fourth.append(one.fourth_moment(own, v) - 3 * variances[-1] ** 2)
    return _sum(fourth) + 3 * _sum(variances) ** 2


def _all_bounds(heads, h):
    # As for independent labels: between the extreme entries of a matrix.
    each = []
    for one, own in heads.split(h):
        if one.bounds is None:
            raise TypeError("A head has a likelihood without `bounds`.")
        each.append(one.bounds(own))
    low, high, fourth_low, fourth_high = (list(x) for x in zip(*each, strict=True))
    pairs = [(i, j) for i in range(len(each)) for j in range(i)]
    fourth_low += [2 * low[i] * low[j] for i, j in pairs]
    fourth_high += [2 * high[i] * high[j] for i, j in pairs]
    return MomentBounds(
        fisher_min=functools.reduce(jnp.minimum, low),
        fisher_max=functools.reduce(jnp.maximum, high),
        fourth_min=functools.reduce(jnp.minimum, fourth_low),
        fourth_max=functools.reduce(jnp.maximum, fourth_high),
    )


def _all_divergence(heads, h, k):
    return _sum([one.divergence(h, k) for one, h, k in heads.split(h, k)])


def _all_score(heads, h, y):
    return heads.together(one.score(h, y) for one, h, y in heads.split(h, y))


def _all_factor(heads, h):
    return heads.together(one.factor(h) for one, h in heads.split(h))


def _all_factor_product(heads, h, v):
    return heads.together(factor_product(one, h, v) for one, h, v in heads.split(h, v))


def _heads(structure: Any, likelihoods: tuple[Likelihood, ...]) -> Likelihood:
    each = _Heads(structure, likelihoods)
    known = all(x.divergence for x in likelihoods)
    return Likelihood(
        log_prob=_Of(_all_log_prob, each),
        sample=_Of(_all_sample, each),
        score=_Of(_all_score, each),
        factor=_Of(_all_factor, each),
        factor_product=_Of(_all_factor_product, each),
        fourth_moment=_Of(_all_fourth_moment, each),
        bounds=_Of(_all_bounds, each),
        presence=_Of(_all_presence, each),
        divergence=_Of(_all_divergence, each) if known else None,
        heads=structure,
    )


def _halves(h):
    h = jnp.asarray(h, widen(h))
    if h.shape[-1] % 2:
        raise ValueError(
            "The outputs of a Gaussian with its variance must have an even last axis, "
            f"means before log-variances, got shape {h.shape}."
        )
    return jnp.split(h, 2, axis=-1)


def _residual(h, y):
    """Returns (y - mean) / deviation, and the two halves of the outputs."""
    mean, log_variance = _halves(h)
    if jnp.shape(y) != mean.shape:
        raise ValueError(
            f"Labels of shape {jnp.shape(y)} do not fit outputs of shape {h.shape}, C "
            f"means before C log-variances: they must have shape {mean.shape}, and "
            "are never broadcast."
        )
    return (y - mean) * jnp.exp(-log_variance / 2), log_variance


def _log_prob(h, y):
    z, log_variance = _residual(h, y)
    return -0.5 * jnp.sum(z**2 + log_variance + jnp.log(2 * jnp.pi), axis=-1)


def _score(h, y):
    z, log_variance = _residual(h, y)
    return jnp.concatenate([z * jnp.exp(-log_variance / 2), (z**2 - 1) / 2], axis=-1)


def _sample(key, h):
    mean, log_variance = _halves(h)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jnp.exp(log_variance / 2) * noise


def _deviations(h):
    """Returns the standard deviation of each score."""
    _, log_variance = _halves(h)
    half = jnp.full_like(log_variance, 0.5**0.5)
    return jnp.concatenate([jnp.exp(-log_variance / 2), half], axis=-1)


def _fourth_moment(h, u):
    # A score along u is a z + b (z^2 - 1) for each label, with z standard normal.
    u = jnp.split(_deviations(h) * u, 2, axis=-1)
    a, b = u[0] ** 2, u[1] ** 2 / 2
    cumulant = 48 * b * (a + b)
    return jnp.sum(cumulant, axis=-1) + 3 * jnp.sum(a + 2 * b, axis=-1) ** 2


def _bounds(h):
    variances = _deviations(h) ** 2
    low, high = jnp.min(variances, axis=-1), jnp.max(variances, axis=-1)
    mean = jnp.max(jnp.split(variances, 2, axis=-1)[0], axis=-1)
    # Entries of the matrix of the form in the squares of u: 2 v v^T plus the cumulants.
    highest = jnp.maximum(2 * high**2, jnp.maximum(7 * mean, 3.5))
    return MomentBounds(low, high, jnp.minimum(2 * low**2, 7 * low), highest)


def _divergence(h, k):
    (m, s), (n, t) = _halves(h), _halves(k)
    d = s - t
    return 0.5 * jnp.sum(jnp.expm1(d) - d + (m - n) ** 2 * jnp.exp(-t), axis=-1)


gaussian_with_variance = Likelihood(
    log_prob=_log_prob,
    sample=_sample,
    score=_score,
    factor=lambda h: jnp.vectorize(jnp.diag, signature="(c)->(c,c)")(_deviations(h)),
    factor_product=lambda h, v: _deviations(h) * v,
    fourth_moment=_fourth_moment,
    bounds=_bounds,
    divergence=_divergence,
)
"""Regression that tells its own noise: y ~ N(mean, exp(log-variance)), C at a time.

    score = ((y - m) / v, ((y - m)^2 / v - 1) / 2)       I(h|x) = diag(1 / v, 1 / 2)

The outputs have 2 C numbers in their last axis, C means before C log-variances; labels
have C. A noise that is known for each point is one whose log-variances come with the
inputs: return `jnp.concatenate([mean, inputs["log_variance"]], -1)`. These are not the
natural parameters of the family: the Fisher is the expected Hessian, not that at y.
"""
