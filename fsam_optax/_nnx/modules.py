"""Splitting the graph nodes of a call, running the loss on them, writing back."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from fsam_optax._common.rest import Rest
from fsam_optax._step.passes import loss_and_aux


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the graph node of a number stood among the arguments."""

    number: int


class Call(NamedTuple):
    """A call of a function of a module, split.

    Attributes:
        nodes: The graph nodes of the call; the model is the first.
        params: The variables to differentiate, an `nnx.State`.
        args: The rest of all nodes, then the arguments with places for the nodes.
        kwargs: Keyword arguments, likewise.
    """

    nodes: list[Any]
    params: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def is_node(x: Any) -> bool:
    """Tells whether an object is a graph node: a module, a variable, a metric."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def has_nodes(tree: Any) -> bool:
    """Tells whether there is a graph node in a tree."""
    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def params_of(model: Any, wrt: Any) -> Any:
    """Returns the variables of a module that `wrt` selects, after checking both."""
    if not has_nodes(model):
        raise TypeError(
            "`model` must be a Flax NNX module, got "
            f"{type(model).__name__}: for parameters in a dict, an `nnx.State` or "
            "another tree of arrays use `fsam_optax` itself, such as "
            "`fsam_optax.value_and_grad`, in place of `fsam_optax.nnx`."
        )
    params = nnx.state(model, wrt)
    if not jax.tree.leaves(params):
        kinds = jax.tree.leaves(nnx.state(model), is_leaf=_is_variable)
        names = sorted({type(x).__name__ for x in kinds})
        raise ValueError(
            f"`wrt={wrt!r}` selects no variable of the model, which has {names}."
        )
    return params


def split(model: Any, args: Any, kwargs: Any, wrt: Any) -> Call:
    """Splits a call: what is differentiated, and everything else."""
    params = params_of(model, wrt)
    nodes: list[Any] = [model]

    def place(x):
        if not is_node(x):
            return x
        nodes.append(x)
        return Place(len(nodes) - 1)

    args, kwargs = jax.tree.map(place, (args, kwargs), is_leaf=is_node)
    structure, everything = nnx.split(nodes)
    chosen = _flat_params(params)
    others = {k: v for k, v in _flat(everything).items() if k not in chosen}
    rest = Rest(nnx.from_flat_state(others), structure)
    return Call(nodes, params, (rest, *args), kwargs)


def _is_variable(x):
    return isinstance(x, nnx.Variable)


def _flat(state):
    return dict(nnx.to_flat_state(state))


def _flat_params(params):
    return {(0, *path): x for path, x in _flat(params).items()}


def held(call: Call) -> dict[Any, Any]:
    """Returns what the variables of all nodes hold before a call, by path."""
    return {**_flat(call.args[0].state), **_flat_params(call.params)}


class Run(NamedTuple):
    """Copies of the graph nodes, for one run of a function of a module.

    Attributes:
        before: What they hold before the run, by path.
        nodes: The nodes; the model is the first.
        args: The arguments, with the nodes in their places.
        kwargs: Keyword arguments, likewise.
    """

    before: dict[Any, Any]
    nodes: list[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def copies(params: Any, rest: Rest, args: Any, kwargs: Any) -> Run:
    """Puts the graph nodes of a call together again, as copies."""
    before = {**_flat(rest.state), **_flat_params(params)}
    nodes = nnx.merge(rest.structure, nnx.from_flat_state(before), copy=True)

    def fill(x):
        return nodes[x.number] if isinstance(x, Place) else x

    args, kwargs = jax.tree.map(
        fill, (args, kwargs), is_leaf=lambda x: isinstance(x, Place)
    )
    return Run(before, nodes, args, kwargs)


def changes(run: Run) -> Any:
    """Returns the variables that a run has set to something else, or made anew.

    A PRNG key is not among them, unless it was seeded anew: only its count advances.
    """

    def same(a, b):
        a, b = jax.tree.leaves(a), jax.tree.leaves(b)
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))

    after = _flat(nnx.state(run.nodes))
    return nnx.from_flat_state(
        {
            path: x
            for path, x in after.items()
            if path not in run.before or not same(x, run.before[path])
        }
    )


def write(call: Call, changes: Any) -> None:
    """Updates the graph nodes of a call by the changes of a run."""
    nnx.update(call.nodes, changes)


@dataclasses.dataclass(frozen=True)
class PureLoss:
    """The loss of a module as a pure function, with the changes it makes beside aux.

    Attributes:
        loss_fn: `loss_fn(model, batch, *args, **kwargs)`.
        has_aux: Whether it returns `(loss, aux)`.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool

    def __call__(
        self, params: Any, batch: Any, rest: Rest, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        """Returns `(loss, (aux, changes))`."""
        run = copies(params, rest, args, kwargs)
        result = self.loss_fn(run.nodes[0], batch, *run.args, **run.kwargs)
        loss, aux = loss_and_aux(result, self.has_aux)
        return loss, (aux, changes(run))
