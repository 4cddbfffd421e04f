"""Checks of arguments, made while tracing and on shapes, types and Python numbers."""

import numbers
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def describe(value: Any) -> str:
    """Returns what an argument is, in a few words."""
    if isinstance(value, optax.GradientTransformation):
        return "an optax.GradientTransformation"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    leaves = jax.tree.leaves(value)
    if leaves and leaves[0] is not value:
        arrays = all(hasattr(x, "dtype") for x in leaves)
        return f"a {type(value).__name__}{' of arrays' * arrays}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function `{value.__name__}`"
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"


def _scalar(name: str, value: Any, what: str) -> Any:
    """Returns a number or scalar array; raises TypeError for anything else."""
    is_number = isinstance(value, numbers.Real) or hasattr(value, "dtype")
    if not is_number or isinstance(value, bool) or leaf_shape(value) != ():
        raise TypeError(f"`{name}` must be {what}, got {describe(value)}.")
    return value.item() if isinstance(value, np.ndarray) else value


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = sys.float_info.max,
    open: bool = False,
) -> None:
    """Raises ValueError unless a Python number is in [low, high], or (low, high].

    Scalar arrays and traced values pass: nothing is known of them here.
    """
    value = _scalar(name, value, "a number")
    if not isinstance(value, numbers.Real):
        return
    number = float(value)
    if not low <= number <= high or (open and number == low):
        end = "inf)" if high == sys.float_info.max else f"{high:g}]"
        raise ValueError(
            f"`{name}` must be a number in {'(' if open else '['}{low:g}, {end}, got "
            f"{value}."
        )


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless a Python number is an integer of at least 1.

    Scalar arrays and traced values pass: nothing is known of them here.
    """
    value = _scalar(name, value, "an integer of at least 1")
    if isinstance(value, numbers.Real) and not (
        isinstance(value, numbers.Integral) and int(value) >= 1
    ):
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value}.")


def check_every(every: Any) -> None:
    """Raises unless `every` is a count of steps or a function of the step."""
    if not callable(every):
        check_count("every", every)


def describe_state(state: Any) -> str:
    """Returns what stands in the place of a state, in a few words."""
    parts = [type(x).__name__ for x in state] if isinstance(state, tuple) else []
    if parts and all(name.endswith("State") for name in parts):
        return f"the state of another optimizer ({parts[0]})"
    return type(state).__name__


def check_state(
    caller: str,
    state: Any,
    kind: type,
    init: Callable[[Any], Any],
    params: Any,
) -> None:
    """Raises unless `state` is what `init(params)` returns, in structure and shapes."""
    first = f"`state = {caller}.init(params)`"
    how = f"the first one is {first}, each other what the step before returned"
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be a {kind.__name__}, got {describe_state(state)}: {how}."
        )
    try:
        check_like(
            "state", state, f"{caller}.init(params)", jax.eval_shape(init, params)
        )
    except ValueError as error:
        raise ValueError(
            f"`state` does not belong to these parameters and settings: {error} Here "
            f"{how}; one of another perturbation, optimizer or model does not fit."
        ) from None


def check_function(name: str, value: Any) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {describe(value)}.")


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raises ValueError unless `value` is one of some strings."""
    if not isinstance(value, str) or value not in choices:
        *some, last = (f'"{choice}"' for choice in choices)
        raise ValueError(
            f"`{name}` must be {', '.join(some)} or {last}, got {value!r}."
        )


def check_dtype(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is None or a real floating-point dtype."""
    try:
        floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(
            f"`{name}` must be a floating-point dtype such as jnp.float32, or None, "
            f"got {value!r}."
        )


def check_transformation(name: str, value: Any, example: str) -> None:
    """Raises TypeError unless `value` is an Optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        convertible = hasattr(value, "gradient_transformation")
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, such as {example}, "
            f"got {describe(value)}."
            + " Call its `.gradient_transformation()`." * convertible
            + f" Call it first: `{getattr(value, '__name__', name)}(...)`."
            * (callable(value) and not convertible)
        )


def check_params(
    caller: str, params: Any, call: str = "update(grads, state, params)"
) -> None:
    """Raises unless `params` was passed, the parameters and not what holds them."""
    if hasattr(params, "apply_gradients"):
        raise TypeError(
            f"`params` is a {type(params).__name__}: pass the parameters in it, "
            "`state.params`."
        )
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(
            "`params` are the two of `optax.lookahead`: pass the fast ones, "
            "`params.fast`, and give the gradients to its `update`."
        )
    if params is None:
        raise ValueError(
            f"`{caller}` needs the current value of the parameters, but `params` was "
            f"not passed: call `{call}`."
        )


def leaf_shape(leaf: Any) -> tuple[int, ...] | None:
    """Returns the shape of an array or Python number, None for anything else."""
    if isinstance(leaf, bool | numbers.Number):
        return ()
    return getattr(leaf, "shape", None)


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf that is known to be an array or a number."""
    return leaf_shape(leaf) or ()


def is_nnx_state(tree: Any) -> bool:
    """Tells whether a tree is an `nnx.State`, without importing Flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(tree, nnx.State)


def check_no_module(caller: str, params: Any, instead: str | None = None) -> None:
    """Raises TypeError for a Flax NNX module that holds more than parameters.

    `instead` is the function of `fsam_optax.nnx` to use, if its name is another one.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return

    def is_module(x):
        return isinstance(x, nnx.Module)

    for module in jax.tree.leaves(params, is_leaf=is_module):
        if is_module(module):
            rest = nnx.state(module, nnx.Not(nnx.Param))
            is_pytree = jax.tree.structure(module) != jax.tree.structure(0)
            if jax.tree.leaves(rest) or not is_pytree:
                raise TypeError(
                    f"`params` is a Flax NNX module, {type(module).__name__}, which "
                    f"`fsam_optax.{caller}` would not update beside its parameters "
                    "(statistics of BatchNorm, counts of Dropout): use "
                    f"`fsam_optax.nnx.{instead or caller}` with the module, or pass "
                    "parameters alone, as `nnx.split(model, nnx.Param, ...)` gives "
                    "them."
                )


def is_real(leaf: Any) -> bool:
    """Tells whether a leaf holds real floating-point numbers."""
    dtype = getattr(leaf, "dtype", type(leaf))
    return dtype is float or jnp.issubdtype(dtype, jnp.floating)


def _describe(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


def check_like(name: str, tree: Any, like_name: str, like: Any) -> None:
    """Raises ValueError unless two trees agree in structure and in every shape."""
    shapes, like_shapes = (
        {
            jax.tree_util.keystr(path): leaf_shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(t)
        }
        for t in (tree, like)
    )
    for path in like_shapes | shapes:
        if path not in shapes or path not in like_shapes:
            here, there = (name, like_name) if path in shapes else (like_name, name)
            raise ValueError(
                f"`{name}` must have the structure of `{like_name}`, but leaf "
                f"{path or 'at the root'} is in `{here}` and not in `{there}`."
            )
        if shapes[path] != like_shapes[path]:
            raise ValueError(
                f"`{name}` must have the shapes of `{like_name}`, but leaf "
                f"{path or 'at the root'} is {_describe(shapes[path])} in `{name}` "
                f"and {_describe(like_shapes[path])} in `{like_name}`."
            )
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"`{name}` must have the structure of `{like_name}`, but its containers "
            f"differ: {jax.tree.structure(tree)} against {jax.tree.structure(like)}."
        )


def check_leaves(tree: Any, name: str, real: bool = False, data: bool = False) -> None:
    """Raises TypeError for a leaf that is complex, no array or, if asked, not real.

    Data may be complex: nothing is differentiated by it.
    """

    def where(path):
        return f"leaf {jax.tree_util.keystr(path) or 'at the root'} of `{name}`"

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf_shape(leaf) is None:
            raise TypeError(
                f"{where(path)} is {leaf!r}, not an array: pass only the arrays of the "
                "model. For Equinox: `params, static = eqx.partition(model, "
                "eqx.is_inexact_array)`, `init(params)`, and a loss or `grad_fn` of "
                "these params that calls `eqx.combine(params, static)`: `grad_fn="
                "jax.grad(lambda params: loss(eqx.combine(params, static), batch))`."
            )
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)))
        if jnp.issubdtype(dtype, jnp.complexfloating) and not data:
            raise TypeError(
                f"{where(path)} is complex. Optax does not say whether a complex "
                "gradient is conjugated, so uphill is not defined: keep the real and "
                "the imaginary part as two real leaves."
            )
        if real and not is_real(leaf):
            raise TypeError(
                f"{where(path)} has dtype {dtype}, which has no gradient: pass it to "
                "the loss as another argument."
            )


def is_function(given: Any) -> bool:
    """Tells functions from trees that can be called, as Equinox's modules can.

    A tree of bools or labels is none; one that holds a function, as a partial does, is.
    """
    if not callable(given) or isinstance(given, jax.tree_util.Partial):
        return callable(given)
    return any(map(callable, jax.tree.leaves(given)))


def of_tree(given: Any, tree: Any) -> Any:
    """Returns `given(tree)` for a function, and what is a tree as it is."""
    return given(tree) if is_function(given) else given


def broadcast_mask(mask: Any, tree: Any, name: str) -> Any:
    """Returns a bool for every leaf of `tree`, from a prefix tree or a callable.

    Args:
        mask: Tree of bools that is a prefix of `tree`, or a function of `tree` that
            returns one.
        tree: The parameters, or anything with their structure.
        name: What to call the mask in an error.

    Returns:
        A tree of Python bools with the structure of `tree`.
    """
    mask = of_tree(mask, tree)
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(value, bool | np.bool_):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise TypeError(
                f"`{name}` must hold Python bools, known before tracing, in the "
                "structure of the parameters or of their upper levels; got "
                f"{describe(value)}{where}."
            )

    def spread(value, subtree):
        return jax.tree.map(lambda _: bool(value), subtree)

    try:
        return jax.tree.map(spread, mask, tree)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have the structure of the parameters, or of their upper "
            f"levels: {error}"
        ) from error


def movable(updates: Any, params: Any, mask: Any) -> Any:
    """Returns a bool for every leaf: whether it can be perturbed and `mask` lets it.

    `params` may be None.
    """
    like = updates if params is None else params
    return jax.tree.map(
        lambda g, w, keep: keep and is_real(g) and is_real(w),
        updates,
        like,
        broadcast_mask(True if mask is None else mask, like, "mask"),
    )
