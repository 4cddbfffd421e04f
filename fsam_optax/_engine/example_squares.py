"""Squared norms of the gradients of examples, at about the price of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from fsam_optax._common.checks import check_function
from fsam_optax._engine.power_sums import sums_and_outputs


PyTree = Any


def example_squares(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    chunk_bytes: int | None = None,
) -> PyTree:
    """Returns the squared norm of the gradient of each example, by parameter.

    For each parameter and example n, ``sum_j (d loss_n / d param_j)^2``: of the squares
    that `loss_power_sums` adds over examples, the sums over entries. Whatever `moves`
    makes of a source is undone by the transpose: it says how often each entry counts.

    Args:
        loss_fn: Loss of one example, `loss_fn(params, example) -> scalar`.
        params: Pytree of floating-point arrays.
        batch: Pytree of arrays with a leading axis of N examples.
        chunk_bytes: See `power_sums`.

    Returns:
        A pytree like `params`, of arrays of shape (N,); float32 or wider.
    """
    check_function("loss_fn", loss_fn)
    ((squares,), _) = sums_and_outputs(
        loss_fn,
        params,
        (batch, None),
        None,
        (2,),
        None,
        chunk_bytes,
        by_example=True,
    )
    return squares
