"""Another estimator for each group of parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

from fsam_optax._common.checks import check_transformation, of_tree
from fsam_optax._common.kinds import of_estimator


def by_group(
    labels: Any | Callable[[Any], Any],
    estimators: Mapping[Hashable, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Estimates each group of parameters with an estimator of its own.

    Each one differentiates its own group only, and keeps a state for it only. An
    estimator from this library is given all parameters in the extra argument
    `full_params` to evaluate the model with; the groups of `optax.partition` would
    leave it with a part of them.

    Args:
        labels: Tree of labels that is a prefix of the parameters, or a function of the
            parameters that returns one.
        estimators: For each label, an estimator of that group, or several transforms
            chained after one.

    Returns:
        An estimator of the whole. Its state is a dict with one state for each label.

    Raises:
        TypeError: If estimators is no dict of transformations.
        ValueError: In `init` or `update`, if a label has no estimator, or `labels` is
            no prefix of the parameters.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import diagonal, fisher_exact, fisher_i1, gaussian
        >>> model = lambda params, x: jnp.tanh(x @ params["body"]) @ params["head"]
        >>> params = {"body": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
        >>> estimator = by_group(
        ...     {"body": "sampled", "head": "exact"},
        ...     {
        ...         "sampled": fisher_i1(model, gaussian(), key=jax.random.key(0)),
        ...         "exact": fisher_exact(model, gaussian()),
        ...     },
        ... )
        >>> evaluate = jax.jit(lambda params, x: diagonal(estimator, params, (x, None)))
        >>> fisher = evaluate(params, jnp.ones((4, 2)))
        >>> print(fisher["head"].ravel() - jnp.tanh(2.0) ** 2)
        [0. 0. 0.]
    """
    if not isinstance(estimators, Mapping):
        raise TypeError(f"`estimators` must be a dict, got {estimators!r}.")
    for label, estimator in estimators.items():
        check_transformation(f"estimators[{label!r}]", estimator, "squared_gradient()")
    estimators = {
        label: optax.with_extra_args_support(estimator)
        for label, estimator in estimators.items()
    }

    def label_leaves(params):
        tree = of_tree(labels, params)
        try:
            tree = jax.tree.map(
                lambda label, subtree: jax.tree.map(lambda _: label, subtree),
                tree,
                params,
            )
        except ValueError as error:
            raise ValueError(
                "`labels` must have the structure of the parameters, or of their upper "
                f"levels: {error}"
            ) from error
        if unknown := set(jax.tree.leaves(tree)) - set(estimators):
            raise ValueError(
                f"`labels` has {sorted(map(str, unknown))}, for which `estimators` has "
                f"no entry: it has {sorted(map(str, estimators))}."
            )
        return tree

    def only(label, labels, tree) -> Any:
        if tree is None:
            return None
        return jax.tree.map(
            lambda own, x: x if own == label else optax.MaskedNode(), labels, tree
        )

    def init_fn(params):
        # `optax.tree.map_params` initialises with a node that stands for any tree.
        tree = label_leaves(params) if jax.tree.leaves(params) else None
        return {
            label: of_estimator(
                estimator.init(params if tree is None else only(label, tree, params))
            )
            for label, estimator in estimators.items()
        }

    def update_fn(updates, state, params=None, *, full_params=None, **extra_args):
        tree = label_leaves(updates if params is None else params)
        diagonals, states = {}, {}
        for label, estimator in estimators.items():
            diagonals[label], states[label] = estimator.update(
                only(label, tree, updates),
                state[label],
                only(label, tree, params),
                full_params=params if full_params is None else full_params,
                **extra_args,
            )
        diagonal = jax.tree.map(
            lambda label, *parts: dict(zip(diagonals, parts, strict=True))[label],
            tree,
            *diagonals.values(),
        )
        return diagonal, states

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
