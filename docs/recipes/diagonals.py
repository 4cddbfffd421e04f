"""The diagonals that the recipes compare, each of a whole task at once."""

from typing import Any

import jax
import jax.numpy as jnp

import fsam_optax as fsam


EXACT, EMPIRICAL, SQUARED = "exact F", "empirical F", "squared gradient"


def squared(batch: int) -> str:
    """Returns the name of the mean square of gradients of so many examples."""
    return f"{SQUARED}, {batch}"


def diagonal(name: str, loss: Any, params: Any, data: Any, *args: Any) -> Any:
    """Returns a diagonal, a mean over the examples; `args` follow them in the loss.

    `squared` names what much code calls Fisher: the mean over batches of the square of
    their gradient, where what does not fill a batch is left out.
    """
    if name in (EXACT, EMPIRICAL):
        make = fsam.fisher_exact if name == EXACT else fsam.fisher_empirical
        return fsam.diagonal(make(loss), params, data, loss_args=args)
    size = min(int(name.rsplit(", ")[1]), len(data[1]))
    count = len(data[1]) // size

    def add(total, batch):
        gradient = jax.grad(loss)(params, batch, *args)
        return jax.tree.map(lambda t, g: t + g**2 / count, total, gradient), None

    batches = jax.tree.map(
        lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), data
    )
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]
