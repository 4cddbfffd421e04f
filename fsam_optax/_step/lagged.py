"""The lagged oracle: eps from the step before, so that a step costs one gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.guard import ascend
from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_no_module,
    check_params,
    check_state,
)
from fsam_optax._common.displacement import displace
from fsam_optax._common.mapped_axes import (
    AxisName,
    check_axes,
    merge,
    replica_index,
    vary,
)
from fsam_optax._step.advice import check_ascends
from fsam_optax._step.displaced import no_displacement
from fsam_optax._step.explain import explain_step, StepExplanation
from fsam_optax._step.metrics import measure_lagged, Metrics, no_lagged_metrics
from fsam_optax._step.parts import Data, mean_over_parts, names, Part
from fsam_optax._step.passes import clean_pass, weight_of
from fsam_optax._step.step import cast_like, Rule


class LaggedState(NamedTuple):
    """State of `value_and_grad(..., lagged=True)`.

    Attributes:
        step: Calls made so far; saturates.  # shape=(), dtype=int32
        perturbation: State of the perturbation.
        displacement: The eps that the next step is taken at, in float32 or wider.
        metrics: Metrics of the last step, without `grad_norm` and `gradient_cosine`;
            None if not asked for.
    """

    step: jax.Array
    perturbation: optax.OptState
    displacement: Any
    metrics: Metrics | None = None


class Lagged(NamedTuple):
    """What `value_and_grad` was called with.

    Attributes:
        loss_fn: The loss.
        has_aux: Whether it returns `(scalar, aux)`.
        perturbation: Makes the next eps of the gradient.
        perturb_dtype: Dtype in which w + eps is formed; None for that of w.
        micro_batches: Number of parts of a batch; None for one.
        merge_aux: Makes one aux of those of the parts.
        axis_name: Mapped axes whose devices hold parts of the batch.
        metrics: Whether to measure.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    perturbation: optax.GradientTransformationExtraArgs
    perturb_dtype: Any
    micro_batches: int | None
    merge_aux: Callable[[Any], Any] | None
    axis_name: AxisName
    metrics: bool


def init(oracle: Lagged, params: Any = None) -> LaggedState:
    """Returns the state before the first step, which is not perturbed."""
    check_params("value_and_grad", params, "f.init(params)")
    check_no_module("value_and_grad", params)
    perturbation = oracle.perturbation.init(params)
    check_ascends(perturbation)
    return LaggedState(
        step=jnp.zeros([], jnp.int32),
        perturbation=perturbation,
        displacement=no_displacement(params),
        metrics=no_lagged_metrics(params) if oracle.metrics else None,
    )


def apply(
    oracle: Lagged,
    params: Any,
    state: LaggedState,
    batch: Any,
    *args: Any,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, LaggedState]:
    """Returns value and gradient at w + eps, and finds the eps of the next step.

    That is of the mean gradient over parts and devices: one for all of them.
    """
    check_params("value_and_grad", params, "f(params, state, batch)")
    check_no_module("value_and_grad", params)
    check_leaves(params, "params", real=True)
    check_state("f", state, LaggedState, functools.partial(init, oracle), params)
    check_axes("axis_name", oracle.axis_name)
    data = Data(batch, args, kwargs)

    def gradient(point):
        """Returns the mean over parts of value and gradient at a point, and aux."""
        local = vary(point, oracle.axis_name)

        def on_part(data, numbers):
            del numbers
            found = clean_pass(oracle.loss_fn, oracle.has_aux, local, data)
            weight = weight_of(oracle.loss_fn, local, data)
            grads = cast_like(found.grads, params)
            return Part(grads, (), jnp.array(True), weight, found.value, found.aux)

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, _, value, aux = mean_over_parts(
            on_part, data, (zeros, ()), oracle.micro_batches, oracle.axis_name
        )
        return (value, aux), grads

    def displaced(eps):
        return displace(params, eps, oracle.perturb_dtype)

    point = displaced(state.displacement)
    (value, aux), grads = gradient(point)
    extra = {
        **names(lambda point: gradient(point)[1], data),
        "displaced": displaced,
        **replica_index(oracle.axis_name),
        **(extra_args or {}),
    }
    ascent = ascend(oracle.perturbation, grads, state.perturbation, params, extra)
    check_like("the perturbation's output", ascent.eps, "params", params)
    # An estimator may have seen the batch of its device.
    eps, perturbation = merge((ascent.eps, ascent.state), oracle.axis_name)
    if oracle.merge_aux is not None:
        aux = oracle.merge_aux(aux)
    state = LaggedState(
        step=jnp.asarray(optax.safe_increment(state.step)),
        perturbation=perturbation,
        displacement=jax.tree.map(
            lambda e, old: e.astype(old.dtype), eps, state.displacement
        ),
        metrics=measure_lagged(grads, params, point) if oracle.metrics else None,
    )
    return ((value, aux) if oracle.has_aux else value), grads, state


def explain(
    oracle: Lagged,
    params: Any,
    batch: Any,
    *args: Any,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> StepExplanation:
    """Tells what the one pass and the perturbation cost."""
    rule = Rule(oracle.perturbation, None, 1, oracle.perturb_dtype, None, False)
    one_pass = functools.partial(clean_pass, oracle.loss_fn, oracle.has_aux)
    data = Data(batch, args, kwargs)
    given = dict(extra_args or {})
    at_w, ascent, *_ = explain_step(rule, one_pass, one_pass, params, data, given)
    return StepExplanation((at_w._replace(name="at w + eps"), ascent), None)
