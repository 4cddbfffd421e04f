"""Where the loss is looked at: the parameters moved by a perturbation."""

from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import is_real
from fsam_optax._common.norms import widen


def displace(params: Any, eps: Any, dtype: Any | None = None) -> Any:
    """Returns w + eps, added in float32 or wider; `params` itself is not touched.

    The sum is rounded to `dtype`, or to the dtype of each leaf if that is None.
    Leaves that hold no real numbers are returned as they are.
    """

    def move(w, e):
        if not is_real(w):
            return w
        w = jnp.asarray(w)
        return (w.astype(widen(w, e)) + e).astype(dtype or w.dtype)

    return jax.tree.map(move, params, eps)
