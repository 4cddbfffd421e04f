"""The negative log-likelihood of a module, as one of its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx

from fsam_optax._common.checks import describe
from fsam_optax._common.rest import Rest
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import (
    negative_log_likelihood,
    NegativeLogLikelihood,
)
from fsam_optax._nnx.modules import changes, copies, PureLoss, split, write


@dataclasses.dataclass(frozen=True)
class PureModel:
    """A model that takes a module, as a function of its parameters and its rest.

    Attributes:
        apply_fn: `apply_fn(model, inputs, *args, **kwargs)`.
        has_aux: Whether it returns `(outputs, aux)`.
    """

    apply_fn: Callable[..., Any]
    has_aux: bool

    def __call__(self, params: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns `(outputs, (aux, changes))`."""
        if not args or not isinstance(args[0], Rest):
            raise TypeError(
                "The model takes a Flax NNX module, but was given its parameters "
                "alone: call `value_and_grad`, `diagonal` and so on from "
                "`fsam_optax.nnx`, which pass the rest of the module on."
            )
        run = copies(params, args[0], args[1:], kwargs)
        result = self.apply_fn(run.nodes[0], inputs, *run.args, **run.kwargs)
        if not self.has_aux:
            return result, (None, changes(run))
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "With `has_aux=True`, `apply_fn` must return `(outputs, aux)`, got "
                f"{type(result).__name__}."
            )
        return result[0], (result[1], changes(run))


@dataclasses.dataclass(frozen=True)
class ModuleLoss(NegativeLogLikelihood):
    """A loss that knows its module and its likelihood; see `negative_log_likelihood`.

    To front ends and estimators it is a loss of parameters, with the rest of the module
    as the first argument after the batch, and the changes to it beside aux.
    """

    takes_rest: ClassVar[bool] = True

    @property
    def model_has_aux(self) -> bool:
        """Whether the model returns `(outputs, aux)`."""
        return getattr(self.apply_fn, "has_aux", False)

    def __call__(self, params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of a module, which it updates, or `(loss, aux)`."""
        if args and isinstance(args[0], Rest):
            return super().__call__(params, batch, *args, **kwargs)
        # Keys among the rest, so that each example folds its row into them.
        call = split(params, args, kwargs, nnx.Not(nnx.RngState))
        loss, (aux, changed) = super().__call__(
            call.params, batch, *call.args, **call.kwargs
        )
        write(call, changed)
        return (loss, aux) if self.model_has_aux else loss


def of_module(
    caller: str, model: Any, likelihood: Likelihood | None = None, **options: Any
) -> ModuleLoss:
    """Returns the loss of a module that `(model, likelihood)` is short for."""
    if isinstance(model, ModuleLoss) and likelihood is None:
        return model
    if isinstance(model, NegativeLogLikelihood) and likelihood is None:
        raise TypeError(_OF_PARAMS.format(f"`{caller}` of `fsam_optax.nnx`"))
    if isinstance(model, nnx.Module):
        raise TypeError(
            f"`{caller}` takes a function of the module, "
            "`apply_fn(model, inputs) -> outputs`, such as `lambda model, x: "
            f"model(x)`, got a {type(model).__name__}: the module itself comes with "
            "each call, so that it has the statistics of the moment."
        )
    has_aux = options.pop("has_aux", False)
    plain = negative_log_likelihood(model, likelihood, **options)  # pyright: ignore
    return ModuleLoss(
        PureModel(plain.apply_fn, has_aux),
        plain.likelihood,
        plain.unpack,
        True,
        plain.split_keys,
    )


_OF_PARAMS = (
    "{} was given a `fsam_optax.negative_log_likelihood`, a function of parameters. "
    "Use `fsam_optax.nnx.negative_log_likelihood(apply_fn, likelihood)`, whose "
    "`apply_fn(model, inputs)` takes the module."
)


def pure_loss(loss_fn: Any, has_aux: bool, needs_model: str | None) -> Any:
    """Returns the loss as a pure function that returns `(loss, (aux, changes))`.

    Raises:
        TypeError: If it is no loss of a module, does not return what `has_aux` says, or
            does not know its model where an option named `needs_model` wants that.
    """
    if isinstance(loss_fn, ModuleLoss):
        if loss_fn.model_has_aux != has_aux:
            raise TypeError(
                f"`loss_fn` was made with `has_aux={loss_fn.model_has_aux}`: pass the "
                "same to `value_and_grad`."
            )
        return loss_fn
    if isinstance(loss_fn, NegativeLogLikelihood):
        raise TypeError(_OF_PARAMS.format("`loss_fn`"))
    if needs_model:
        raise TypeError(
            f"`{needs_model}=True` needs a loss that knows its model: "
            "`fsam_optax.nnx.negative_log_likelihood(apply_fn, likelihood)` as "
            f"`loss_fn`, got {describe(loss_fn)}."
        )
    # What is no function is explained by the front end for parameters.
    return PureLoss(loss_fn, has_aux) if callable(loss_fn) else loss_fn
