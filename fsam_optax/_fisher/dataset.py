"""An estimator over a data set, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from fsam_optax._common.checks import (
    broadcast_mask,
    check_leaves,
    check_like,
    check_no_module,
    check_transformation,
    describe_state,
    shape_of,
)
from fsam_optax._common.kinds import of_estimator
from fsam_optax._common.norms import divisor
from fsam_optax._engine import without_explicit_axes
from fsam_optax._fisher.diagonal import with_key
from fsam_optax._fisher.estimation import (
    EstimatorState,
    full_like,
    is_masked,
    masked_by,
    SampledState,
)
from fsam_optax._fisher.one_pass import arrays_of
from fsam_optax._fisher.refresh_every import RefreshEveryState


class Spread(NamedTuple):
    """What is known of the standard error of one estimator.

    Attributes:
        mean: Mean over the examples so far; None where the error is for given inputs.
        squares: Variance over the draws so far; or, for given inputs, the sum of the
            squared errors of the batches, each times its weight.
        weight: Sum of the weights of the examples.  # shape=()
        counts: Sum over the batches of weight^2 over draws.  # shape=()
    """

    mean: Any
    squares: Any
    weight: jax.Array
    counts: jax.Array


class DatasetState(NamedTuple):
    """How far `dataset_diagonal` has come; any checkpoint can hold it.

    Attributes:
        batches: Batches so far.  # shape=(), dtype=int32
        weight: Sum of their weights, D.  # shape=()
        diagonal: The diagonal of these batches.
        estimator: State of the estimator.
        spreads: For the standard error, one for each estimator that draws.
    """

    batches: jax.Array
    weight: jax.Array
    diagonal: Any
    estimator: Any
    spreads: tuple[Spread, ...]


def dataset_diagonal(
    estimator: optax.GradientTransformation,
    params: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array | None = None,
    mask: Any = None,
    standard_error: bool = False,
    state: DatasetState | None = None,
    progress: Callable[[DatasetState], None] | None = None,
    **extra_args: Any,
) -> Any:
    """Evaluates an estimator over a data set: what one batch of all of it would give.

        F = sum_b D_b F_b / sum_b D_b           D_b: sum of the label weights of batch b

    One compiled step, called for each batch. A batch that is shorter than the first
    one is filled up with examples of weight 0; one that the loader has padded needs
    weights of 0 in it. Sampled estimators draw anew for each batch.

    F is the *mean* over labels. Elastic weight consolidation and Laplace want the sum:
    multiply by the number of labels.

    Args:
        estimator: An estimator of this library, or several by `by_group`.
        params: Parameters at which to evaluate.
        batches: Any iterable of what the loss of the estimator takes: a list, a
            generator, a data loader. It is gone through once. Its arrays may be those
            of JAX, of NumPy, or of any framework that turns them into NumPy's (tensors
            of PyTorch on the CPU, of TensorFlow).
        key: PRNG key to draw with in place of the estimator's own, of the same kind.
        mask: Tree of bools that is a prefix of params, or a function of params that
            returns one: which of them to evaluate. The others cost nothing, and
            `optax.MaskedNode()` stands in their place. None for all.
        standard_error: Whether to return the standard error of each entry too. The
            estimator must keep its own (`standard_error=True`). Where that takes the
            inputs as drawn (`fisher_i1`, `fisher_hutchinson`), so does this: it is
            that of all examples at once. Where it is for given inputs, the variances
            of the batches add up. 0 where the estimator of a group does not draw.
        state: Where an earlier call had come, to go on from there with the batches that
            are left.
        progress: Called after each batch with the `DatasetState`: to print, or to save.
        **extra_args: Passed on to the estimator, such as `loss_args` and
            `loss_kwargs`.

    Returns:
        The diagonal, with the structure of params, float32 or wider, sharded over
        devices as they are; with `standard_error`, the pair of it and its error. Zeros
        if there was nothing of positive weight.

    Raises:
        TypeError: If estimator is no transformation, batches cannot be iterated, or
            state is no `DatasetState`.
        ValueError: If the estimator does not tell the weight of a batch, repeats
            diagonals of batches before, or keeps no standard error; if state is that of
            another estimator, of other parameters or settings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import fisher_exact, poisson
        >>> estimator = fisher_exact(lambda w, x: x * w[None], poisson)
        >>> loader = [(jnp.array([[1.0], [3.0]]), None), (jnp.array([[2.0]]), None)]
        >>> print(dataset_diagonal(estimator, jnp.zeros(1), loader))  # (1 + 9 + 4) / 3
        [4.6666665]
    """
    check_transformation("estimator", estimator, "fisher_exact(apply_fn, categorical)")
    check_no_module("dataset_diagonal", params)
    check_leaves(params, "params")
    if not isinstance(batches, Iterable) or isinstance(batches, dict):
        raise TypeError(
            "`batches` must be an iterable of batches, such as a list of them, got "
            f"{type(batches).__name__}."
        )
    if isinstance(batches, tuple) and all(hasattr(x, "dtype") for x in batches):
        raise TypeError(
            "`batches` is one batch, a tuple of arrays: give a list of batches, "
            "`[(inputs, targets)]`, or a data loader."
        )
    keep = None
    if mask is not None:
        keep = broadcast_mask(mask, params, "mask")
    chosen = masked_by(keep, params)
    extra, fixed = arrays_of(extra_args)
    kept = tuple(jax.tree.leaves(keep))
    start = functools.partial(_start, estimator, chosen, key, standard_error)
    if state is not None:
        _check_state(state, start)
    now: Any = start() if state is None else state
    first = None
    for batch in batches:
        batch = jax.tree.map(_as_array, batch)
        if first is None:
            first = _form_of(batch)
            now = _spread_out(now, (params, batch))
        batch, filled = _filled(batch, first)
        now = _step(estimator, fixed, kept, now, params, batch, extra, filled)
        if progress is not None:
            progress(now)
    return (now.diagonal, _error(now)) if standard_error else now.diagonal


def _is_state(x):
    return isinstance(x, EstimatorState | SampledState | RefreshEveryState)


def _states(state: Any) -> list[Any]:
    """Returns the states of estimators within a state, after checking them."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if any(isinstance(x, RefreshEveryState) for x in found):
        raise ValueError(
            "`estimator` repeats the diagonal of an earlier batch (`refresh_every`): "
            "pass the estimator within."
        )
    if not found:
        raise ValueError(
            "`estimator` does not tell what a batch weighs: it must be an estimator of "
            "this library that evaluates the model, such as `fisher_exact`."
        )
    return found


def _start(estimator, params, key, standard_error):
    inner = with_key(of_estimator(estimator.init(params)), key)
    states = [x for x in _states(inner) if isinstance(x, SampledState)]
    none = jnp.zeros([], float)
    spreads = []
    if standard_error:
        if not states or any(x.standard_error is None for x in states):
            raise ValueError(
                "`standard_error=True` needs an estimator that keeps one: make one "
                "that draws, such as `fisher_i1`, with `standard_error=True` too."
            )
        for x in states:
            zeros = jax.tree.map(lambda e: full_like(e, 0), x.standard_error)
            mean = None if x.draws is None else zeros
            spreads.append(Spread(mean, zeros, none, none))
    return DatasetState(
        batches=jnp.zeros([], jnp.int32),
        weight=none,
        diagonal=jax.tree.map(lambda w: full_like(w, 0), params),
        estimator=inner,
        spreads=tuple(spreads),
    )


def _check_state(state, start):
    """Raises unless `state` is one that a call with these arguments makes."""
    how = "pass what `progress` received in a call with the same arguments"
    if not isinstance(state, DatasetState):
        got = describe_state(state)
        raise TypeError(f"`state` must be a DatasetState, got {got}: {how}.")
    try:
        check_like("state", state, "state at the start", jax.eval_shape(start))
    except ValueError as error:
        raise ValueError(
            "`state` is not of this estimator, of these parameters and settings: "
            f"{error} Here {how}."
        ) from None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(estimator, fixed, kept, state, params, batch, extra, filled):
    """Returns the state after one more batch."""
    estimator = optax.with_extra_args_support(estimator)
    extra_args = fixed.put_back(extra)
    if filled is not None:
        weights = extra_args.pop("example_weights", None)
        weights = filled if weights is None else filled * weights
        extra_args["example_weights"] = weights
    if kept:
        extra_args["full_params"] = params
        params = masked_by(jax.tree.unflatten(jax.tree.structure(params), kept), params)
    nothing: Any = None
    diagonal, inner = estimator.update(
        nothing, state.estimator, params, batch=batch, **extra_args
    )
    found = _states(inner)
    # By group, all weigh the same batch.
    weight = found[0].batch_weight
    total = state.weight + weight
    share = weight / divisor(total)
    # A batch of weight 0 changes nothing; one of no finite weight, everything.
    mean = jax.tree.map(
        lambda old, new: old + share.astype(old.dtype) * (new - old),
        state.diagonal,
        diagonal,
    )
    drawn = [x for x in found if isinstance(x, SampledState)]
    spreads = [
        _spread(spread, x, diagonal)
        for spread, x in zip(state.spreads, drawn, strict=False)
    ]
    return DatasetState(
        batches=state.batches + 1,
        weight=total,
        diagonal=mean,
        estimator=inner,
        spreads=tuple(spreads),
    )


def _spread(spread: Spread, state: SampledState, diagonal: Any) -> Spread:
    """Returns the spread after one more batch."""
    own = jax.tree.map(
        lambda e, d: e if is_masked(e) else d,
        state.standard_error,
        diagonal,
        is_leaf=is_masked,
    )
    if state.draws is None:
        squares = jax.tree.map(
            lambda old, e: old + (state.batch_weight.astype(e.dtype) * e) ** 2,
            spread.squares,
            state.standard_error,
        )
        return Spread(None, squares, spread.weight, spread.counts)
    weight, count = state.draws
    total = spread.weight + weight
    share = weight / divisor(total)
    # From the diagonal, divided by D, to the mean over examples.
    scale = state.batch_weight / divisor(weight)

    def variance(old, mean, f, error):
        # One draw has an error of inf and no variance.
        error = jnp.where(count > 1, error, 0) * scale.astype(f.dtype)
        new = error**2 * jnp.maximum(count - 1, 0).astype(f.dtype)
        apart = f * scale.astype(f.dtype) - mean
        q = share.astype(f.dtype)
        return (1 - q) * old + q * new + q * (1 - q) * apart**2

    squares = jax.tree.map(
        variance, spread.squares, spread.mean, own, state.standard_error
    )
    mean = jax.tree.map(
        lambda m, f: m + share.astype(f.dtype) * (f * scale.astype(f.dtype) - m),
        spread.mean,
        own,
    )
    counts = spread.counts + jnp.where(count > 0, weight**2 / divisor(count), 0)
    return Spread(mean, squares, total, counts)


def _error(state: DatasetState) -> Any:
    """Returns the standard error of each entry."""
    result = jax.tree.map(jnp.zeros_like, state.diagonal)
    for spread in state.spreads:
        count = spread.weight**2 / divisor(spread.counts)

        def error(x, spread=spread, count=count):
            if spread.mean is None:
                return jnp.sqrt(x) / divisor(state.weight).astype(x.dtype)
            one = jnp.sqrt(x / divisor(count - 1).astype(x.dtype))
            one = jnp.where(count > 1, one, jnp.inf)
            return one * (spread.weight / divisor(state.weight)).astype(x.dtype)

        result = jax.tree.map(
            lambda e, old, error=error: old if is_masked(e) else error(e),
            spread.squares,
            result,
            is_leaf=is_masked,
        )
    return result


def _as_array(x: Any) -> Any:
    """Returns arrays of other frameworks, such as tensors of PyTorch, as NumPy's."""
    known = isinstance(x, (jax.Array, np.ndarray)) or not hasattr(x, "__array__")
    return x if known else np.asarray(x)


def _size_of(batch: Any) -> int | None:
    """Returns the number of examples if all arrays of a batch agree on it."""
    shapes = [shape_of(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


class _Form(NamedTuple):
    """How large a batch is, and how each of its arrays lies on devices, if known."""

    size: int | None
    shardings: list[Any]


def _form_of(batch: Any) -> _Form:
    shardings = [
        x.sharding if isinstance(x, jax.Array) and not isinstance(x, Tracer) else None
        for x in jax.tree.leaves(batch)
    ]
    return _Form(_size_of(batch), shardings)


def _filled(batch: Any, form: _Form) -> tuple[Any, Any]:
    """Returns a batch filled up to a size, and the weights of its examples.

    It is laid out on devices as the form says. The weights are None for a batch that is
    not shorter, or has arrays of other lengths, which is then compiled for by itself.
    """
    size, number = form.size, _size_of(batch)
    if size is None or not number or number > size:
        return batch, None
    # Ones for a batch of full length, so that all are one program.
    rows = np.arange(size) % number
    weights = (np.arange(size) < number).astype(np.float32)
    if number < size:
        leaves, tree = jax.tree.flatten(batch)
        shardings = form.shardings
        if len(shardings) != len(leaves):
            shardings = [None] * len(leaves)
        batch = tree.unflatten(
            _rows_on(sharding, x, rows)
            for x, sharding in zip(leaves, shardings, strict=True)
        )
    return batch, weights


def _rows_on(sharding: Any, x: Any, rows: np.ndarray) -> Any:
    """Returns rows of an array, laid out as a sharding says, if there is one."""
    if isinstance(x, jax.Array):
        x = jax.jit(lambda x: without_explicit_axes(lambda x: x[rows], (x,), x))(x)
    else:
        x = x[rows]
    return x if sharding is None else jax.device_put(x, sharding)


def _spread_out(state: DatasetState, given: Any) -> DatasetState:
    """Returns the state on all devices of what is given, as a step leaves it.

    Or else the first step would be a program of its own.
    """
    arrays = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array)]
    shardings = [x.sharding for x in arrays if not isinstance(x, Tracer)]
    named = [s for s in shardings if isinstance(s, NamedSharding) and s.num_devices > 1]
    if not named:
        return state
    everywhere = NamedSharding(named[0].mesh, PartitionSpec())

    def spread(x):
        there = isinstance(x, Tracer) or x.sharding.num_devices > 1
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(spread, state)
