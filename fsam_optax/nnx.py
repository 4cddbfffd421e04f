"""The gradient oracle, the loss and the estimators for Flax NNX modules.

Import it as `from fsam_optax import nnx as fsam_nnx`. It needs `flax`, which importing
`fsam_optax` alone does not. Perturbations and optimizers are those of `fsam_optax`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._engine import Explanation
from fsam_optax._fisher import (
    dataset as _dataset,
    diagonal as _diagonal,
    estimators as _estimators,
    explain as _explain,
    gnb as _gnb,
    i2 as _i2,
)
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._nnx import modules
from fsam_optax._nnx.example_gradients import clipped_gradient, per_example_norms
from fsam_optax._nnx.likelihood import ModuleLoss, of_module, pure_loss
from fsam_optax._nnx.statistics import merged_changes
from fsam_optax._step import value_and_grad as _plain
from fsam_optax._step.value_and_grad import (
    LaggedState,
    ValueAndGrad,
    ValueAndGradState,
)


__all__ = [
    "clipped_gradient",
    "dataset_diagonal",
    "diagonal",
    "explain",
    "fisher_empirical",
    "fisher_exact",
    "fisher_gnb",
    "fisher_hutchinson",
    "fisher_i1",
    "fisher_i2",
    "negative_log_likelihood",
    "per_example_norms",
    "value_and_grad",
]


def value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    wrt: Any = nnx.Param,
    descent: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    micro_batches: int | None = None,
    merge_aux: Callable[[Any], Any] | None = None,
    every: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 1,
    empirical_fisher: bool = False,
    lagged: bool = False,
    functional: bool = False,
    perturb_dtype: jax.typing.DTypeLike | None = None,
    axis_name: AxisName = None,
    metrics: bool = True,
) -> ValueAndGrad:
    """Returns the loss of a module at w and its gradient at w + eps.

    Does for `flax.nnx.value_and_grad` what `fsam_optax.value_and_grad` does for
    `jax.value_and_grad`. The module, and every other graph node among the arguments of
    the loss (`nnx.Rngs`, further modules, metrics), starts both passes from the same
    state, so that dropout draws the same mask in both; afterwards it holds what the
    clean pass left: BatchNorm statistics, counts of random streams and metrics advance
    once, with unperturbed weights.

    Args:
        loss_fn: `loss_fn(model, batch, *args, **kwargs)` returns a scalar, a mean over
            the batch, or `(scalar, aux)`; or it is a `negative_log_likelihood` of this
            module.
        perturbation: Maps a gradient to eps. A Fisher is that of an estimator of this
            module, such as `fisher_exact`: it has the statistics of the moment.
        wrt: Filter for the variables of the model to differentiate, perturb and train.
        descent: See `fsam_optax.value_and_grad`.
        has_aux: Whether `loss_fn` returns `(scalar, aux)`.
        micro_batches: See `fsam_optax.value_and_grad`. Every micro-batch starts from
            the same state, but for PRNG keys, into which its number is folded.
            Afterwards floating-point variables are averaged over the micro-batches,
            weighted by their labels where the loss is a `negative_log_likelihood` (a
            batch of weight 0 changes none), and keys are what they were before: only
            their counts advance.
        merge_aux: See `fsam_optax.value_and_grad`.
        every: See `fsam_optax.value_and_grad`.
        empirical_fisher: See `fsam_optax.value_and_grad`.
        lagged: See `fsam_optax.value_and_grad`. What the one pass, at w + eps, left is
            written back.
        functional: See `fsam_optax.value_and_grad`.
        perturb_dtype: See `fsam_optax.value_and_grad`.
        axis_name: See `fsam_optax.value_and_grad`. What the clean pass left is averaged
            over devices, as over micro-batches.
        metrics: See `fsam_optax.value_and_grad`.

    Returns:
        An oracle `f`. `f.init(model)` makes its state, and
        `f(model, state, batch, *args, **kwargs)` updates the graph nodes among its
        arguments in place, the parameters excepted, and returns
        `(value, grads, state)`, or `((value, aux), grads, state)`. `grads` is the
        `nnx.State` that `nnx.Optimizer.update(model, grads)` takes.

    Raises:
        TypeError: In a call, if model is no NNX module, or if `loss_fn` does not return
            what `has_aux` says.
        ValueError: In a call, if `wrt` selects no variable; and as
            `fsam_optax.value_and_grad`.

    Examples:
        A training step with BatchNorm, Dropout and a Fisher of the model as it is
        evaluated:

        >>> from flax import nnx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import categorical, fisher_ellipsoid
        >>> from fsam_optax import nnx as fsam_nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.hidden = nnx.Linear(4, 8, rngs=rngs)
        ...         self.norm = nnx.BatchNorm(8, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.2)
        ...         self.out = nnx.Linear(8, 3, rngs=rngs)
        ...     def __call__(self, x, rngs=None):
        ...         x = nnx.relu(self.norm(self.hidden(x)))
        ...         return self.out(self.dropout(x, rngs=rngs))
        >>> def loss_fn(model, batch, rngs):
        ...     x, y = batch
        ...     logits = model(x, rngs)
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        >>> def evaluate(model, x, rngs):  # It is given a copy of the model.
        ...     model.eval()
        ...     return model(x)
        >>> estimator = fsam_nnx.fisher_empirical(evaluate, categorical)
        >>> f = fsam_nnx.value_and_grad(loss_fn, fisher_ellipsoid(0.1, estimator))
        >>> @nnx.jit
        ... def train_step(model, optimizer, state, batch, rngs):
        ...     value, grads, state = f(model, state, batch, rngs)
        ...     optimizer.update(model, grads)
        ...     return value, state
        >>> model, rngs = Net(nnx.Rngs(0)), nnx.Rngs(dropout=1)
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        >>> x = jax.random.normal(jax.random.key(2), (32, 4))
        >>> batch = x, jnp.argmax(x[:, :3], axis=1)
        >>> state, values = f.init(model), []
        >>> for _ in range(30):
        ...     value, state = train_step(model, optimizer, state, batch, rngs)
        ...     values.append(value)
        >>> print(values[-1] < 0.6 * values[0], rngs.dropout.count[...])
        True 30
    """
    _plain.check_merge_aux(merge_aux, micro_batches, has_aux)
    needs_model = "empirical_fisher" if empirical_fisher else None
    needs_model = "functional" if functional else needs_model
    pure = pure_loss(loss_fn, has_aux, needs_model)
    oracle = _plain.value_and_grad(
        pure,
        perturbation,
        descent=descent,
        has_aux=True,
        micro_batches=micro_batches,
        every=every,
        empirical_fisher=empirical_fisher,
        lagged=lagged,
        functional=functional,
        perturb_dtype=perturb_dtype,
        axis_name=axis_name,
        metrics=metrics,
    )

    def init_fn(model: Any) -> ValueAndGradState | LaggedState:
        return oracle.init(modules.params_of(model, wrt))

    def apply_fn(model, state, batch, *args, extra_args=None, **kwargs):
        if modules.has_nodes(batch):
            raise TypeError(
                "`batch` must hold arrays alone, but there is a graph node in it: pass "
                "it as a further argument, `f(model, state, batch, node)`."
            )
        call = modules.split(model, args, kwargs, wrt)
        (value, (aux, changes)), grads, state = oracle(
            call.params, state, batch, *call.args, extra_args=extra_args, **call.kwargs
        )
        modules.write(
            call,
            merged_changes(pure, call, batch, changes, micro_batches, axis_name),
        )
        if merge_aux is not None:
            aux = merge_aux(aux)
        return ((value, aux) if has_aux else value), grads, state

    def explain_fn(model, batch, *args, extra_args=None, **kwargs):
        call = modules.split(model, args, kwargs, wrt)
        return oracle.explain(
            call.params, batch, *call.args, extra_args=extra_args, **call.kwargs
        )

    return ValueAndGrad(init_fn, apply_fn, explain_fn)


def negative_log_likelihood(
    apply_fn: Callable[..., Any],
    likelihood: Likelihood,
    *,
    unpack: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    split_keys: bool = True,
) -> ModuleLoss:
    """Returns `fsam_optax.negative_log_likelihood` over modules.

    The loss may be called by itself; it then updates the module, as any loss does.
    Estimators, `diagonal` and `value_and_grad` of this module take it in the place of
    `(apply_fn, likelihood)`. They give it a copy of the module, with the statistics,
    keys and counts of the moment: what travels with the parameters, as the first of
    `loss_args`, is the rest of the module.

    Keys of the module (of Dropout) and of `nnx.Rngs` among the arguments are folded
    with the row of each example, which then runs by itself. A module that mixes
    examples, as BatchNorm does in training mode, cannot run so: as a loss it needs
    `split_keys=False`, and an estimator a function that evaluates it.

    Args:
        apply_fn: The model, `apply_fn(model, inputs, *args, **kwargs) -> outputs` on a
            whole batch.
        likelihood: See `fsam_optax.negative_log_likelihood`.
        unpack: See there.
        has_aux: Whether `apply_fn` returns `(outputs, aux)`; see there.
        split_keys: See there.

    Returns:
        A function `loss(model, batch, *args, **kwargs) -> scalar`, or `(scalar, aux)`,
        in nats per label.

    Raises:
        TypeError: If apply_fn is no function or likelihood no `Likelihood`; in a call,
            as `fsam_optax.negative_log_likelihood`.
        ValueError: In a call, as `fsam_optax.negative_log_likelihood`; in an estimator
            or the one pass, if the module updates statistics over the batch.

    Examples:
        Gradient and exact empirical Fisher from one pass, with a mask for each example:

        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli, fisher_ellipsoid, given
        >>> from fsam_optax import nnx as fsam_nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
        ...         self.linear = nnx.Linear(2, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.linear(self.dropout(x))
        >>> loss_fn = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), bernoulli)
        >>> f = fsam_nnx.value_and_grad(
        ...     loss_fn, fisher_ellipsoid(0.1, given()), empirical_fisher=True
        ... )
        >>> model = Net(nnx.Rngs(0))
        >>> batch = jnp.ones((4, 2)), jnp.ones((4, 1))
        >>> _, grads, state = nnx.jit(f)(model, f.init(model), batch)
        >>> print(model.dropout.rngs.count[...], state.sharpness > 0)
        1 True
    """
    options = {"unpack": unpack, "has_aux": has_aux, "split_keys": split_keys}
    return of_module("negative_log_likelihood", apply_fn, likelihood, **options)


def _of_modules(estimator):
    """Returns an estimator that takes a function of a module."""
    name = estimator.__name__

    @functools.wraps(estimator)
    def over_modules(model, likelihood=None, **options):
        return estimator(of_module(name, model, likelihood), **options)

    over_modules.__module__ = __name__
    over_modules.__doc__ = f"""Returns `fsam_optax.{name}` over modules.

    Takes `apply_fn(model, inputs, *args, **kwargs) -> outputs` and a likelihood, or a
    `negative_log_likelihood` of this module, and the options that
    `fsam_optax.{name}` takes. `apply_fn` is given a copy of the module as it is at the
    moment; it may change it, by `model.eval()` say. Not for parameters alone: the
    estimator needs what `value_and_grad` and `diagonal` of this module hand over.
    """
    return over_modules


fisher_empirical = _of_modules(_estimators.fisher_empirical)
fisher_exact = _of_modules(_estimators.fisher_exact)
fisher_gnb = _of_modules(_gnb.fisher_gnb)
fisher_hutchinson = _of_modules(_estimators.fisher_hutchinson)
fisher_i1 = _of_modules(_estimators.fisher_i1)
fisher_i2 = _of_modules(_i2.fisher_i2)


def diagonal(
    estimator: optax.GradientTransformation,
    model: Any,
    batch: Any,
    *,
    wrt: Any = nnx.Param,
    key: jax.Array | None = None,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    **extra_args: Any,
) -> Any:
    """Returns `fsam_optax.diagonal` of a module, which stays as it is.

    Args:
        estimator: An estimator of this module that does not read the gradient.
        model: The module.
        batch: See `fsam_optax.diagonal`.
        wrt: Filter for the variables of the model to differentiate.
        key: See `fsam_optax.diagonal`.
        loss_args: Arguments of `apply_fn` after the inputs; graph nodes may be among
            them.
        loss_kwargs: Keyword arguments of `apply_fn`, likewise.
        **extra_args: See `fsam_optax.diagonal`.

    Returns:
        The diagonal, an `nnx.State` like `nnx.state(model, wrt)`.

    Raises:
        TypeError: If model is no NNX module; and as `fsam_optax.diagonal`.
        ValueError: If `wrt` selects no variable, or the model updates statistics over
            the batch, as BatchNorm does in training mode.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import nnx as fsam_nnx, poisson
        >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> model.kernel[...] = jnp.zeros((1, 1))
        >>> estimator = fsam_nnx.fisher_exact(lambda model, x: model(x), poisson)
        >>> batch = jnp.array([[1.0], [3.0]]), None
        >>> print(fsam_nnx.diagonal(estimator, model, batch)["kernel"][...])
        [[5.]]
    """
    call = modules.split(model, loss_args, dict(loss_kwargs or {}), wrt)
    return _diagonal.diagonal(
        estimator,
        call.params,
        batch,
        key=key,
        loss_args=call.args,
        loss_kwargs=call.kwargs,
        **extra_args,
    )


def dataset_diagonal(
    estimator: optax.GradientTransformation,
    model: Any,
    batches: Iterable[Any],
    *,
    wrt: Any = nnx.Param,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Returns `fsam_optax.dataset_diagonal` of a module, which stays as it is.

    Args:
        estimator: An estimator of this module.
        model: The module.
        batches: See `fsam_optax.dataset_diagonal`.
        wrt: Filter for the variables of the model to differentiate.
        loss_args: Arguments of `apply_fn` after the inputs; see `diagonal`.
        loss_kwargs: Keyword arguments of `apply_fn`, likewise.
        **options: The other options of `fsam_optax.dataset_diagonal`.

    Returns:
        The diagonal, an `nnx.State` like `nnx.state(model, wrt)`; with
        `standard_error`, the pair of it and its error.

    Raises:
        TypeError: If model is no NNX module; and as `fsam_optax.dataset_diagonal`.
        ValueError: As `diagonal` and `fsam_optax.dataset_diagonal`.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import nnx as fsam_nnx, poisson
        >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> model.kernel[...] = jnp.zeros((1, 1))
        >>> estimator = fsam_nnx.fisher_exact(lambda model, x: model(x), poisson)
        >>> loader = [(jnp.array([[1.0], [3.0]]), None), (jnp.array([[2.0]]), None)]
        >>> print(fsam_nnx.dataset_diagonal(estimator, model, loader)["kernel"][...])
        [[4.6666665]]
    """
    call = modules.split(model, loss_args, dict(loss_kwargs or {}), wrt)
    given = {"loss_args": call.args, "loss_kwargs": call.kwargs, **options}
    return _dataset.dataset_diagonal(estimator, call.params, batches, **given)


def explain(
    nll: ModuleLoss,
    model: Any,
    batch: Any,
    *args: Any,
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> Explanation:
    """Returns `fsam_optax.explain` of a module: how its squared gradients are formed.

    Args:
        nll: A `negative_log_likelihood` of this module.
        model: The module, which stays as it is.
        batch: See `fsam_optax.explain`.
        *args: Further arguments of the model; graph nodes may be among them.
        wrt: Filter for the variables of the model to differentiate.
        **kwargs: Further keyword arguments of the model, likewise.

    Returns:
        One `Leaf` for each variable; a table when printed.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from fsam_optax import nnx as fsam_nnx, poisson
        >>> nll = fsam_nnx.negative_log_likelihood(lambda model, x: model(x), poisson)
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> batch = jnp.ones((8, 3)), jnp.ones((8, 2))
        >>> for leaf in fsam_nnx.explain(nll, model, batch):
        ...     print(leaf.shape, leaf.rule)
        (2,) reduction
        (3, 2) outer product
    """
    call = modules.split(model, args, kwargs, wrt)
    nll = of_module("explain", nll)
    return _explain.explain(nll, call.params, batch, *call.args, **call.kwargs)
