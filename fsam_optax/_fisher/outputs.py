"""Running a model: on a whole batch, and on one example with keys of its own."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import is_nnx_state, leaf_shape, shape_of
from fsam_optax._common.keys import fold_keys, has_keys
from fsam_optax._common.mapped_axes import is_key
from fsam_optax._engine import as_batch_of_one, depends, over_examples
from fsam_optax._fisher.likelihoods import Likelihood


class Call(NamedTuple):
    """A model with the arguments of one call.

    Attributes:
        apply_fn: `apply_fn(params, inputs, *args, **kwargs)` on a whole batch.
        has_aux: Whether it returns `(outputs, aux)`.
        split_keys: Whether each example folds its row into the keys it is given.
        args: Positional arguments after the inputs.
        kwargs: Keyword arguments.
    """

    apply_fn: Callable[..., Any]
    has_aux: bool
    split_keys: bool
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def holds_keys(self) -> bool:
        """Whether there are PRNG keys among the arguments."""
        return has_keys((self.args, self.kwargs))

    @property
    def one_by_one(self) -> bool:
        """Whether each example draws by a key of its own, so that it runs by itself."""
        return self.split_keys and self.holds_keys

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, Any]:
        """Returns `(outputs, aux)` of a batch, with the keys as they are."""
        try:
            result = self.apply_fn(params, inputs, *self.args, **self.kwargs)
        except Exception as error:
            advice = _advice(error, self, params, inputs)
            if advice is None:
                raise
            raise TypeError(
                f"`apply_fn` failed on the batch. {advice} It raised "
                f"{type(error).__name__}: {error}"
            ) from error
        if not self.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "With `has_aux=True`, `apply_fn` must return `(outputs, aux)`, got "
                f"{type(result).__name__}."
            )
        return result


def count_examples(inputs: Any) -> int:
    """Returns the number of examples, on which all inputs must agree."""
    shapes = [shape_of(x) for x in jax.tree.leaves(inputs)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "The inputs in `batch` must be arrays whose leading axes count the "
            f"examples, got shapes {shapes}."
        )
    return shapes[0][0]


def row_numbers(inputs: Any) -> jax.Array:
    """Returns 0, 1, 2, ... for the examples, sharded over devices as they are."""
    x = next((x for x in jax.tree.leaves(inputs) if not is_key(x)), None)
    number = jnp.arange(count_examples(inputs), dtype=jnp.int32)
    if x is None:
        return number
    zeros = jnp.zeros_like(x, dtype=jnp.int32)
    return number + jnp.sum(zeros, axis=tuple(range(1, zeros.ndim)), dtype=jnp.int32)


def of_example(call: Call, params: Any, example: Any, aux_axes: Any = None) -> Any:
    """Returns `(outputs, aux)` of one example, run as a batch of one.

    Args:
        call: The model.
        params: Its parameters.
        example: Inputs of the example, and its row or None.
        aux_axes: For each leaf of aux, whether its leading axis counts the examples.
    """
    x, row = example
    if call.one_by_one:
        args, kwargs = fold_keys((call.args, dict(call.kwargs)), row)
        call = call._replace(args=args, kwargs=kwargs)
    h, aux = as_batch_of_one(lambda x: call(params, x), x)
    if aux_axes is not None:
        aux = jax.tree.map(lambda own, a: a[0] if own else a, aux_axes, aux)
    return jax.tree.map(lambda h: h[0], h), aux


def of_batch(call: Call, params: Any, inputs: Any) -> tuple[Any, Any]:
    """Returns `(outputs, aux)` of a batch, each example drawing by its own keys."""
    if not call.one_by_one:
        return call(params, inputs)
    axes = aux_axes(call, params, inputs) if call.has_aux else None
    out = jax.tree.map(lambda own: 0 if own else None, axes)

    def run(x, row):
        return of_example(call, params, (x, row), axes)

    return jax.vmap(run, out_axes=(0, out))(inputs, row_numbers(inputs))


def aux_axes(call: Call, params: Any, inputs: Any) -> Any:
    """Tells for each leaf of aux whether its leading axis counts the examples.

    If not, the leaf must be the same for all examples. A mixture of both, a statistic
    over the batch, cannot come from examples that are run one by one.

    Raises:
        ValueError: For a leaf that is neither.
    """

    def resized(size):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), inputs
        )

    def aux_of(x):
        return call(params, x)[1]

    one, two = (jax.eval_shape(aux_of, resized(size)) for size in (1, 2))
    row = jax.ShapeDtypeStruct((), jnp.int32)

    def is_own(path, a, b):
        if (a.shape[:1], b.shape[:1]) == ((1,), (2,)) and a.shape[1:] == b.shape[1:]:
            return True

        def leaf(x, row):
            x = jax.tree.map(lambda x: x[0], x)
            aux = of_example(call, params, (x, row))[1]
            return dict(jax.tree_util.tree_leaves_with_path(aux))[path]

        if a.shape == b.shape and not depends(leaf, resized(1), row):
            return False
        raise ValueError(
            f"Leaf {jax.tree_util.keystr(path) or 'at the root'} of the aux of "
            f"`apply_fn` has shape {a.shape} for one example and {b.shape} for two: "
            "its leading axis must count the examples, because they are run one by "
            "one. A statistic over the batch, such as that of BatchNorm in training "
            "mode, cannot come from that: use fixed statistics, or leave it out of aux."
        )

    return jax.tree_util.tree_map_with_path(is_own, one, two)


def warn_of_statistics(call: Call, params: Any, inputs: Any, traced: Any) -> None:
    """Warns of outputs that take a statistic of the batch, which is to run by examples.

    Of one example it is another one, and the model is another model. `traced` is the
    jaxpr of the outputs.
    """
    if over_examples(lambda p, x: call(p, x)[0], params, inputs, traced):
        warnings.warn(
            "`apply_fn` reduces over the examples of the batch, as BatchNorm does in "
            "training mode, but they are run one by one: the statistic is that of a "
            "single example, and what comes out is of another model. Use fixed "
            "statistics, such as `use_running_average=True`; `check_separable("
            "apply_fn, params, inputs)` tells whether examples mix.",
            stacklevel=2,
        )


def check_outputs(h: Any, likelihood: Likelihood, inputs: Any) -> None:
    """Raises an error unless outputs are what a likelihood takes, for a whole batch."""
    n = count_examples(inputs)
    heads = likelihood.heads
    if heads is None:
        _check_array(h)
    elif jax.tree.structure(h) != heads:
        raise TypeError(
            f"`apply_fn` must return outputs like the heads, {heads}, got "
            f"{jax.tree.structure(h)}."
        )
    shapes = [tuple(x.shape) for x in jax.tree.leaves(h)]
    for shape in shapes:
        if shape[:1] != (n,):
            raise ValueError(
                f"`apply_fn` returned outputs of shape {shape} for {n} examples: they "
                f"must have a leading axis of {n}. If it is written for one example, "
                "pass `jax.vmap(apply_fn, in_axes=(None, 0))`."
                + " If it is a loss, pass the model instead."
                * (shape == ())
            )
        if len(shape) < 2:
            raise ValueError(
                f"`apply_fn` returned outputs of shape {shape}: the last axis must "
                "hold the parameters of one label, as in (N, C) or (N, T, C). For one "
                "number an example return shape (N, 1), with `outputs[..., None]`, and "
                "labels of that shape where the likelihood wants them like the outputs."
            )
    if len({shape[:-1] for shape in shapes}) > 1:
        raise ValueError(
            "The outputs of all heads must have the same shape but for their last "
            f"axes, got {shapes}: labels at several positions and one label an example "
            "are not one label."
        )


def _check_array(h):
    if leaf_shape(h) is not None:
        return
    if isinstance(h, tuple) and len(h) == 2:
        advice = "If the second is aux, pass `has_aux=True` to "
        advice += "`negative_log_likelihood`; else choose one"
    elif isinstance(h, Mapping):
        key = next(iter(h), "logits")
        advice = f"Choose one, `lambda p, x: apply_fn(p, x)[{key!r}]`"
    else:
        advice = "Choose one"
    kind = f"a dict with {sorted(map(str, h))}" if isinstance(h, Mapping) else None
    raise TypeError(
        "`apply_fn` must return one array of outputs, got "
        f"{kind or type(h).__name__}. {advice}; or use `heads` for several outputs "
        "that have a likelihood each."
    )


def _advice(error, call, params, inputs) -> str | None:
    """Returns what to do about an exception of `apply_fn`, if that can be told."""
    text = f"{type(error).__name__} {error}".lower()
    if is_nnx_state(params) and "'state' object" in text:
        return (
            "It takes a Flax NNX module, but was given parameters alone: use the "
            "estimators of `fsam_optax.nnx`, such as `fsam_optax.nnx.fisher_exact("
            "apply_fn, likelihood)`."
        )
    if "shard_map" in text and "divi" in text:
        return (
            "It may be run on single examples, as batches of one, which a `shard_map` "
            "cannot divide among the devices of a batch: give the estimator the model "
            "without the `shard_map`, since `jax.jit` divides its work as the batch "
            "is; or call the estimator within a `shard_map`, and average what it "
            "returns."
        )
    if "type auto" in text and "axis name" in text:
        return (
            "It names shardings of Explicit axes, which single examples cannot have: "
            "give the estimator the same model without `out_sharding=` and "
            "`jax.reshard`, as the axes are left to the compiler there. A mesh of Auto "
            "axes takes a model with `jax.lax.with_sharding_constraint` as it is."
        )
    if not call.holds_keys and ("rng" in text or "prng" in text):
        return (
            "It needs PRNG keys: give them to the loss, `nll(params, batch, "
            "rngs={'dropout': key})`, and to an estimator by `loss_kwargs={'rngs': "
            "{'dropout': key}}`, or run the model without dropout."
        )
    if isinstance(error, TypeError) and "required positional argument" in text:
        return (
            "It takes more arguments than it was given: pass them after the batch, "
            "`nll(params, batch, *args)`, and to an estimator by `loss_args=`."
        )
    if isinstance(inputs, tuple) and isinstance(error, TypeError) and "'tuple'" in text:
        return (
            "Its inputs are a tuple: where `apply_fn, likelihood` stand in place of "
            "a `negative_log_likelihood`, functions of `fsam_optax.variance` take the "
            "inputs alone, not `(inputs, targets)`."
        )
    try:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
        alone = jax.eval_shape(
            lambda p, x: call.apply_fn(p, x, *call.args, **call.kwargs), params, one
        )
        if all(x.ndim for x in jax.tree.leaves(alone)):
            return (
                "It runs on one example, without a batch axis: pass "
                "`jax.vmap(apply_fn, in_axes=(None, 0))`."
            )
    except Exception:  # Then it is another fault, and the first error tells it.
        pass
    if "values to unpack" in text:
        return (
            "It is given the inputs alone. If it is a loss, which takes the targets "
            "too, pass the model, `apply_fn(params, inputs) -> outputs`."
        )
    return None
