"""Sharpness-aware minimisation as the stateful counterpart of `jax.value_and_grad`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from fsam_optax._ball.arguments import check_flag
from fsam_optax._common.checks import (
    check_count,
    check_dtype,
    check_every,
    check_transformation,
    describe,
)
from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._fisher.negative_log_likelihood import (
    NegativeLogLikelihood,
)
from fsam_optax._step import lagged as lagged_step, oracle
from fsam_optax._step.explain import StepExplanation
from fsam_optax._step.lagged import LaggedState
from fsam_optax._step.oracle import ValueAndGradState
from fsam_optax._step.passes import (
    clean_pass,
    clean_pass_with_fisher,
    functional_clean_pass,
)
from fsam_optax._step.step import (
    always,
    Rule,
)


_MISSING: Any = object()


@dataclasses.dataclass(frozen=True)
class ValueAndGrad:
    """A gradient oracle: call it as `f(params, state, batch, *args, **kwargs)`.

    Attributes:
        init: `init(params) -> state`.
        apply: What calling the oracle does.
        explain: `explain(params, batch, *args, **kwargs)` tells what each pass of a
            perturbed step computes and costs, as a table when printed.
    """

    init: Callable[[Any], Any]
    apply: Callable[..., tuple[Any, Any, Any]]
    explain: Callable[..., StepExplanation]

    def __call__(
        self,
        params: Any,
        state: ValueAndGradState | LaggedState = _MISSING,
        batch: Any = _MISSING,
        *args,
        **kwargs,
    ) -> tuple[Any, Any, Any]:
        """Returns `(value, grads, state)`, or `((value, aux), grads, state)`."""
        if state is _MISSING or batch is _MISSING:
            raise TypeError(
                "Call it as `value, grads, state = f(params, state, batch)`; the first "
                "state is `f.init(params)`."
            )
        states = ValueAndGradState | LaggedState
        if any(isinstance(x, states) for x in (params, batch)):
            raise TypeError(
                "A state of `value_and_grad` is not where it belongs: call `value, "
                "grads, state = f(params, state, batch)`."
            )
        return self.apply(params, state, batch, *args, **kwargs)


def value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
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
    """Returns the loss at w and its gradient at the perturbed parameters w + eps.

        value = loss(w)
        grads = grad loss(w + eps)         eps = perturbation(grad loss(w))

    With several micro-batches, each has an eps of its own and the gradients are
    averaged (m-sharpness, m the size of a micro-batch), however many devices there
    are. The gradients then go to any optimizer, wrapper or train state: clipping,
    weight decay, `optax.MultiSteps` and `optax.apply_if_finite` act on them.

    Args:
        loss_fn: `loss_fn(params, batch, *args, **kwargs)` returns a scalar, a mean
            over the batch, or `(scalar, aux)`.
        perturbation: Maps a gradient to eps, uphill. An optimizer here is an error if
            its state tells it, as Adam's does; plain `optax.sgd` is not seen, and would
            move the parameters downhill. It receives as extra arguments `batch`,
            `grad_fn`, what the loss was called with beside the batch as `loss_args`
            and `loss_kwargs`, `displaced(eps)`, which forms w + eps as the step does,
            and the entries of `extra_args`.
        descent: Makes the direction of the step from both gradients, such as
            `surrogate_gap`, `extrapolate` or `reuse`. None is SAM: the second one.
        has_aux: Whether `loss_fn` returns `(scalar, aux)`.
        micro_batches: Number m of equal parts into which the leading axis of every leaf
            of `batch` is cut, with a stride: row i goes to part i mod m, so that a
            batch sharded over devices stays so (a part needs a row for each device; if
            it has fewer, its rows are gathered). They are worked through one after the
            other, so memory falls with their number. PRNG keys among `*args` and
            `**kwargs` are folded with the number of the part; anything else there goes
            whole to every part. Parts are weighted by their labels where the loss is a
            `negative_log_likelihood`.
        merge_aux: Makes of the aux of all parts, stacked in their order along a new
            leading axis, what is returned: `lambda aux: jax.tree.map(lambda x:
            x.mean(0), aux)` for BatchNorm statistics. None returns the stack; rows of
            examples come into the order of the batch by `x.swapaxes(0, 1).reshape(-1,
            *x.shape[2:])`.
        every: Perturb only each `every`-th step, from the first on, or the steps for
            which a function of the step, counted from 0, returns True. The others
            return the plain gradient and cost only that.
        empirical_fisher: Take the exact empirical Fisher, the sum over examples of the
            squared gradient over the weight of all labels (see `fisher_empirical`),
            from the same pass as the gradient, and hand it to the perturbation as the
            extra argument `fisher`, which `given()` reads.
            `loss_fn` must be `negative_log_likelihood(apply_fn, likelihood)`.
        lagged: Take the eps of the step before, so that a step costs one gradient, as
            in `displaced`, but with clean parameters in the caller's hands. Value and
            `aux` are those at w + eps, and there is one eps a step, of the mean
            gradient over parts and devices. No `descent`, no `every`, no sharpness and
            no `grad_norm` or `gradient_cosine` among the metrics: there is no gradient
            at w to compare with.
        functional: Take as the second gradient that of the outputs at w, pulled back
            at w + eps (Functional SAM). `loss_fn` must be a `negative_log_likelihood`.
        perturb_dtype: Dtype in which the second pass sees w + eps. None keeps the
            dtype of the parameters; see `sharpness_aware`.
        axis_name: Mapped axes of `jax.shard_map` or `jax.pmap`: each device perturbs
            for the batch it holds, then value and gradient are averaged (m-sharpness
            over devices). `aux` is left as each device has it, PRNG keys are folded
            with the number of the device. For one eps over all devices, use `jax.jit`
            on a sharded batch instead.
        metrics: Whether to measure each perturbed step; see `sharpness_aware`. The
            rise of the loss, `sharpness`, costs nothing and is always there.

    Returns:
        An oracle `f`. `f.init(params)` makes its state, and
        `f(params, state, batch, *args, **kwargs)` returns `(value, grads, state)`,
        or `((value, aux), grads, state)`. `*args` and `**kwargs` go to both passes, so
        that dropout draws the same mask in both. Value and `aux` come from the clean
        pass: BatchNorm statistics are updated once, with unperturbed weights. The
        keyword `extra_args`, a dict, is kept for the perturbation. Read metrics with
        `optax.tree.get(state, "sharpness")`; names as in `sharpness_aware`.

    Raises:
        ValueError: If every or micro_batches < 1; in a call, if a leaf of the batch
            cannot be cut into `micro_batches` parts, if an argument beside it looks as
            if it should have been, or if the state is that of other parameters.
        TypeError: If `perturbation` is no transformation, perturb_dtype no
            floating-point dtype, or the loss has no model for `empirical_fisher` or
            `functional`; in a call, if `loss_fn` does not return what `has_aux` says.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> def loss_fn(w, batch):
        ...     return jnp.mean((batch @ w) ** 4)
        >>> f = value_and_grad(loss_fn, euclidean_ball(0.5))
        >>> w = jnp.array([1.0, 0.0])
        >>> state = f.init(w)
        >>> value, grads, state = f(w, state, jnp.eye(2))
        >>> print(value, grads, optax.tree.get(state, "sharpness"))
        0.5 [6.75 0.  ] 2.03125

        Fisher SAM with the exact empirical Fisher, from the pass of the gradient:

        >>> from fsam_optax import categorical, fisher_ellipsoid, given
        >>> from fsam_optax import negative_log_likelihood
        >>> nll = negative_log_likelihood(lambda w, x: jnp.tanh(x) @ w, categorical)
        >>> f = value_and_grad(
        ...     nll, fisher_ellipsoid(0.1, given()), empirical_fisher=True
        ... )
        >>> w, batch = jnp.zeros((50, 10)), (jnp.ones((512, 50)), jnp.arange(512) % 10)
        >>> value, grads, state = jax.jit(f)(w, f.init(w), batch)
        >>> for line in f.explain(w, batch).passes:
        ...     print(line.name, "|", line.computes, "|", round(line.cost, 1))
        at w | value, gradient, empirical Fisher | 1.6
        perturbation | eps | 0.0
        at w + eps | gradient | 1.0

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (algorithm 1;
        m-sharpness: section 4.1).
    """
    if not callable(loss_fn):
        swapped = isinstance(loss_fn, optax.GradientTransformation)
        raise TypeError(
            f"`loss_fn` must be a function, got {describe(loss_fn)}."
            + " The arguments are `value_and_grad(loss_fn, perturbation)`." * swapped
        )
    check_transformation("perturbation", perturbation, "euclidean_ball(0.05)")
    if descent is not None:
        check_transformation("descent", descent, "surrogate_gap(0.4)")
        descent = optax.with_extra_args_support(descent)
    check_every(every)
    flags = {
        "has_aux": has_aux,
        "empirical_fisher": empirical_fisher,
        "lagged": lagged,
        "functional": functional,
        "metrics": metrics,
    }
    for name, flag in flags.items():
        check_flag(name, flag, "It turns something on or off.")
    check_dtype("perturb_dtype", perturb_dtype)
    if micro_batches is not None:
        check_count("micro_batches", micro_batches)
        micro_batches = int(micro_batches)
    check_merge_aux(merge_aux, micro_batches, has_aux)
    if isinstance(loss_fn, NegativeLogLikelihood) and loss_fn.has_aux != has_aux:
        raise ValueError(
            f"`has_aux={has_aux}`, but the `negative_log_likelihood` was made with "
            f"`has_aux={loss_fn.has_aux}`: give both the same."
        )
    if lagged:
        _check_lagged(descent, every, empirical_fisher, functional)
        one_pass = lagged_step.Lagged(
            loss_fn,
            has_aux,
            optax.with_extra_args_support(perturbation),
            perturb_dtype,
            micro_batches,
            merge_aux,
            axis_name,
            metrics,
        )
        return ValueAndGrad(
            functools.partial(lagged_step.init, one_pass),
            functools.partial(lagged_step.apply, one_pass),
            functools.partial(lagged_step.explain, one_pass),
        )
    rule = Rule(
        optax.with_extra_args_support(perturbation),
        descent,
        every,
        perturb_dtype,
        axis_name,
        metrics,
    )
    pass_at_w = _clean_pass_of(loss_fn, empirical_fisher, functional)
    two_passes = oracle.Oracle(
        loss_fn, has_aux, rule, pass_at_w, micro_batches, merge_aux
    )
    return ValueAndGrad(
        functools.partial(oracle.init, rule),
        functools.partial(oracle.apply, two_passes),
        functools.partial(oracle.explain, two_passes),
    )


def _check_lagged(descent, every, empirical_fisher, functional) -> None:
    """Raises ValueError for what needs a gradient at w, which `lagged` has not."""
    asked = {
        "descent": descent is not None,
        "every": not always(every),
        "empirical_fisher": empirical_fisher,
        "functional": functional,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"`{name}` cannot be combined with `lagged=True`: a step has one "
                "gradient, at w + eps, and every step but the first is perturbed."
            )


def check_merge_aux(merge_aux: Any, micro_batches: Any, has_aux: bool) -> None:
    """Raises ValueError for a `merge_aux` that has nothing to merge."""
    if merge_aux is not None and (micro_batches is None or not has_aux):
        raise ValueError(
            "`merge_aux` merges the aux of several micro-batches: it needs "
            "`has_aux=True` and `micro_batches`."
        )


def _clean_pass_of(loss_fn, empirical_fisher, functional):
    """Returns the clean pass of a perturbed step; an error if there is no such one."""
    asked = {"empirical_fisher": empirical_fisher, "functional": functional}
    names = [f"`{name}=True`" for name, is_asked in asked.items() if is_asked]
    if len(names) == 2:
        raise ValueError(f"{names[0]} and {names[1]} are two clean passes: take one.")
    if names and not isinstance(loss_fn, NegativeLogLikelihood):
        raise TypeError(
            f"{names[0]} needs a loss that knows its model: "
            "`negative_log_likelihood(apply_fn, likelihood)` as `loss_fn`, got "
            f"{describe(loss_fn)}."
        )
    if empirical_fisher:
        return clean_pass_with_fisher
    return functional_clean_pass if functional else clean_pass
