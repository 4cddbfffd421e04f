"""What follows from the variances of two estimators."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_like, check_number, of_tree


def fisher_variance_joint(
    conditional: Any,
    between_inputs: Any,
    *,
    num_inputs: jax.typing.ArrayLike,
    num_samples: jax.typing.ArrayLike = 1,
) -> Any:
    """Variance of an estimator whose inputs are drawn at random too.

        (Var(F_n) + V / num_samples) / num_inputs

    Args:
        conditional: V, from `fisher_variance_i1` or `fisher_variance_i2`, their
            bounds, or their sampled versions.
        between_inputs: Var(F_n), from `fisher_variance_between_inputs`.
        num_inputs: Inputs drawn, independently, for an estimate.
        num_samples: Labels drawn for each of them.

    Returns:
        The variance for every parameter; structure of params.

    Examples:
        >>> print(fisher_variance_joint(8.0, 2.0, num_inputs=2, num_samples=4))
        2.0
    """
    check_like("between_inputs", between_inputs, "conditional", conditional)
    for name, count in (("num_inputs", num_inputs), ("num_samples", num_samples)):
        if not hasattr(count, "dtype"):
            check_number(name, count, 0, open=True)
    return jax.tree.map(
        lambda v, b: (b + v / num_samples) / num_inputs, conditional, between_inputs
    )


def prefer(
    labels: Any | Callable[[Any], Any], variance_i1: Any, variance_i2: Any
) -> dict[Hashable, Literal["i1", "i2"]]:
    """Says for each group of parameters which of I1 and I2 varies less.

    Compares the sums over each group. The variances may be exact, upper bounds or
    sampled ones, but both of one kind. It says nothing of cost: I2 needs second
    derivatives.

    Args:
        labels: Tree of labels that is a prefix of the parameters, or a function of a
            tree with their structure that returns one; as in `by_group`.
        variance_i1: Variances of I1; structure of params.
        variance_i2: Variances of I2; structure of params.

    Returns:
        "i1" or "i2" for each label; "i2" if the sums are equal. Not under `jax.jit`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import by_group, fisher_i1, fisher_i2, gaussian
        >>> from fsam_optax.variance import fisher_variance_i1, fisher_variance_i2
        >>> def model(params, x):
        ...     return (x * params["body"][None]) ** 3 * params["head"][None]
        >>> params, x = {"body": jnp.ones(1), "head": jnp.ones(1)}, jnp.ones((4, 1))
        >>> names = {"body": "body", "head": "head"}
        >>> @jax.jit
        ... def variances(params, x):
        ...     args = (model, gaussian(), params, x)
        ...     return fisher_variance_i1(*args), fisher_variance_i2(*args)
        >>> best = prefer(names, *variances(params, x))
        >>> print(best)
        {'body': 'i2', 'head': 'i2'}
        >>> estimators = {
        ...     "i1": fisher_i1(model, gaussian(), key=jax.random.key(0)),
        ...     "i2": fisher_i2(model, gaussian(), key=jax.random.key(0)),
        ... }
        >>> estimator = by_group(names, {k: estimators[v] for k, v in best.items()})
    """
    check_like("variance_i2", variance_i2, "variance_i1", variance_i1)
    labels = of_tree(labels, variance_i1)
    excess: dict[Hashable, float] = {}  # Of I1 over I2.

    def add(label, *subtrees):
        i1, i2 = (
            sum(float(jnp.sum(x)) for x in jax.tree.leaves(tree)) for tree in subtrees
        )
        excess[label] = excess.get(label, 0.0) + i1 - i2

    try:
        jax.tree.map(add, labels, variance_i1, variance_i2)
    except ValueError as error:
        raise ValueError(
            "`labels` must have the structure of the parameters, or of their upper "
            f"levels: {error}"
        ) from error
    return {label: "i1" if value < 0 else "i2" for label, value in excess.items()}
