"""PRNG keys among the arguments of a model, and how parts and examples draw apart."""

from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._common.mapped_axes import is_key


def is_prng_key(x: Any) -> bool:
    """Tells whether a leaf holds PRNG keys: typed or legacy ones, one or an array.

    A legacy key is a vector of unsigned 32-bit integers, two with the default
    generator: what `jax.random.PRNGKey` returns, or `jax.random.split` several of.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return False
    return is_key(x) or (x.dtype == jnp.uint32 and x.shape[-1:] == _legacy_shape())


def _legacy_shape() -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape


def fold_keys(tree: Any, index: Any) -> Any:
    """Returns the tree with `index` folded into each PRNG key; other leaves as given.

    Equal indices give equal keys and other indices independent ones. An array of keys
    is folded key by key. Leaves may be anything, functions included.
    """

    def fold(x):
        if not is_prng_key(x):
            return x
        fold_in = jax.random.fold_in
        for _ in range(jnp.ndim(x) - (0 if is_key(x) else 1)):
            fold_in = jax.vmap(fold_in, (0, None))
        return fold_in(x, index)

    return jax.tree.map(fold, tree)


def has_keys(tree: Any) -> bool:
    """Tells whether a tree holds a PRNG key."""
    return any(map(is_prng_key, jax.tree.leaves(tree)))
