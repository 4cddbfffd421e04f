"""All numbers that a state holds about its last perturbed step, by name."""

from __future__ import annotations

from typing import Any

import jax

from fsam_optax._ball.perturbation import PerturbationState
from fsam_optax._step.metrics import Metrics
from fsam_optax._step.value_and_grad import ValueAndGradState


@jax.tree_util.register_pytree_with_keys_class
class Measured(dict[str, Any]):
    """A dict whose `KeyError` tells which names there are."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"There is no metric {name!r}, but {', '.join(sorted(self))}.")

    def tree_flatten_with_keys(self):
        """Returns the values with their keys, and the names."""
        names = tuple(sorted(self))
        keyed = [(jax.tree_util.DictKey(name), self[name]) for name in names]
        return keyed, names

    @classmethod
    def tree_unflatten(cls, names, values):
        """Returns the dict of names and values."""
        return cls(zip(names, values, strict=True))


def metrics(state: Any) -> Measured:
    """Returns all metrics in a state as a dict.

    Args:
        state: A state of `sharpness_aware` or `value_and_grad`, or anything that holds
            one: of `optax.chain`, a train state, an `nnx.Optimizer`.

    Returns:
        The fields of `Metrics`, if they were asked for; `rho`, `dual_norm` and
        `skipped` of the perturbation; and `sharpness`, if it is a state of
        `value_and_grad`. Several states or perturbations number theirs: `rho_0`,
        `rho_1`. A name that is not there raises a `KeyError` that lists those that are;
        `optax.tree.get` returns None for it.

    Raises:
        TypeError: If there are no metrics in the state.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import metrics, sam
        >>> grad_fn = jax.grad(lambda w: jnp.sum(w**4))
        >>> optimizer = sam(optax.sgd(0.1), rho=0.5)
        >>> w = jnp.array([1.0])
        >>> _, state = optimizer.update(
        ...     grad_fn(w), optimizer.init(w), w, grad_fn=grad_fn
        ... )
        >>> print(metrics(state)["perturbed_grad_norm"])
        13.5
        >>> print(", ".join(metrics(state)))
        grad_norm, perturbed_grad_norm, perturbation_norm, gradient_cosine,
        leaf_perturbation_norms, rho, dual_norm, skipped
    """
    named = {
        Metrics: Metrics._fields,
        PerturbationState: ("rho", "dual_norm", "skipped"),
        ValueAndGradState: ("sharpness",),
    }
    found = Measured()
    for kind, names in named.items():
        nodes = _nodes(state, kind)
        for i, node in enumerate(nodes):
            for name in names:
                if getattr(node, name) is None:  # What a lagged step has not.
                    continue
                label = name if len(nodes) == 1 else f"{name}_{i}"
                found[label] = getattr(node, name)
    if not found:
        raise TypeError(
            f"There are no metrics in {type(state).__name__}: pass the state that "
            "`update` of `sharpness_aware`, or `f` of `value_and_grad`, returned."
        )
    return found


def _nodes(state, kind):
    def is_node(x):
        return isinstance(x, kind)

    return [x for x in jax.tree.leaves(state, is_leaf=is_node) if is_node(x)]
