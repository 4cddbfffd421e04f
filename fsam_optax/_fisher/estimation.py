"""What all estimators of the Fisher diagonal share: the call, the mean and the key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_leaves,
    check_params,
    is_real,
    leaf_shape,
    shape_of,
)
from fsam_optax._common.mapped_axes import is_key
from fsam_optax._common.norms import divisor, widen
from fsam_optax._engine import power_sums


ApplyFn = Callable[[Any, Any], jax.Array]


class SampledState(NamedTuple):
    """State of a sampled estimator.

    Attributes:
        key: Data of the PRNG key of the next update, an array of integers that any
            checkpoint can hold.
        standard_error: Standard error of the last diagonal, with its structure; None
            if not asked for, inf before the first update.
    """

    key: jax.Array
    standard_error: Any


class Problem(NamedTuple):
    """What an estimator works on.

    Attributes:
        model: `model(params, inputs) -> h`, with the leaves below as its only ones.
        params: The leaves to differentiate; `optax.MaskedNode` in place of the others.
        inputs: Inputs of the batch.
        targets: Targets of the batch.
        weights: Weights of the examples.  # shape=(N,)
    """

    model: ApplyFn
    params: Any
    inputs: Any
    targets: Any
    weights: jax.Array


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Returns the two parts of a batch, after checking that there are two of arrays."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            "`batch` must be a pair, `batch=(inputs, targets)`, got "
            f"{type(batch).__name__}."
        )
    check_leaves(batch, "batch", data=True)
    shapes = [shape_of(x) for x in jax.tree.leaves(batch[0])]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "The inputs in `batch` must be arrays whose leading axes count the "
            f"examples, got shapes {shapes}."
        )
    return batch[0], batch[1]


def _problem(name, apply_fn, params, batch, example_weights, full_params):
    check_params(name, params)
    check_leaves(params, "params")
    if batch is None:
        raise TypeError(
            f"`{name}` needs the batch as an extra argument: `update(grads, state, "
            "params, batch=(inputs, targets))`, where `inputs` goes to `apply_fn`."
        )
    inputs, targets = inputs_and_targets(batch)
    size = len(jax.tree.leaves(inputs)[0])
    check_leaves(example_weights, "example_weights")
    if example_weights is not None and leaf_shape(example_weights) != (size,):
        raise ValueError(
            f"`example_weights` must have shape ({size},), one for each example, got "
            f"{jax.tree.map(leaf_shape, example_weights)}."
        )
    params, full_params, inputs, targets, example_weights = jax.lax.stop_gradient(
        (
            params,
            params if full_params is None else full_params,
            inputs,
            targets,
            example_weights,
        )
    )
    if example_weights is None:
        example_weights = jnp.ones(size, widen())

    def model(variables, inputs):
        complete = jax.tree.map(
            lambda w, v: w if _is_masked(v) else v, full_params, variables
        )
        return apply_fn(complete, inputs)

    real = jax.tree.map(lambda w: w if is_real(w) else optax.MaskedNode(), params)
    weights = jnp.asarray(example_weights, widen(example_weights))
    return Problem(model, real, inputs, targets, weights)


def diagonal_dtype(w: Any) -> jnp.dtype:
    """Returns the dtype of a diagonal for a leaf of the parameters, real or not."""
    return widen(w) if is_real(w) else widen()


def _restore(diagonal: Any, params: Any) -> Any:
    """Sets the dtype by that of `params`, and zeros where these are not real."""

    def leaf(w, d):
        d = jnp.zeros(jnp.shape(w)) if _is_masked(d) else d
        return jnp.asarray(d, diagonal_dtype(w))

    return jax.lax.stop_gradient(jax.tree.map(leaf, params, diagonal))


def mean_powers(problem, cotangents, targets, *, draws=1, powers=(2,)):
    """Returns 1/draws times the weighted means over examples of `power_sums`."""
    sums = power_sums(
        problem.model,
        problem.params,
        problem.inputs,
        cotangents,
        targets,
        powers=powers,
        weights=problem.weights,
    )
    total = divisor(draws * jnp.sum(problem.weights))
    return tuple(jax.tree.map(lambda x: x / total, tree) for tree in sums)


def closed_form(name, apply_fn, estimate) -> optax.GradientTransformationExtraArgs:
    """Builds a stateless estimator from `estimate(problem) -> diagonal`."""

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(
        updates,
        state,
        params=None,
        *,
        batch=None,
        example_weights=None,
        full_params=None,
        **extra_args,
    ):
        del updates, extra_args
        problem = _problem(name, apply_fn, params, batch, example_weights, full_params)
        return _restore(estimate(problem), params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def key_data(key: jax.Array) -> jax.Array:
    """Returns the data of a typed or legacy key, in a buffer of its own."""
    typed = hasattr(key, "dtype") and is_key(key)
    data = jax.random.key_data(key) if typed else key
    if getattr(data, "dtype", None) != jnp.uint32 or jnp.ndim(data) != 1:
        raise TypeError(
            f"`key` must be one PRNG key, such as `jax.random.key(0)`, got {key!r}."
        )
    # A buffer of its own: donating the state must not delete the caller's key.
    return jnp.array(data, copy=True)


def sampled(
    name, apply_fn, estimate, key, standard_error=False
) -> optax.GradientTransformationExtraArgs:
    """Builds an estimator from `estimate(problem, key) -> diagonal, standard error`."""
    key_data(key)  # Raises on anything but a key.
    impl = jax.random.key_impl(key) if is_key(key) else None

    def init_fn(params):
        def unknown(w):
            return jnp.full(jnp.shape(w), jnp.inf, diagonal_dtype(w))

        error = jax.tree.map(unknown, params) if standard_error else None
        return SampledState(key=key_data(key), standard_error=error)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        batch=None,
        example_weights=None,
        replica=None,
        full_params=None,
        **extra_args,
    ):
        del updates, extra_args
        problem = _problem(name, apply_fn, params, batch, example_weights, full_params)
        following, draw = jax.random.split(
            jax.random.wrap_key_data(state.key, impl=impl)
        )
        if replica is not None:
            draw = jax.random.fold_in(draw, replica)
        diagonal, error = estimate(problem, draw)
        return _restore(diagonal, params), SampledState(
            key=jax.random.key_data(following),
            standard_error=_restore(error, params) if standard_error else None,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
