"""The two-pass oracle: the loss at w, and the gradient at w + eps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    check_leaves,
    check_no_module,
    check_params,
    check_state,
)
from fsam_optax._common.mapped_axes import check_axes, vary
from fsam_optax._common.norms import widen
from fsam_optax._fisher import explain as rules_of
from fsam_optax._step.explain import explain_step, StepExplanation
from fsam_optax._step.metrics import Metrics
from fsam_optax._step.parts import Data, mean_over_parts, names, Part
from fsam_optax._step.passes import (
    clean_pass,
    clean_pass_with_fisher,
    CleanPass,
    weight_of,
)
from fsam_optax._step.step import (
    always,
    first_memory,
    first_metrics,
    Memory,
    on_schedule,
    perturbed_step,
    plain_step,
    Rule,
)


class ValueAndGradState(NamedTuple):
    """State of `value_and_grad`.

    Attributes:
        step: Calls made so far; saturates.  # shape=(), dtype=int32
        perturbation: State of the perturbation.
        descent: State of the descent; empty without one.
        metrics: Metrics of the last perturbed step; None if not asked for.
        sharpness: Loss at w + eps minus loss at w, at the last perturbed step.
            # shape=(), dtype=float32
    """

    step: jax.Array
    perturbation: optax.OptState
    descent: optax.OptState
    metrics: Metrics | None
    sharpness: jax.Array


class Oracle(NamedTuple):
    """What `value_and_grad` was called with.

    Attributes:
        loss_fn: The loss.
        has_aux: Whether it returns `(scalar, aux)`.
        rule: How a step is made.
        pass_at_w: The clean pass of a perturbed step.
        micro_batches: Number of parts of a batch; None for one.
        merge_aux: Makes one aux of those of the parts.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    rule: Rule
    pass_at_w: Callable[..., CleanPass]
    micro_batches: int | None
    merge_aux: Callable[[Any], Any] | None


def init(rule: Rule, params: Any = None) -> ValueAndGradState:
    """Returns the state before the first step."""
    check_params("value_and_grad", params, "f.init(params)")
    check_no_module("value_and_grad", params)
    return ValueAndGradState(
        step=jnp.zeros([], jnp.int32),
        **first_memory(rule, params)._asdict(),
        metrics=first_metrics(rule, params),
        sharpness=jnp.zeros([], jnp.float32),
    )


def apply(
    oracle: Oracle,
    params: Any,
    state: ValueAndGradState,
    batch: Any,
    *args: Any,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, ValueAndGradState]:
    """Returns value (and aux) at w, the gradient to step with, and the state."""
    rule = oracle.rule
    check_params("value_and_grad", params, "f(params, state, batch)")
    check_no_module("value_and_grad", params)
    check_leaves(params, "params", real=True)
    check_state("f", state, ValueAndGradState, functools.partial(init, rule), params)
    check_axes("axis_name", rule.axis_name)
    memory = Memory(state.perturbation, state.descent)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, metrics, sharpness), memory, value, aux = mean_over_parts(
        functools.partial(_step_on_part, oracle, params, state, dict(extra_args or {})),
        Data(batch, args, kwargs),
        ((zeros, state.metrics, state.sharpness), memory),
        oracle.micro_batches,
        rule.axis_name,
    )
    if oracle.merge_aux is not None:
        aux = oracle.merge_aux(aux)
    state = ValueAndGradState(
        step=jnp.asarray(optax.safe_increment(state.step)),
        **memory._asdict(),
        metrics=metrics,
        sharpness=sharpness,
    )
    return ((value, aux) if oracle.has_aux else value), grads, state


def _step_on_part(oracle, params, state, extra, data, numbers) -> Part:
    """Takes the step on one part of the batch: a perturbed one if it is its turn."""
    rule, local = oracle.rule, vary(params, oracle.rule.axis_name)
    given = oracle, params, state, {**numbers, **extra}, data

    def pass_at_w(kind):
        return kind(oracle.loss_fn, oracle.has_aux, local, data)

    def step(clean_if_perturbed, clean_if_plain):
        return on_schedule(
            rule.every,
            state.step,
            lambda: _perturbed_part(*given, clean_if_perturbed()),
            lambda: _plain_part(*given, clean_if_plain()),
        )

    if oracle.pass_at_w is clean_pass_with_fisher and not always(rule.every):
        # Inside of the branch: plain steps are to cost one gradient and no more.
        return step(
            lambda: pass_at_w(clean_pass_with_fisher), lambda: pass_at_w(clean_pass)
        )
    # Outside of it: inside, convolutions take many times longer on a CPU.
    clean = pass_at_w(oracle.pass_at_w)
    return step(lambda: clean, lambda: clean)


def _perturbed_part(oracle, params, state, extra, data, clean) -> Part:
    memory = Memory(state.perturbation, state.descent)
    extra = {**names(clean.grad_fn, data), **clean.extra, **extra}
    stride = perturbed_step(
        oracle.rule, memory, params, clean.grads, clean.gradient, extra
    )
    wide = widen(clean.value, stride.value)
    rise = jnp.asarray(stride.value, wide) - jnp.asarray(clean.value, wide)
    return _part(oracle, params, data, clean, stride, rise.astype(jnp.float32))


def _plain_part(oracle, params, state, extra, data, clean) -> Part:
    memory = Memory(state.perturbation, state.descent)
    extra = {**names(clean.grad_fn, data), **extra}
    stride = plain_step(oracle.rule, memory, params, clean.grads, extra, state.metrics)
    return _part(oracle, params, data, clean, stride, state.sharpness)


def _part(oracle, params, data, clean, stride, sharpness) -> Part:
    part = Part(
        means=(stride.direction, stride.metrics, sharpness),
        memory=stride.memory,
        found=stride.found,
        weight=weight_of(oracle.loss_fn, params, data),
        value=clean.value,
        aux=None,
    )
    # Both branches of a step agree on what may differ between the devices.
    return vary(part, oracle.rule.axis_name)._replace(aux=clean.aux)


def explain(
    oracle: Oracle,
    params: Any,
    batch: Any,
    *args: Any,
    extra_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> StepExplanation:
    """Tells what each pass of a perturbed step computes and costs."""

    def call(kind):
        return functools.partial(kind, oracle.loss_fn, oracle.has_aux)

    costs = explain_step(
        oracle.rule,
        call(oracle.pass_at_w),
        call(clean_pass),
        params,
        Data(batch, args, kwargs),
        dict(extra_args or {}),
    )
    rules = None
    if oracle.pass_at_w is clean_pass_with_fisher:
        rules = rules_of.explain(oracle.loss_fn, params, batch, *args, **kwargs)
    return StepExplanation(costs, rules)
