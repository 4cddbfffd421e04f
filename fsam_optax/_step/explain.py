"""What each pass of a step computes and costs, read off its program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fsam_optax._common.abstract import of_arrays
from fsam_optax._engine.work import total
from fsam_optax._step.parts import Data, names
from fsam_optax._step.passes import CleanPass
from fsam_optax._step.step import first_memory, plain_step, Rule


class PassCost(NamedTuple):
    """One pass of a step.

    Attributes:
        name: Which pass.
        computes: What it computes.
        cost: Its operations, in gradients of the loss on the same batch.
    """

    name: str
    computes: str
    cost: float


class StepExplanation(NamedTuple):
    """The passes of a perturbed step; a table when printed.

    Attributes:
        passes: The passes, in their order.
        rules: How the one pass forms the Fisher of each parameter; None without it.
    """

    passes: tuple[PassCost, ...]
    rules: Any | None

    @property
    def cost(self) -> float:
        """Operations of the whole step, in gradients of the loss."""
        return sum(x.cost for x in self.passes)

    def __str__(self) -> str:
        """Returns one line for each pass, their sum, and the rules."""
        rows = [("pass", "computes", "gradients")]
        rows += [(x.name, x.computes, f"{x.cost:.2f}") for x in self.passes]
        rows += [("step", "", f"{self.cost:.2f}")]
        first, second, third = (max(map(len, x)) for x in zip(*rows, strict=True))
        lines = [
            f"{name:{first}}  {what:{second}}  {cost:>{third}}"
            for name, what, cost in rows
        ]
        return "\n".join([*lines, *(["", str(self.rules)] if self.rules else [])])


def explain_step(
    rule: Rule,
    pass_at_w: Callable[[Any, Data], CleanPass],
    plain_pass: Callable[[Any, Data], CleanPass],
    params: Any,
    data: Data,
    extra_args: dict[str, Any],
) -> tuple[PassCost, ...]:
    """Counts the operations of each pass of a perturbed step.

    Nothing is computed or compiled: the products, convolutions and elements in the
    traced programs are counted, the bodies of loops as often as they run. Right within
    a small factor; not a time.

    Args:
        rule: How the step is made.
        pass_at_w: The clean pass of a perturbed step.
        plain_pass: That of a step without perturbation: the unit of the costs.
        params: The parameters.
        data: The batch and what goes with it. All arrays may be abstract.
        extra_args: What the caller gives to the perturbation by name.
    """
    rule = rule._replace(axis_name=None)

    def at_w(params, data):
        return pass_at_w(params, data)[:4]

    def ascent(params, data):
        clean = pass_at_w(params, data)
        state = rule.perturbation.init(params)
        extra = {**names(clean.grad_fn, data), **clean.extra, **extra_args}
        eps = rule.perturbation.update(clean.grads, state, params, **extra)
        return clean[:4], eps

    def both(params, data):
        clean = pass_at_w(params, data)
        return clean[:4], clean.gradient(params)

    def descent(params, grads):
        memory = first_memory(rule, params)
        return plain_step(rule, memory, params, grads, {}, None).direction

    unit = _operations(lambda p, d: plain_pass(p, d)[:3], params, data)
    _, _, grads, extra = _shapes(at_w, params, data)
    first = _operations(at_w, params, data)
    what = ["value", "gradient", *(_DESCRIPTIONS.get(name, name) for name in extra)]
    passes = [
        ("at w", ", ".join(what), first),
        ("perturbation", "eps", _operations(ascent, params, data) - first),
        ("at w + eps", "gradient", _operations(both, params, data) - first),
    ]
    if rule.descent is not None:
        passes.append(("descent", "direction", _operations(descent, params, grads)))
    return tuple(PassCost(name, what, cost / unit) for name, what, cost in passes)


_DESCRIPTIONS = {"fisher": "empirical Fisher"}


def _operations(fn, *trees):
    traced, given = of_arrays(fn, *trees)
    return total(jax.make_jaxpr(traced)(given).jaxpr.eqns)


def _shapes(fn, *trees):
    traced, given = of_arrays(fn, *trees)
    return jax.eval_shape(traced, given)
