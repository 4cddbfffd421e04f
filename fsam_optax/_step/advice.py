"""What to do about errors inside of the functions that a caller passes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from fsam_optax._ball.memory import AverageState
from fsam_optax._ball.perturbation import PerturbationState
from fsam_optax._common.checks import is_nnx_state, is_real
from fsam_optax._common.kinds import holds_ball, is_optimizer, OPTIMIZERS
from fsam_optax._fisher.estimation import EstimatorState, SampledState
from fsam_optax._fisher.refresh_every import RefreshEveryState


@contextlib.contextmanager
def explaining(name: str, params: Any) -> Iterator[None]:
    """Adds what to do to an error of the function `name` of the parameters.

    Only to those that come of the parameters' being other than the function expects;
    any other error passes as it is.
    """
    try:
        yield
    except Exception as error:
        advice = _advice(error, params, name)
        if advice is None:
            raise
        raise TypeError(
            f"`{name}` failed. {advice} It raised {type(error).__name__}: {error}"
        ) from error


def _advice(error: Exception, params: Any, name: str) -> str | None:
    text = str(error)
    call = "grad_fn=jax.grad(pure_loss)" if name == "grad_fn" else "pure_loss"
    if is_nnx_state(params) and "'State' object" in text:
        return (
            "It is given the parameters of a Flax NNX module, an `nnx.State`, not the "
            "module. Either take the gradients from `fsam_optax.nnx.value_and_grad("
            "loss, perturbation)`, which takes the module, and give `nnx.Optimizer` "
            "the base optimizer; or split it, `graphdef, params, rest = nnx.split("
            f"model, nnx.Param, ...)`, and pass `{call}` with `pure_loss = lambda "
            "params: loss(nnx.merge(graphdef, params, rest), batch)`."
        )
    if "NoneType" in text and _has_none(params):
        return (
            "The parameters have None in the places of what is no array, as "
            "`eqx.filter` leaves them, so that they are no model. For Equinox: "
            "`params, static = eqx.partition(model, eqx.is_inexact_array)`, and "
            f"`{call}` with `pure_loss = lambda params: loss(eqx.combine(params, "
            "static), batch)`."
        )
    if isinstance(error, TypeError) and "required positional argument" in text:
        if name == "grad_fn":
            return (
                "It must take the parameters alone: close over the rest, "
                "`grad_fn=lambda p: jax.grad(loss)(p, batch)`."
            )
        return (
            "It takes more arguments than it was given: pass them after the batch, "
            "`f(params, state, batch, *args, **kwargs)`."
        )
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return (
            "Keyword arguments of a call go to the loss: options such as `every` or "
            "`micro_batches` are given to `value_and_grad`, what is for the "
            "perturbation alone as `extra_args={...}`."
        )
    if isinstance(error, TypeError) and "real- or complex-valued inputs" in text:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not is_real(leaf):
                return (
                    f"Leaf {jax.tree_util.keystr(path) or 'at the root'} of `params` "
                    "has no gradient: keep it out of the parameters, and pass it to "
                    "the loss as another argument."
                )
    return None


def _has_none(tree):
    return any(
        x is None for x in jax.tree.leaves(tree, is_leaf=lambda node: node is None)
    )


def check_no_ball(name: str, state: Any, instead: str) -> None:
    """Raises TypeError for the state of a ball in the place of something else."""
    if isinstance(state, PerturbationState):
        raise TypeError(
            f"`{name}` is a perturbation, such as `euclidean_ball`. {instead}"
        )


def check_descends(state: Any) -> None:
    """Raises TypeError for the state of something else in the place of a descent."""
    check_no_ball(
        "descent",
        state,
        "It makes the direction of the step from both gradients, as `surrogate_gap(0.4)"
        "` does: the ball is the `perturbation`.",
    )
    if is_optimizer(state):
        raise TypeError(
            "`descent` is an optimizer. It makes the direction of the step from both "
            "gradients, as `surrogate_gap(0.4)` does: the optimizer is the base, "
            "`sharpness_aware(base, perturbation)`, or takes the gradients of "
            "`value_and_grad`."
        )


def check_ascends(state: Any) -> None:
    """Raises TypeError for the state of something else in the place of a perturbation.

    Of an optimizer, of an estimator alone, of a memory without a ball behind it.
    """
    parts = state if type(state) is tuple else (state,)
    estimators = EstimatorState, SampledState, RefreshEveryState
    in_front = parts[:-1] if holds_ball(parts[-1:]) else ()
    if any(isinstance(part, estimators) for part in (state, *in_front)):
        raise TypeError(
            "`perturbation` is an estimator: its output is a Fisher diagonal and no "
            "eps that is added to the parameters. Put it into a ball, "
            "`fisher_ellipsoid(0.1, estimator)`."
        )

    memories = [isinstance(part, AverageState) for part in parts]
    if parts and (all(memories) or (memories[-1] and holds_ball(parts[:-1]))):
        raise TypeError(
            "`perturbation` ends with `friendly` or `averaged`, which makes a gradient "
            "of gradients: it goes before the ball, `optax.chain(friendly(), "
            "euclidean_ball(0.1))`."
        )

    def is_known(x):
        return isinstance(x, (PerturbationState, *OPTIMIZERS))

    found = [x for x in jax.tree.leaves(state, is_leaf=is_known) if is_known(x)]
    if found and not any(isinstance(x, PerturbationState) for x in found):
        raise TypeError(
            f"`perturbation` is an optimizer: its state has a {type(found[0]).__name__}"
            ". It must map a gradient to eps, which is added to the parameters: "
            "`euclidean_ball(0.05)`, `adaptive_ellipsoid(0.5)` or `fisher_ellipsoid("
            "0.1, estimator)`. The optimizer is the base, `sharpness_aware(base, "
            "perturbation)`, or takes the gradients of `value_and_grad`."
        )
