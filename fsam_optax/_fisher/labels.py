"""The labels of a batch: which are there, what they weigh, and what they weigh in all.

    w_nt = a_n m_nt        a_n = max_t w_nt        D = sum_nt w_nt

One divisor D for everything that is averaged: the loss, its gradient, every Fisher.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.checks import leaf_shape
from fsam_optax._common.norms import divisor, widen
from fsam_optax._engine import Columns
from fsam_optax._fisher.likelihoods import factor_product, Likelihood


class Labels(NamedTuple):
    """Labels with their weights; N examples with labels at positions (*T).

    Attributes:
        targets: The labels, those of weight 0 replaced by 0; None if there are none.
        present: 1 where a label is there and 0 where not, for likelihoods that draw
            their own; like the outputs, with a last axis that may be 1. None for ones.
        examples: Weights a_n of the examples.  # shape=(N,)
        within: Weights m_nt of the labels in their example.  # shape=(N, *T)
        weights: Weights w_nt of the labels.  # shape=(N, *T)
        total: The divisor D.  # shape=()
    """

    targets: Any
    present: Any
    examples: jax.Array
    within: jax.Array
    weights: jax.Array
    total: jax.Array

    @property
    def divisor(self) -> jax.Array:
        """D, or 1 where it is 0. An impossible label makes it NaN, and all with it."""
        return jnp.where(self.total == 0, 1, self.total)

    @property
    def of_examples(self) -> tuple[Any, Any, jax.Array]:
        """What `log_likelihood` and its like need, with a leading axis of examples."""
        return self.targets, self.present, self.within


def positions(h: Any) -> tuple[int, ...]:
    """Returns the shape of the labels of outputs: theirs without the last axis."""
    return tuple(jax.tree.leaves(h)[0].shape[:-1])


def expand(x: jax.Array, like: Any) -> jax.Array:
    """Returns x with axes of size 1 appended, as many as `like` has."""
    return jnp.expand_dims(x, range(jnp.ndim(x), len(like.shape)))


def weigh(
    likelihood: Likelihood,
    h: Any,
    targets: Any,
    weights: Any = None,
    example_weights: Any = None,
) -> Labels:
    """Returns the labels of a batch with their weights.

    Args:
        likelihood: Distribution of the labels.
        h: Outputs of the batch, or `jax.ShapeDtypeStruct`s like them.
        targets: The labels; None if the likelihood draws them.
        weights: Weights of examples, (N,), or of labels, (N, *T); None for ones.
        example_weights: Further weights of the examples, (N,).

    Raises:
        ValueError: If labels or weights are of another shape.
        TypeError: If labels are of another dtype than the likelihood takes.
    """
    shape = positions(h)
    dtype = widen(*(x.dtype for x in jax.tree.leaves(h)))
    w = jnp.ones(shape, dtype)
    if weights is not None:
        w = _weights("The weights of a batch", weights, shape, True) * w
    if example_weights is not None:
        w = w * _weights("`example_weights`", example_weights, shape, False)
    present = None
    if targets is not None and likelihood.presence is not None:
        present = likelihood.presence(h, targets)
    if present is not None:
        here = [jnp.max(x, axis=-1) for x in jax.tree.leaves(present)]
        # Merged with the weights before anything reads them: 0 hides what is there.
        w = jnp.where(w == 0, 0, w * jnp.max(jnp.stack(here), axis=0))
        present = jax.tree.map(lambda x: (x != 0).astype(x.dtype), present)
    a = jnp.max(w, axis=tuple(range(1, w.ndim)))
    hidden = weights is not None or example_weights is not None or present is not None
    return Labels(
        targets=_hide(targets, w) if hidden else targets,
        present=present,
        examples=a,
        within=w / expand(divisor(a), w),
        weights=w,
        total=jnp.sum(w),
    )


def _weights(name, weights, shape, of_labels):
    """Returns weights that can be multiplied with an array of the given shape."""
    given = leaf_shape(weights)
    allowed = {shape[:1], shape} if of_labels else {shape[:1]}
    if given not in allowed:
        wanted = " or ".join(map(str, sorted(allowed, key=len)))
        what = "one for each example" + (", or for each label" if of_labels else "")
        raise ValueError(
            f"{name} must be an array of shape {wanted}, {what}, got "
            f"{type(weights).__name__ if given is None else given}."
        )
    weights = jnp.asarray(weights, widen(weights))
    return jnp.expand_dims(weights, range(weights.ndim, len(shape)))


def _hide(targets, w):
    """Returns the targets with 0 in place of those of weight 0."""

    def hide(y):
        y = jnp.asarray(y)
        for zero in (w == 0, jnp.all(w == 0, axis=tuple(range(1, w.ndim)))):
            if y.shape[: zero.ndim] == zero.shape:
                return jnp.where(expand(zero, y), jnp.zeros([], y.dtype), y)
        return y

    return jax.tree.map(hide, targets)


def _where_weighed(m, x):
    """Returns m x, and 0 where m is 0 whatever x is."""
    m = expand(m, x)
    return jnp.where(m == 0, 0, m * x)


def _checked(field, value, expected, h, y):
    """Returns what a likelihood returned, after checking its shape."""
    if leaf_shape(value) != expected:
        raise ValueError(
            f"`likelihood.{field}` returned shape {leaf_shape(value)} where {expected} "
            f"was expected, for outputs of shape {jax.tree.map(leaf_shape, h)} and "
            f"labels of shape {jax.tree.map(leaf_shape, y)}."
        )
    return value


def log_likelihood(likelihood: Likelihood, h: Any, y: Any, m: jax.Array) -> jax.Array:
    """Returns `m log p(y | h)` of each label, of the shape of m."""
    log_prob = likelihood.log_prob(h, y)
    return _where_weighed(m, _checked("log_prob", log_prob, m.shape, h, y))


def score(likelihood: Likelihood, h: Any, y: Any, m: jax.Array) -> Any:
    """Returns `m` times the score of each label, like the outputs."""

    def weighed(s, x):
        return _where_weighed(m, _checked("score", s, tuple(x.shape), h, y))

    return jax.tree.map(weighed, likelihood.score(h, y), h)


def _masked(tree, present):
    if present is None:
        return tree
    return jax.tree.map(lambda x, here: jnp.where(here == 0, 0, x), tree, present)


def drawn_score(
    likelihood: Likelihood, h: Any, key: jax.Array, present: Any, m: jax.Array
) -> Any:
    """Returns `m` times the score of a label drawn from the model, where one is."""
    y = likelihood.sample(key, h)
    return _masked(score(likelihood, h, y, m), present)


def signed_factor(
    likelihood: Likelihood, h: Any, key: jax.Array, present: Any, m: jax.Array
) -> Any:
    """Returns `m` times the factor of the Fisher of the outputs, at random signs."""
    factors, structure = jax.tree.flatten(jax.eval_shape(likelihood.factor, h))
    signs = [
        _signs(k, (*f.shape[:-2], f.shape[-1]), f.dtype)
        for k, f in zip(_keys(key, len(factors)), factors, strict=True)
    ]
    product = factor_product(likelihood, h, structure.unflatten(signs))
    return _masked(jax.tree.map(lambda x: _where_weighed(m, x), product), present)


def _signs(key, shape, dtype):
    """Returns random signs, of which one drawn word of memory makes 32."""
    *lead, size = shape
    words = jax.random.bits(key, (*lead, -(-size // 32), 1), jnp.uint32)
    words = jnp.broadcast_to(words, (*words.shape[:-1], 32))
    bits = (words >> lax.broadcasted_iota(jnp.uint32, words.shape, len(lead) + 1)) & 1
    bits = bits.reshape(*lead, 32 * words.shape[-2])[..., :size]
    return jnp.where(bits == 1, jnp.ones([], dtype), -jnp.ones([], dtype))


def _keys(key, number):
    return [key] if number == 1 else list(jax.random.split(key, number))


def factor_columns(likelihood: Likelihood) -> Columns:
    """Returns the columns of the factor of an example, those of one label at a time.

    The target of a column is the example's `(targets, present, m)`. It is 0 but at its
    label, and made of the outputs there alone: no more than one column is formed.
    """

    def ranks(h):
        return [
            f.shape[-1] for f in jax.tree.leaves(jax.eval_shape(likelihood.factor, h))
        ]

    def number(h):
        return math.prod(positions(h)) * sum(ranks(h))

    def column(h, label, i):
        _, present, m = label
        t, k = jnp.divmod(i, sum(ranks(h)))
        units, start = [], 0
        for x, rank in zip(jax.tree.leaves(h), ranks(h), strict=True):
            # All zeros, but in one of the outputs.
            units.append(jax.nn.one_hot(k - start, rank, dtype=widen(x)))
            start += rank
        there = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(
                x.reshape(-1, x.shape[-1]), t, keepdims=False
            ),
            h,
        )
        c = factor_product(likelihood, there, jax.tree.structure(h).unflatten(units))
        here = (jnp.arange(m.size) == t).reshape(m.shape)
        c = jax.tree.map(
            lambda c: _where_weighed(m, jnp.where(here[..., None], c, 0)), c
        )
        return _masked(c, present)

    return Columns(number, column)
