"""Sums over examples of powers of per-example gradients, at the price of a gradient.

The program of one example is traced, each of its gradients is replaced by an operation
that adds up its powers (`plan`, `sums`), and the result is mapped over the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.checks import check_function, check_leaves, shape_of
from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._common.norms import widen
from fsam_optax._engine.columns import Columns
from fsam_optax._engine.example import sums_of_example
from fsam_optax._engine.one_row import as_batch_of_one
from fsam_optax._engine.report import leaves_of, warn_of_fallbacks
from fsam_optax._engine.sources import Summation


PyTree = Any


def power_sums(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    cotangents: Callable[[PyTree, PyTree], PyTree],
    targets: PyTree = None,
    *,
    powers: Sequence[int] = (2,),
    weights: jax.Array | None = None,
    chunk_bytes: int | None = None,
) -> tuple[PyTree, ...]:
    """Sums over examples of powers of pulled-back cotangents.

    For each power p, elementwise: ``sum_n w_n sum_k (J_n^T c_nk)^p``, where J_n is the
    Jacobian of the outputs for example n with respect to the parameters. With p = 2
    and the score of a label as the only cotangent this is a sum of squared
    per-example gradients. It is not the square of the gradient of the batch.

    It costs about one gradient of the batch, and no array of shape (examples,
    parameters) is formed. Parameters that are used in a way the rewriting does not
    know cost what ``jax.vmap(jax.grad(...))`` costs, a few examples at a time; ask
    `explain`. Call it under `jax.jit`: tracing is the expensive part.

    An example is what the leading axis of `inputs` counts: for sequences the whole
    sequence, not a token. Each example is run by itself, as a batch of one. A model
    that mixes examples, as batch normalization in training mode does, has no
    per-example gradients; what comes out is then the gradient with each example
    normalized by its own statistics. `check_separable` tells.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> outputs` on a batch.
        params: Pytree of floating-point arrays.
        inputs: Pytree of arrays with a leading axis of B examples.
        cotangents: Maps the outputs h of one example, and its target, to a pytree like
            h whose leaves have an additional leading axis of K cotangents. No
            derivative is taken through it.
        targets: Pytree of arrays with a leading axis of B examples; may hold typed
            PRNG keys. None passes None to `cotangents`.
        powers: Which powers, of 1, 2 and 4. The first power is the gradient.
        weights: Weights of the examples, shape (B,); None for ones. Zero masks an
            example, unless its gradient is not finite.
        chunk_bytes: Bytes that a loop over examples may hold at a time on each device,
            for each parameter whose gradients are formed a few at a time, and that the
            backward passes of the cotangents may hold, of which at least one is run at
            a time. None for 64 MiB, or a sixteenth of what a gradient keeps for its
            backward pass if that is more; and for the cotangents as much as keeps the
            whole within twice the memory of one gradient, or within about 64 MiB if
            that is more. A program that is lowered for a CPU forms products of one
            example at a time whatever this allows, and with None it pulls back no more
            cotangents at a time than make it faster there: few, often one.

    Returns:
        For each power a pytree like `params`: the sum, not the mean; float32, or the
        dtype of the parameter if that is wider. Nothing can be differentiated through
        it. Under `jax.shard_map` it is the sum over the examples of the device: the
        caller adds up the devices.

    Raises:
        TypeError: If a parameter is not floating-point.
        ValueError: If the leading axes or the powers are not as described.

    Examples:
        The squared norms of the inputs, since the model is linear:

        >>> import jax.numpy as jnp
        >>> inputs = jnp.array([[1.0, 2.0], [3.0, -2.0]])
        >>> (squares,) = power_sums(
        ...     lambda w, x: x @ w, jnp.zeros(2), inputs, lambda h, _: jnp.ones((1,))
        ... )
        >>> print(squares)
        [10.  8.]
        >>> print(jnp.square(jnp.sum(inputs, axis=0)))  # the batch gradient, squared
        [16.  0.]

    References:
        Goodfellow, Efficient per-example gradient computations, 2015,
        https://arxiv.org/abs/1510.01799 (sec. 4), for dense layers. Dangel, Kunstner
        and Hennig, BackPACK, 2020, https://arxiv.org/abs/1912.10985 (sec. 2), for what
        a backward pass can yield besides the gradient.
    """
    check_model(apply_fn, inputs)
    check_cotangents(cotangents)
    sums, _ = sums_and_outputs(
        one_of_batch(apply_fn),
        params,
        (inputs, targets),
        cotangents,
        powers,
        weights,
        chunk_bytes,
    )
    return sums


def loss_power_sums(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    powers: Sequence[int] = (2,),
    weights: jax.Array | None = None,
    chunk_bytes: int | None = None,
    has_value: bool = False,
    has_aux: bool = False,
) -> Any:
    """Sums over examples of powers of the gradients of their losses.

    For each power p, elementwise: ``sum_n w_n (d loss_n / d params)^p``. The same as
    `power_sums`, for a loss of one example instead of a model and cotangents.

    Args:
        loss_fn: Loss of one example, `loss_fn(params, example) -> scalar`.
        params: Pytree of floating-point arrays.
        batch: Pytree of arrays with a leading axis of B examples.
        powers: Which powers, of 1, 2 and 4. The first power is the gradient.
        weights: Weights of the examples, shape (B,); None for ones.
        chunk_bytes: See `power_sums`.
        has_value: Whether to return the loss too, from the same pass.
        has_aux: Whether `loss_fn` returns `(loss, aux)`, of which aux is returned too.

    Returns:
        For each power a pytree like `params`. With `has_value` the pair of
        ``sum_n w_n loss_n`` and these. With `has_aux` followed by aux, whose leaves
        have a leading axis of B.

    Raises:
        TypeError: If a parameter is not floating-point, or the loss not a scalar.
        ValueError: If the leading axes or the powers are not as described.

    Examples:
        >>> import jax.numpy as jnp
        >>> def loss_fn(w, example):
        ...     x, y = example
        ...     return jnp.square(x * w - y)
        >>> batch = (jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
        >>> loss, (grad, squares) = loss_power_sums(
        ...     loss_fn, jnp.array(1.0), batch, powers=(1, 2), has_value=True
        ... )
        >>> print(loss, grad, squares)
        2.0 6.0 20.0
    """
    check_function("loss_fn", loss_fn)
    return sums_of_loss(
        loss_fn, params, batch, powers, weights, chunk_bytes, has_value, has_aux
    )


def sums_of_loss(
    loss_fn: Callable,
    params: PyTree,
    batch: PyTree,
    powers: Sequence[int],
    weights: jax.Array | None,
    chunk_bytes: int | None = None,
    has_value: bool = False,
    has_aux: bool = False,
    constant: bool = True,
) -> Any:
    """Returns what `loss_power_sums` does; see `sums_and_outputs` for `constant`."""
    fn, cotangents = (_with_aux(loss_fn), _of_loss) if has_aux else (loss_fn, None)
    what = fn, params, (batch, None), cotangents, powers, weights, chunk_bytes
    sums, outputs = sums_and_outputs(*what, keep=True, constant=constant)
    losses, *aux = outputs if has_aux else (outputs,)
    value = jnp.sum(losses if weights is None else weights * losses)
    return (value, sums, *aux) if has_value else (sums, *aux) if has_aux else sums


def _with_aux(loss_fn):
    def fn(params, example):
        loss, aux = loss_fn(params, example)
        return loss, lax.stop_gradient(aux)

    return fn


def _of_loss(outputs, _):
    """Returns the one cotangent of a loss with aux."""
    loss, aux = outputs
    zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), aux)
    return jnp.ones((1, *loss.shape), loss.dtype), zeros


def one_of_batch(apply_fn: Callable) -> Callable:
    """Returns the model for one example, which it runs as a batch of one."""

    def output(params, example):
        outputs = as_batch_of_one(lambda x: apply_fn(params, x), example)
        return jax.tree.map(lambda h: h[0], outputs)

    return output


def check_model(apply_fn, inputs):
    check_function("apply_fn", apply_fn)
    check_leaves(inputs, "inputs", data=True)
    _count(inputs)


def check_cotangents(cotangents):
    if not isinstance(cotangents, Columns):
        check_function("cotangents", cotangents)


def sums_of_powers(
    fn: Callable,
    params: PyTree,
    examples: tuple[PyTree, PyTree],
    cotangents: Callable | Columns,
    powers: Sequence[int],
    weights: jax.Array,
    chunk_bytes: int | None = None,
    share: int | None = None,
) -> tuple[PyTree, ...]:
    """Returns what `power_sums` does, but that the caller makes it a constant."""
    what = fn, params, examples, cotangents, powers, weights, chunk_bytes
    return sums_and_outputs(*what, share=share, constant=False)[0]


def sums_and_outputs(
    fn,
    params,
    examples,
    cotangents,
    powers,
    weights,
    chunk_bytes,
    report=None,
    keep=False,
    by_example=False,
    share=None,
    constant=True,
):
    """Returns the sums of powers, and all outputs if they are to be kept.

    If `by_example`, the squared norms of examples in the place of sums over them. Each
    device has a `share` of the examples, see `share_of`. If they are not to be made a
    `constant`, the caller does it: for each array that is an operation to be traced.
    """
    if not isinstance(powers, Sequence) or not powers or {*powers} - {1, 2, 4}:
        raise ValueError(f"`powers` must be some of 1, 2 and 4; got {powers!r}.")
    powers = tuple(powers)
    check_leaves(params, "params")
    check_leaves(examples, "(inputs, targets)", data=True)
    check_leaves(weights, "weights")
    params, examples = jax.tree.map(jnp.asarray, (params, examples))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which has "
                "no gradient; close over it or pass it in `inputs`."
            )
    n = _count(examples)
    wide = widen(*jax.tree.leaves(params))
    weights = jnp.ones(n, wide) if weights is None else jnp.asarray(weights)
    if weights.shape != (n,):
        raise ValueError(
            f"`weights` must have shape ({n},), one per example; got {weights.shape}."
        )
    stopped = lax.stop_gradient if constant else lambda tree: tree
    operands = stopped((params, examples, weights))
    share = share_of(examples, params) if share is None else share
    what = Summation(powers, chunk_bytes, share, by_example=by_example)
    # Typed as varying over devices, so that the gradients are those of one device.
    witness = jnp.zeros(())
    for x in jax.tree.leaves(operands):
        witness = vary_like(witness, x)
    operands = jax.tree.map(lambda x: vary_like(x, witness), operands)

    used: list[Any] = [] if report is None else report

    def mapped(params, examples, weights):
        def one(example, weight):
            sums, h = sums_of_example(
                fn, params, example, cotangents, weight, what, used
            )
            return sums, h if keep else None

        try:
            axes = (0 if by_example else None, 0)
            return jax.vmap(one, out_axes=axes)(examples, weights)
        except NotImplementedError:
            # Something in the model has no batching rule.
            if by_example:
                return lax.map(lambda x: one(*x), (examples, weights))
            return _one_by_one(one, examples, weights)

    if n == 0:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(0 if by_example else x.shape), operands[0]
        )
        sums, h = [[z] * len(powers) for z in jax.tree.leaves(zeros)], weights
    else:
        rows = _like_examples(operands[1]) if keep or by_example else None
        leaves = jax.tree.leaves(operands[0])
        like = [rows for _ in leaves] if by_example else leaves
        sums, h = without_explicit_axes(
            mapped, operands, (like, rows if keep else None)
        )
    if report is None:
        warn_of_fallbacks(leaves_of(params, used))
    leaves, tree = jax.tree.flatten(params)
    sums = tuple(
        tree.unflatten(
            [s[i].astype(widen(x.dtype)) for s, x in zip(sums, leaves, strict=True)]
        )
        for i in range(len(powers))
    )
    return stopped((sums, h))


def _one_by_one(one, examples, weights):
    """Adds the sums of examples up without mapping over them."""
    first = jax.tree.map(lambda x: x[0], (examples, weights))
    like, _ = jax.eval_shape(one, *first)
    zeros = jax.tree.map(
        lambda x: vary_like(jnp.zeros(x.shape, x.dtype), weights), like
    )

    def step(total, x):
        sums, h = one(*x)
        return jax.tree.map(jnp.add, total, sums), h

    return lax.scan(step, zeros, (examples, weights))


def _like_examples(examples):
    """Returns one number for each example, sharded over devices as they are."""
    for x in jax.tree.leaves(examples):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.sum(jnp.zeros_like(x), axis=tuple(range(1, x.ndim)))
    return None


def _count(examples):
    """Returns the number of examples, after checking that all leaves agree on it."""
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    if not leaves:
        raise ValueError("`inputs` holds no arrays, so there are no examples.")
    shapes = [(path, shape_of(x)) for path, x in leaves]
    n = shapes[0][1][:1]
    for path, shape in shapes:
        if shape[:1] != n or not n:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path) or 'at the root'} of `inputs` or "
                f"`targets` has shape {shape}; "
                f"expected a leading axis of {n[0] if n else 'B'} examples."
            )
    return n[0]


def share_of(examples: PyTree, params: PyTree) -> int:
    """Returns how many examples each device has, as far as is known.

    On explicit axes that is in their types. On automatic ones only the mesh is known,
    also if it is that of the parameters: as few as they may be.
    """
    n = _count(examples)
    types = [
        jax.typeof(x) for x in (*jax.tree.leaves(examples), *jax.tree.leaves(params))
    ]
    meshes = [x.sharding.mesh for x in types] + [jax.sharding.get_abstract_mesh()]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None:
        return n
    rows = {
        name
        for x in jax.tree.leaves(examples)
        for names in jax.typeof(x).sharding.spec[:1]
        for name in (names if isinstance(names, tuple) else (names,))
    }
    devices = math.prod(
        mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto or name in rows
    )
    return n // math.gcd(n, devices)


def without_explicit_axes(fn: Callable, operands: tuple, like: tuple) -> Any:
    """Calls `fn`, leaving to the compiler how values are sharded over devices.

    Operands that are mapped together may be sharded differently then. The outputs are
    sharded as the arrays in `like` are, of which it is a prefix; None is replicated.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(operands)]
    explicit = jax.sharding.AxisType.Explicit
    mesh = next((s.mesh for s in shardings if explicit in s.mesh.axis_types), None)
    if mesh is None:
        return fn(*operands)

    def sharding(x):
        given = jax.typeof(x).sharding
        spec = given.spec if given.mesh == mesh else jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(mesh, spec)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    out = jax.tree.map(
        lambda x: replicated if x is None else sharding(x),
        like,
        is_leaf=lambda x: x is None,
    )
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == explicit
    )
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out)(*operands)
