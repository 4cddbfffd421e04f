"""How the gradients of the examples of a loss are squared, and at what cost."""

from __future__ import annotations

import functools
from typing import Any

import jax

from fsam_optax import _engine
from fsam_optax._common.abstract import found_abstractly
from fsam_optax._engine import Explanation
from fsam_optax._fisher.estimators import MANY_COLUMNS, many_columns
from fsam_optax._fisher.example_gradients import (
    losses_of,
    per_example_norms,
    takes_loss,
)
from fsam_optax._fisher.labels import factor_columns
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    NegativeLogLikelihood,
    outputs_like,
    parts_of,
    resolve,
)
from fsam_optax._fisher.one_pass import example_losses


def explain(model: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Tells how the squared gradients of examples are formed, parameter by parameter.

    Called as `explain(nll, params, batch, *args, **kwargs)`, with what the loss takes.
    Nothing is computed. It speaks of one pass that yields squared scores: that of
    `fisher_empirical`, of one draw of the sampled estimators, and of
    `value_and_grad(nll, ..., empirical_fisher=True)`; `fisher_exact` makes as many as
    its factor has columns, and a remark says so beyond 10 000 of them. A model that
    mixes examples has no gradient for each of them, which no program shows:
    `check_separable` tries it.

    Args:
        model: A `negative_log_likelihood`; or `apply_fn, likelihood` in its place; or
            `apply_fn`, followed by what `power_sums` takes:
            `explain(apply_fn, params, inputs, cotangents, targets)`. After
            `per_example_norms`, as in `explain(per_example_norms, nll, params, batch)`,
            the loss whose norms these are.
        *args: Parameters, batch, and further arguments of the model. All arrays may be
            `jax.ShapeDtypeStruct`s.
        **kwargs: Further keyword arguments of the model.

    Returns:
        One `Leaf` for each parameter: its path, shape, rule and cost, which are
        operations relative to those of the gradient of this parameter; a table when
        printed. That of a bias is one addition for each example, so that 2 or 3 times
        as much is next to nothing. A fallback forms the gradient of each example. Its
        `cost` is that of one pass for all parameters, in gradients of the batch.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import categorical, negative_log_likelihood
        >>> def apply_fn(params, x):
        ...     return x @ params["kernel"] + params["bias"]
        >>> params = {"kernel": jnp.ones((300, 90)), "bias": jnp.zeros(90)}
        >>> nll = negative_log_likelihood(apply_fn, categorical)
        >>> print(explain(nll, params, (jnp.ones((8, 300)), jnp.zeros(8, int))))
        parameter   shape      rule           cost
        ['bias']    (90,)      reduction      3.00
        ['kernel']  (300, 90)  outer product  1.02
        All of it costs 1.01 gradients of the batch.
    """
    if model is per_example_norms:
        return found_abstractly(_explain_norms, *args, **kwargs)
    if args and isinstance(args[0], Likelihood):
        model, args = resolve("explain", model, args[0]), args[1:]
    if isinstance(model, NegativeLogLikelihood):
        return found_abstractly(functools.partial(_explain, model), *args, **kwargs)
    return _engine.explain(model, *args, **kwargs)


@takes_loss
def _explain_norms(loss, params, batch, *args, **kwargs):
    losses = losses_of(loss, params, batch, args, kwargs)
    return _engine.explain_squares(losses.of_one, params, losses.examples)


def _explain(nll, params, batch, *args, **kwargs):
    parts, call = parts_of(nll, batch), call_of(nll, args, kwargs)
    loss, examples, _ = example_losses(nll, params, parts, call)
    found = _engine.explain_loss(lambda w, x: loss(w, x)[0], params, examples)
    h = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        outputs_like(nll, params, parts[0], call),
    )
    number = factor_columns(nll.likelihood).number(h)
    if number > MANY_COLUMNS:
        found.remarks = (*found.remarks, many_columns(number))
    return found
