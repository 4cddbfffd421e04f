"""The gradients of single examples, over modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from fsam_optax._fisher import example_gradients as _plain
from fsam_optax._nnx import modules
from fsam_optax._nnx.likelihood import ModuleLoss, of_module


def per_example_norms(
    nll: ModuleLoss,
    model: Any,
    batch: Any,
    *,
    wrt: Any = nnx.Param,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Returns `fsam_optax.per_example_norms` of a module, which stays as it is.

    Args:
        nll: A `negative_log_likelihood` of this module.
        model: The module.
        batch: See `fsam_optax.per_example_norms`.
        wrt: Filter for the variables of the model to differentiate.
        loss_args: Arguments of `apply_fn` after the inputs; graph nodes may be among
            them.
        loss_kwargs: Keyword arguments of `apply_fn`, likewise.
        **options: The other options of `fsam_optax.per_example_norms`.

    Returns:
        The norms, shape (N,); with `by_leaf` an `nnx.State` of them.

    Raises:
        TypeError: If model is no NNX module; and as `fsam_optax.per_example_norms`.
        ValueError: If `wrt` selects no variable, or the model updates statistics over
            the batch, as BatchNorm does in training mode.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian, nnx as fsam_nnx
        >>> nll = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), gaussian())
        >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> model.kernel[...] = jnp.zeros((2, 1))
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[2.0], [1.0]])
        >>> print(fsam_nnx.per_example_norms(nll, model, batch))
        [10.  1.]
    """
    call = modules.split(model, loss_args, dict(loss_kwargs or {}), wrt)
    given = {"loss_args": call.args, "loss_kwargs": call.kwargs, **options}
    nll = of_module("per_example_norms", nll)
    return _plain.per_example_norms(nll, call.params, batch, **given)


def clipped_gradient(
    nll: ModuleLoss,
    model: Any,
    batch: Any,
    *,
    max_norm: jax.typing.ArrayLike,
    wrt: Any = nnx.Param,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, jax.Array]:
    """Returns `fsam_optax.clipped_gradient` of a module, which stays as it is.

    Args:
        nll: A `negative_log_likelihood` of this module.
        model: The module.
        batch: See `fsam_optax.clipped_gradient`.
        max_norm: See there.
        wrt: Filter for the variables of the model to differentiate.
        loss_args: Arguments of `apply_fn` after the inputs; see `per_example_norms`.
        loss_kwargs: Keyword arguments of `apply_fn`, likewise.
        **options: The other options of `fsam_optax.clipped_gradient`.

    Returns:
        The gradient, an `nnx.State` that `nnx.Optimizer.update` takes; and the norms.

    Raises:
        TypeError: As `per_example_norms`.
        ValueError: As `per_example_norms`.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian, nnx as fsam_nnx
        >>> nll = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), gaussian())
        >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> model.kernel[...] = jnp.zeros((2, 1))
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[10.0], [1.0]])
        >>> clipped = nnx.jit(fsam_nnx.clipped_gradient, static_argnums=0)
        >>> grads, _ = clipped(nll, model, batch, max_norm=5.0)
        >>> print(grads["kernel"][...].T)
        [[-1.5 -2.5]]
    """
    call = modules.split(model, loss_args, dict(loss_kwargs or {}), wrt)
    given = {"loss_args": call.args, "loss_kwargs": call.kwargs, **options}
    nll = of_module("clipped_gradient", nll)
    return _plain.clipped_gradient(nll, call.params, batch, max_norm=max_norm, **given)
