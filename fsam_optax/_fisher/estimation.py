"""What all estimators of the Fisher diagonal share: the call, the mean and the key."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fsam_optax._common.checks import check_leaves, check_params, is_real
from fsam_optax._common.mapped_axes import is_key
from fsam_optax._common.norms import divisor, widen
from fsam_optax._engine import Columns, sums_of_powers, without_explicit_axes
from fsam_optax._fisher.labels import Labels, weigh
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    NegativeLogLikelihood,
    parts_of,
    traced_outputs,
)
from fsam_optax._fisher.one_pass import arrays_of
from fsam_optax._fisher.outputs import (
    aux_axes,
    of_batch,
    of_example,
    row_numbers,
    warn_of_statistics,
)


class EstimatorState(NamedTuple):
    """State of an estimator in closed form.

    Attributes:
        batch_weight: The divisor D of the last batch; 0 before the first.  # shape=()
    """

    batch_weight: jax.Array


class Draws(NamedTuple):
    """How many independent draws a standard error speaks of.

    Attributes:
        weight: Sum of the weights of the examples.  # shape=()
        number: Draws of equal weight that would be as many.  # shape=()
    """

    weight: jax.Array
    number: jax.Array


class SampledState(NamedTuple):
    """State of a sampled estimator.

    Attributes:
        key: Data of the PRNG key of the next update, an array of integers that any
            checkpoint can hold.
        standard_error: Standard error of the last diagonal, with its structure; None
            if not asked for, inf before the first update.
        batch_weight: The divisor D of the last batch; 0 before the first.  # shape=()
        draws: The draws behind the standard error, if it takes the inputs as drawn
            too; None if it is that for the given inputs, or not asked for.
    """

    key: jax.Array
    standard_error: Any
    batch_weight: jax.Array
    draws: Draws | None = None


class Problem(NamedTuple):
    """What an estimator works on.

    Attributes:
        likelihood: Distribution of the labels.
        params: The leaves to differentiate; `optax.MaskedNode` in place of the others.
        inputs: Inputs of the batch.
        rows: Numbers of the examples, if they fold them into keys; else None.
        labels: Labels and their weights.
        of_one: `of_one(params, (input, row)) -> h` of one example.
        of_all: `of_all(params, inputs) -> h` of the batch.
    """

    likelihood: Any
    params: Any
    inputs: Any
    rows: Any
    labels: Labels
    of_one: Callable[[Any, Any], Any]
    of_all: Callable[[Any, Any], Any]


def is_masked(x: Any) -> bool:
    """Tells whether a node stands in the place of a parameter."""
    return isinstance(x, optax.MaskedNode)


def masked_by(keep: Any, params: Any) -> Any:
    """Returns params with `optax.MaskedNode` where `keep` is False; None keeps all."""
    if keep is None:
        return params
    return jax.tree.map(lambda k, w: w if k else optax.MaskedNode(), keep, params)


class Given(NamedTuple):
    """The extra arguments of the call of an estimator; see `fisher_exact`."""

    batch: Any = None
    example_weights: Any = None
    full_params: Any = None
    loss_args: Any = ()
    loss_kwargs: Any = None


def _evaluate(
    name: str,
    nll: NegativeLogLikelihood,
    params: Any,
    given: Given,
    estimate: Callable[..., Any],
    key: Any,
    like: Callable[[Any], Any],
    needs_labels: bool,
) -> Any:
    """Returns `estimate(problem, key)`, and the divisor D.

    `like(params)` tells how the estimate is sharded over devices; its `params` have
    `optax.MaskedNode` for what is not differentiated.
    """
    check_params(name, params)
    check_leaves(params, "params")
    if given.batch is None:
        raise TypeError(
            f"`{name}` needs the batch as an extra argument: `update(grads, state, "
            "params, batch=(inputs, targets))`, where `inputs` goes to `apply_fn`."
        )
    check_leaves(given.example_weights, "example_weights")
    parts = parts_of(nll, given.batch)
    if needs_labels and not jax.tree.leaves(parts[1]):
        raise TypeError(
            f"`{name}` reads the labels, but the targets in `batch` are None: pass "
            "`batch=(inputs, targets)`, or use an estimator that draws its labels."
        )
    whole = params if given.full_params is None else given.full_params
    call = tuple(given.loss_args), dict(given.loss_kwargs or {})
    real = jax.tree.map(lambda w: w if is_real(w) else optax.MaskedNode(), params)
    rest = jax.tree.map(
        lambda w, v: w if is_masked(v) else optax.MaskedNode(), whole, real
    )
    arrays, fixed = arrays_of((parts, given.example_weights, rest, *call))
    operands = jax.lax.stop_gradient((real, arrays)), key

    def run(operands, key):
        real, arrays = operands
        problem = _problem(nll, real, *fixed.put_back(arrays))
        return estimate(problem, key), jnp.asarray(problem.labels.total, float)

    # The model meets single examples and whole batches, which no one placement of
    # explicitly sharded axes would suit.
    return without_explicit_axes(run, operands, (like(real), None))


def _problem(nll, real, parts, example_weights, rest, args, kwargs) -> Problem:
    inputs, targets, weights = parts
    call = call_of(nll, args, kwargs)

    def complete(variables):
        def leaf(w, v):
            return w if is_masked(v) else v

        return jax.tree.map(leaf, rest, variables, is_leaf=is_masked)

    h, traced = traced_outputs(nll, complete(real), inputs, call)
    targets = targets if jax.tree.leaves(targets) else None

    @functools.cache
    def axes():  # For statistics over the batch, of which one example has none.
        own = aux_axes(call, complete(real), inputs) if nll.has_aux else None
        warn_of_statistics(call, complete(real), inputs, traced)
        return own

    return Problem(
        likelihood=nll.likelihood,
        params=real,
        inputs=inputs,
        rows=row_numbers(inputs) if call.one_by_one else None,
        labels=weigh(nll.likelihood, h, targets, weights, example_weights),
        of_one=lambda params, example: of_example(
            call, complete(params), example, axes()
        )[0],
        of_all=lambda params, inputs: of_batch(call, complete(params), inputs)[0],
    )


def diagonal_dtype(w: Any) -> jnp.dtype:
    """Returns the dtype of a diagonal for a leaf of the parameters, real or not."""
    return widen(w) if is_real(w) else widen()


def full_like(w: Any, value: float) -> jax.Array:
    """Returns a diagonal of one value, sharded over devices as the parameter is."""
    return jnp.full_like(jnp.asarray(w), value, dtype=diagonal_dtype(w))


def _restore(diagonal: Any, params: Any) -> Any:
    """Sets the dtype by that of `params`, and zeros where these are not real."""

    def leaf(w, d):
        if is_masked(d):
            return full_like(w, 0)
        # A NaN parameter has no Fisher. Read entry by entry, the parameter also tells
        # the compiler how to shard what has its shape.
        w, d = (lax.convert_element_type(x, diagonal_dtype(w)) for x in (w, d))
        return lax.select(lax.ne(w, w), w, d)

    return jax.lax.stop_gradient(jax.tree.map(leaf, params, diagonal))


def power_sums_of(
    problem: Problem,
    cotangents: Callable | Columns,
    extra: Any,
    powers: tuple,
    chunk_bytes: int | None = None,
    scale: jax.Array | float = 1,
):
    """Returns 1 / scale times the sums over examples, weighted, of powers of pullbacks.

    `cotangents(h, label, extra)` maps the outputs of one example, its
    `(targets, present, m)`, and its part of `extra`; those of `Columns` take the pair
    `(label, extra)` for the target.
    """
    labels = problem.labels

    def of_one(h, target):
        assert not isinstance(cotangents, Columns)
        return cotangents(h, *target)

    return sums_of_powers(
        problem.of_one,
        problem.params,
        ((problem.inputs, problem.rows), (labels.of_examples, extra)),
        cotangents if isinstance(cotangents, Columns) else of_one,
        powers,
        # Divided here: what is done to the sums is done for each array of parameters.
        labels.examples / scale,
        chunk_bytes,
    )


def mean_powers(
    problem, cotangents, extra=None, *, draws=1, powers=(2,), chunk_bytes=None
):
    """Returns 1 / (draws D) times the `power_sums_of`."""
    total = draws * problem.labels.divisor
    return power_sums_of(problem, cotangents, extra, powers, chunk_bytes, total)


def draws_of(problem: Problem, draws_per_example: int) -> Draws:
    """Returns the weight of the examples, and how many draws weighed alike they are."""
    w = problem.labels.examples
    weight = jnp.sum(w)
    return Draws(weight, draws_per_example * weight**2 / divisor(jnp.sum(w * w)))


def _no_weight():
    return jnp.zeros([], float)


def _given(extra_args: dict[str, Any]) -> Given:
    """Returns those of the extra arguments that an estimator reads."""
    names = [name for name in Given._fields if name in extra_args]
    return Given(**{name: extra_args[name] for name in names})


def closed_form(
    name: str,
    nll: NegativeLogLikelihood,
    estimate: Callable[[Problem], Any],
    needs_labels: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds an estimator without randomness from `estimate(problem) -> diagonal`."""

    def init_fn(params):
        del params
        return EstimatorState(_no_weight())

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del updates, state
        given = _given(extra_args)
        diagonal, weight = _evaluate(
            name,
            nll,
            params,
            given,
            lambda problem, _: estimate(problem),
            None,
            lambda real: real,
            needs_labels,
        )
        return _restore(diagonal, params), EstimatorState(weight)

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
    name: str,
    nll: NegativeLogLikelihood,
    estimate: Callable[[Problem, jax.Array], tuple[Any, Any]],
    key: jax.Array,
    standard_error: bool = False,
    draws_per_example: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds an estimator from `estimate(problem, key) -> diagonal, standard error`.

    `draws_per_example` is given where the standard error takes inputs as drawn too.
    """
    key_data(key)  # Raises on anything but a key.
    impl = jax.random.key_impl(key) if is_key(key) else None

    def init_fn(params) -> Any:
        error = None
        if standard_error:
            error = jax.tree.map(lambda w: full_like(w, jnp.inf), params)
        draws = Draws(_no_weight(), _no_weight()) if standard_error else None
        if draws_per_example is None:
            draws = None
        return SampledState(key_data(key), error, _no_weight(), draws)

    def estimate_with_draws(problem, key):
        diagonal, error = estimate(problem, key)
        draws = None
        if standard_error and draws_per_example is not None:
            draws = draws_of(problem, draws_per_example)
            draws = Draws(*(jnp.asarray(x, float) for x in draws))
        return diagonal, error, draws

    def update_fn(updates, state, params=None, *, replica=None, **extra_args) -> Any:
        del updates
        following, draw = jax.random.split(
            jax.random.wrap_key_data(state.key, impl=impl)
        )
        if replica is not None:
            draw = jax.random.fold_in(draw, replica)
        (diagonal, error, draws), weight = _evaluate(
            name,
            nll,
            params,
            _given(extra_args),
            estimate_with_draws,
            draw,
            lambda real: (real, real if standard_error else None, None),
            False,
        )
        return _restore(diagonal, params), SampledState(
            key=jax.random.key_data(following),
            standard_error=_restore(error, params) if standard_error else None,
            batch_weight=weight,
            draws=draws,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
