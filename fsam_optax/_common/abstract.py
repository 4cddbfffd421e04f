"""Functions of arrays, traced without computing anything."""

from collections.abc import Callable
from typing import Any

import jax


def of_arrays(fn: Callable[..., Any], *trees: Any) -> tuple[Callable[..., Any], list]:
    """Returns a function of the arrays in the trees, and these; they may be abstract.

    Args:
        fn: The function of the trees. What is no array in them it gets as it is.
        *trees: The trees.
    """
    leaves, structure = jax.tree.flatten(trees)
    arrays = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def of_given(given):
        given = iter(given)
        filled = [next(given) if a else x for a, x in zip(arrays, leaves, strict=True)]
        return fn(*structure.unflatten(filled))

    return of_given, [x for a, x in zip(arrays, leaves, strict=True) if a]


def found_abstractly(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns what a function finds out that computes nothing, as `explain` does."""
    found = []

    def record(args, kwargs):
        found.append(fn(*args, **kwargs))

    traced, given = of_arrays(record, args, kwargs)
    jax.eval_shape(traced, given)
    return found[0]
