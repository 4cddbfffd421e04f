"""Loss, gradient and exact empirical Fisher from one pass over the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.mapped_axes import is_key
from fsam_optax._common.norms import widen
from fsam_optax._engine import sums_of_loss, without_explicit_axes
from fsam_optax._fisher.labels import Labels, log_likelihood
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    labels_of,
    NegativeLogLikelihood,
    parts_of,
    traced_outputs,
    value_of,
)
from fsam_optax._fisher.outputs import (
    aux_axes,
    Call,
    count_examples,
    of_example,
    row_numbers,
    warn_of_statistics,
)


def check_split(
    nll: NegativeLogLikelihood, args: Any, kwargs: Any, what: str, instead: str
) -> None:
    """Raises ValueError for a key that examples run one by one would use otherwise."""
    if call_of(nll, args, kwargs).holds_keys and not nll.split_keys:
        raise ValueError(
            f"{what} with a PRNG key among the arguments and `split_keys=False`: "
            "examples that are run one by one would draw other masks than the batch "
            f"does. Use `split_keys=True`, or {instead}."
        )


def value_grad_and_fisher(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Any]:
    """Returns `((loss, aux), gradient, empirical Fisher)`, all from one pass.

    Loss, aux and gradient have their ordinary derivatives; the Fisher is a constant.

    Raises:
        ValueError: If a key is given to a loss with `split_keys=False`, which would
            have other masks here than there; or for a statistic over the batch in aux.
    """
    check_split(
        nll,
        args,
        kwargs,
        "The gradient and the Fisher cannot come from one pass",
        "an estimator that makes a pass of its own",
    )
    arrays, fixed = arrays_of((parts_of(nll, batch), tuple(args), dict(kwargs)))
    kinds: list[Any] = []

    def plain(params, arrays):
        def loss(params):
            value, aux = value_of(nll, params, *fixed.put_back(arrays))
            return value, _keys_as_data(aux)

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.custom_jvp
    def one_pass(params, arrays):
        # From the arrays that it was handed: what it closes over may be traced, and
        # would then outlive its trace in the rule of the derivative.
        (inputs, *_), args, kwargs = fixed.put_back(arrays)
        call = call_of(nll, args, kwargs)
        axes = aux_axes(call, params, inputs) if nll.has_aux else None
        rows = row_numbers(inputs)
        aux = jax.tree.map(lambda own: rows if own else None, axes)

        def run(params, arrays):
            return _one_pass(nll, params, kinds, axes, *fixed.put_back(arrays))

        # Sharded as the parameters and the examples are.
        like = ((None, aux), params, params)
        return without_explicit_axes(run, (params, arrays), like)

    @one_pass.defjvp
    def _(primals, tangents):
        out = one_pass(*primals)
        _, changes = jax.jvp(plain, primals, tangents)
        return out, (*changes, jax.tree.map(jnp.zeros_like, out[2]))

    (value, aux), grads, fisher = one_pass(params, arrays)
    return (value, _data_as_keys(aux, kinds)), grads, fisher


def example_losses(
    nll: NegativeLogLikelihood, params: Any, parts: Any, call: Call, axes: Any = None
) -> tuple[Callable[[Any, Any], tuple[jax.Array, Any]], Any, Labels]:
    """Returns `(loss, aux)` of one example as a function, all examples, their labels.

    The loss is that of the labels of the example by their weights in it, m.
    """
    inputs = parts[0]
    h, traced = traced_outputs(nll, params, inputs, call)
    labels = labels_of(nll, h, parts)
    warn_of_statistics(call, params, inputs, traced)
    rows = row_numbers(inputs) if call.one_by_one else None

    def one(params, example):
        own, (targets, _, within) = example
        h, aux = of_example(call, params, own, axes)
        log_prob = log_likelihood(nll.likelihood, h, targets, within)
        return -jnp.sum(log_prob), aux

    return one, ((inputs, rows), labels.of_examples), labels


def _one_pass(nll, params, kinds, axes, parts, args, kwargs):
    """Returns `((loss, aux), gradient, Fisher)`; notes in `kinds` the keys in aux."""
    call = call_of(nll, args, kwargs)
    inputs = parts[0]
    if not count_examples(inputs):
        (value, aux), grads = jax.value_and_grad(
            lambda w: value_of(nll, w, parts, args, kwargs), has_aux=True
        )(params)
        kinds[:] = _kinds_of_keys(aux)
        squares = jax.tree.map(lambda g: jnp.zeros(g.shape, widen(g)), grads)
        return (value, _keys_as_data(aux)), grads, squares
    one, examples, labels = example_losses(nll, params, parts, call, axes)

    def with_keys_as_data(params, example) -> Any:
        loss, aux = one(params, example)
        kinds[:] = _kinds_of_keys(aux)
        return loss, _keys_as_data(aux)

    value, sums, *aux = sums_of_loss(
        with_keys_as_data if nll.has_aux else lambda w, x: one(w, x)[0],
        params,
        examples,
        powers=(1, 2),
        # Divided here: what is done to the sums takes an array more of each.
        weights=labels.examples / labels.divisor,
        has_value=True,
        has_aux=nll.has_aux,
        constant=False,  # By the rule of the derivative of all this.
    )
    grads, squares = sums
    grads = jax.tree.map(lambda g, w: g.astype(jnp.asarray(w).dtype), grads, params)
    aux = aux[0] if aux else None
    if nll.has_aux:
        aux = jax.tree.map(lambda own, a: a if own else a[0], axes, aux)
    return (value, aux), grads, squares


def _keys_as_data(tree):
    """Returns a tree with the data of typed keys in their place."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if is_key(x) else x,
        jax.tree.map(jnp.asarray, tree),
    )


def _kinds_of_keys(tree):
    """Returns for each leaf the kind of key that it is, None if it is none."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [jax.random.key_impl(x) if is_key(x) else None for x in leaves]


def _data_as_keys(tree, kinds):
    """Undoes `_keys_as_data`, given the kinds of the keys."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [
            x if kind is None else jax.random.wrap_key_data(x, impl=kind)
            for x, kind in zip(leaves, kinds, strict=True)
        ]
    )


class Fixed(NamedTuple):
    """What is no array in a tree, to be told apart by when it is a static argument.

    Attributes:
        structure: Structure of the tree.
        leaves: Its leaves, None in place of arrays.
        is_array: Which of them are arrays.
    """

    structure: Any
    leaves: tuple[Any, ...]
    is_array: tuple[bool, ...]

    def put_back(self, arrays: list[Any]) -> Any:
        """Returns the tree with some arrays in the place of those it had."""
        rest = iter(arrays)
        leaves = zip(self.leaves, self.is_array, strict=True)
        return self.structure.unflatten([next(rest) if a else x for x, a in leaves])


def arrays_of(tree: Any) -> tuple[list[Any], Fixed]:
    """Returns the arrays of a tree, and what puts them back among its other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = tuple(hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves)
    pairs = list(zip(leaves, is_array, strict=True))
    fixed = Fixed(structure, tuple(None if a else x for x, a in pairs), is_array)
    return [x for x, a in pairs if a], fixed
