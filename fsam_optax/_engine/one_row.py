"""One example in a model for batches that says by name which devices rows are on."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fsam_optax._engine.jaxpr import as_function, with_equations
from fsam_optax._engine.normal import constrained_but
from fsam_optax._engine.primitives import CONSTRAINT


PyTree = Any
_IS_FREE: ContextVar[bool] = ContextVar("_IS_FREE", default=False)


@contextlib.contextmanager
def free() -> Iterator[None]:
    """Says of the models that are run inside that none constrains where values lie."""
    token = _IS_FREE.set(True)
    try:
        yield
    finally:
        _IS_FREE.reset(token)


def is_free(closed: Any) -> bool:
    """Tells whether a program never says where a value lies."""
    return not _constraints(closed)


def as_batch_of_one(model: Callable[[PyTree], PyTree], example: PyTree) -> PyTree:
    """Returns `model` of a batch of one, rows of which are on no devices by name.

    Mapped over examples, the rows lie on devices by the axis of the map. What a model
    says about axes that its rows are part of, also one that they share with positions,
    would bring the positions of each example there. Such axes are longer in a batch of
    two.
    """
    given, tree = jax.tree.flatten(example)

    def rows(number):
        def run(*example):
            batch = [jnp.broadcast_to(x, (number, *x.shape)) for x in example]
            return model(tree.unflatten(batch))

        return run

    if _IS_FREE.get():
        return rows(1)(*given)
    closed, like = jax.make_jaxpr(rows(1), return_shape=True)(*given)
    one = _constraints(closed)
    if any(map(_names_positions, one)):
        try:
            two = _constraints(jax.make_jaxpr(rows(2))(*given))
        except Exception:  # A model for other numbers of rows alone.
            two = []
        if list(map(_rank, one)) == list(map(_rank, two)):
            found = iter(two)
            closed = with_equations(
                closed, CONSTRAINT, lambda eqn: _freed(eqn, next(found))
            )
    return jax.tree.structure(like).unflatten(as_function(closed)(*given))


def _names_positions(eqn):
    """Tells whether it says where an axis lies that is not of size one."""
    sharding, shape = eqn.params["sharding"], eqn.outvars[0].aval.shape
    return isinstance(sharding, NamedSharding) and any(
        names and n > 1 for names, n in zip(sharding.spec, shape, strict=False)
    )


def _rank(eqn):
    return eqn.outvars[0].aval.ndim


def _freed(eqn, other):
    """Returns a constraint that says nothing of axes which have another size there."""
    aval = eqn.outvars[0].aval
    sizes = zip(aval.shape, other.outvars[0].aval.shape, strict=True)
    free = {d for d, (n, m) in enumerate(sizes) if n != m}
    new = jax.make_jaxpr(lambda x: constrained_but(eqn, x, free))(aval)
    return eqn.replace(params=new.eqns[0].params)


def _constraints(closed):
    """Returns the equations that say where a value lies, of inner programs too."""
    found = []
    with_equations(closed, CONSTRAINT, lambda eqn: found.append(eqn) or eqn)
    return found
