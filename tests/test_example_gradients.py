"""Norms of the gradients of single examples, and their mean once they are clipped."""

import functools
import importlib
import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_engine as programs
import test_engine_patterns as patterns
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_engine_devices import alone, mesh, shapes

import fsam_optax as fsam
from fsam_optax import (
    categorical,
    clipped_gradient,
    explain,
    gaussian,
    negative_log_likelihood,
    nnx as fsam_nnx,
    per_example_norms,
)
from fsam_optax._engine import example_squares, explain_squares


normal = programs.normal
OUTER, GRAM, DENSE = "outer product", "Gram matrices", "shared dense"


@jax.jit
def squared(grads):
    """Squared norms of gradients (N, ...) of each leaf, float32 or wider."""

    def norms(g):
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        return jnp.sum(g.reshape(len(g), -1) ** 2, axis=1)

    return jax.tree.map(norms, grads)


def in_full(loss_fn, params, batch):
    """Formed from an array of examples x parameters."""
    return squared(jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch))


def norms_in_full(loss_fn, params, batch):
    return np.sqrt(sum(jax.tree.leaves(in_full(loss_fn, params, batch))))


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        assert a.shape == b.shape, where
        largest = max(np.max(np.abs(b), initial=0), 1e-30)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * largest, err_msg=where
        )


@pytest.fixture
def rank_promotion():
    """Programs line up shapes as their authors please."""
    with jax.numpy_rank_promotion("allow"):
        yield


# The rules, each beside gradients formed in full: what a weight is used for, and the
# rules of the parameters. Weights that are used several times need the products of
# their uses.
RULES = {
    "dense": {OUTER, "reduction"},
    "shared_dense": {DENSE, "reduction"},
    "batched_product": {OUTER},
    "used_twice": {"constant", GRAM},
    "slices_of_one_parameter": {OUTER},
    "parts_of_one_parameter": {GRAM},
    "embedding": {"embedding", DENSE},
    "tied_embedding": {"embedding + shared dense"},
    "embedding_of_two_indices": {"embedding"},
    "embedding_out_of_bounds": {"embedding"},
    "layer_norm": {"reduction"},
    "conv_2d_strided": {"convolution"},
    "conv_2d_depthwise": {"convolution"},
    "recurrent_embedding_and_convolution": {"embedding", "convolution"},
    "stacked_layers": {"reduction", DENSE},
    "scanned_layers_with_a_shared_scale": {"reduction", OUTER},
    "rounded_on_the_way": {"fallback"},
    "lora_merged": {OUTER},
    "kron": {GRAM},
    "where": {OUTER},
    "permuted": {OUTER},
    "concatenated": {OUTER},
    "symmetric": {GRAM},
    "symmetric_by_index": None,
    "toeplitz": {"indexed product"},
    "weight_norm": None,
    "one_table_looked_up_twice": {"embedding"},
    "rows_looked_up_one_by_one_under_vmap": {"embedding"},
    "large_table": {"embedding"},
    "split_in_a_sum": {GRAM},
    "unrolled_lstm": {"reduction", GRAM},
}


@pytest.mark.short(
    "kron",
    "symmetric_by_index",
    "toeplitz",
    "shared_dense",
    "used_twice",
    "large_table",
    "conv_2d_strided",
    "layer_norm",
)
@pytest.mark.filterwarnings("ignore:The gradients of single examples are formed")
@pytest.mark.usefixtures("rank_promotion")
@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    loss_fn, params, batch, *_ = (programs.PROGRAMS | patterns.PATTERNS)[name]
    explanation = explain_squares(loss_fn, params, batch)
    expected = RULES[name]
    if expected is not None:
        assert {leaf.rule for leaf in explanation} == expected, f"\n{explanation}"
    squares = jax.jit(lambda *args: example_squares(loss_fn, *args))(params, batch)
    assert_close(squares, in_full(loss_fn, params, batch))


@pytest.mark.short("7")
@pytest.mark.filterwarnings("ignore:The gradients of single examples are formed")
@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed):
    rng = np.random.default_rng(seed)
    loss_fn, params, batch = programs.random_program(100 + seed)
    if seed % 2:
        make = patterns.MAKES[rng.choice(list(patterns.MAKES))]
        uses = [patterns.USES[k] for k in rng.choice(list(patterns.USES), 2)]
        params = {"w": normal(0, 6, 12), "v": normal(1, 6, 12), "s": normal(2, 12, 12)}
        batch = normal(3, 4, 5, 6)

        def loss_fn(params, x):
            w = make(params)
            return sum((jnp.sum(use(w, x) ** 2) for use in uses), jnp.zeros(()))

    squares = jax.jit(lambda *args: example_squares(loss_fn, *args))(params, batch)
    assert_close(squares, in_full(loss_fn, params, batch), 3e-5)


@pytest.mark.short("parts_of_one_parameter-500", "rounded_on_the_way-1")
@pytest.mark.filterwarnings("ignore:The gradients of single examples")
@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("chunk_bytes", [1, 500])
@pytest.mark.parametrize("name", ["parts_of_one_parameter", "rounded_on_the_way"])
def test_a_few_examples_at_a_time(name, chunk_bytes):
    loss_fn, params, batch, _ = programs.PROGRAMS[name]

    @jax.jit
    def squares(params, batch):
        return example_squares(loss_fn, params, batch, chunk_bytes=chunk_bytes)

    assert_close(squares(params, batch), in_full(loss_fn, params, batch))


@pytest.mark.filterwarnings("ignore:The gradients of single examples could not")
def test_what_cannot_be_mapped_over():
    loss_fn, params = patterns.without_a_batching_rule, patterns.normal(3, 8, 8)
    batch = patterns.normal(3, 8)
    expected = [jax.grad(loss_fn)(params, x) for x in batch]
    squares = jax.jit(lambda *args: example_squares(loss_fn, *args))(params, batch)
    assert_close(squares, squared(jnp.stack(expected)))


@pytest.mark.filterwarnings("ignore:The gradients of single examples could not")
def test_falls_back_if_the_rewriting_breaks(monkeypatch):
    def refuse(*args):
        raise KeyError("planning")

    example = importlib.import_module("fsam_optax._engine.example")
    monkeypatch.setattr(example, "make_plan", refuse)
    loss_fn, params, batch, _ = programs.PROGRAMS["dense"]
    squares = jax.jit(lambda *args: example_squares(loss_fn, *args))(params, batch)
    assert_close(squares, in_full(loss_fn, params, batch))


# The loss that knows its model.

N, T, D, C = 6, 4, 6, 3
PARAMS = {
    "table": jnp.asarray(normal(0, 9, D)),
    "w": normal(1, D, C),
    "count": jnp.arange(2),
}
TOKENS = programs.tokens(N, T, vocabulary=9)
LABELS = programs.tokens(N, T, vocabulary=C)


def model(params, x):
    return jnp.tanh(params["table"][x]) @ params["w"]


def weighed_loss(real, example):
    """The loss of one example: its labels by their weights, negative ones absent."""
    x, y, w = example
    h = jnp.tanh(real["table"][x]) @ real["w"]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(y < 0, 0, w * log_p))


@pytest.mark.short("labels")
@pytest.mark.parametrize("weights", ["none", "examples", "labels"])
def test_labels_and_weights(weights):
    """The gradients that these are norms of add up to D times that of the loss."""
    nll = negative_log_likelihood(model, categorical)
    labels = LABELS.at[1, 2:].set(-1)
    w = jnp.ones((N, T))
    batch = TOKENS, labels
    if weights != "none":
        w = jnp.abs(normal(2, N, T if weights == "labels" else 1)) + jnp.zeros((N, T))
        w = w.at[3].set(0)
        batch = *batch, w if weights == "labels" else w[:, 0]
    real = {"table": PARAMS["table"], "w": PARAMS["w"]}
    expected = in_full(weighed_loss, real, (TOKENS, labels, w))

    @jax.jit
    def found(params):
        by_leaf = per_example_norms(nll, params, batch, by_leaf=True)
        one = per_example_norms(
            nll, params, batch, mask=lambda p: {k: k == "w" for k in p}
        )
        return per_example_norms(nll, params, batch), by_leaf, one

    norms, by_leaf, one = found(PARAMS)
    np.testing.assert_allclose(norms, np.sqrt(sum(expected.values())), rtol=2e-5)
    assert by_leaf.pop("count") == optax.MaskedNode()
    assert_close(by_leaf, jax.tree.map(np.sqrt, expected), 2e-5)
    np.testing.assert_allclose(one, np.sqrt(expected["w"]), rtol=2e-5)
    if weights != "none":
        assert norms[3] == 0
    grads = jax.jit(jax.vmap(jax.grad(weighed_loss), (None, 0)))(
        real, (TOKENS, labels, w)
    )
    total = np.sum(np.where(labels < 0, 0, w))
    mean = jax.tree.map(lambda g: np.sum(g, 0) / total, grads)
    rest = {"count": PARAMS["count"]}
    assert_close(jax.jit(jax.grad(lambda p: nll(p | rest, batch)))(real), mean)


def test_the_three_forms_of_a_loss():
    x, y = normal(0, N, D), normal(1, N, C)

    def apply_fn(w, x):
        return jnp.tanh(x @ w)

    def loss_fn(w, example, scale):
        x, y = example
        return scale * jnp.sum((apply_fn(w, x[None])[0] - y) ** 2)

    nll, w = negative_log_likelihood(apply_fn, gaussian()), PARAMS["w"]
    norms = jax.jit(functools.partial(per_example_norms, nll))(w, (x, y))
    for form in ((apply_fn, gaussian()), (loss_fn,)):
        options = {"loss_args": (0.5,)} if len(form) == 1 else {}
        found = jax.jit(functools.partial(per_example_norms, *form, **options))
        np.testing.assert_allclose(found(w, (x, y)), norms, rtol=1e-5)
        assert explain(
            per_example_norms, *form, w, (x, y), *options.get("loss_args", ())
        )
    ((_, shape, rule, cost, _),) = explain(per_example_norms, nll, w, (x, y))
    assert (shape, rule) == ((D, C), OUTER) and cost < 1


def test_aux_and_a_key_for_each_example():
    def apply_fn(w, x, key):
        mask = jax.random.bernoulli(key, 0.5, (1, D))
        return (x * mask) @ w, {"mean": jnp.mean(x, 1)}

    nll = negative_log_likelihood(apply_fn, gaussian(), has_aux=True)
    x, y, key = normal(0, N, D), normal(1, N, C), jax.random.key(3)

    def of_row(w, n):
        """The gradient by the loss, with all other examples hidden."""
        weights = (jnp.arange(N) == n).astype(float)
        return jax.grad(lambda w: nll(w, (x, y, weights), key)[0])(w)

    expected = jax.jit(jax.vmap(of_row, (None, 0)))(PARAMS["w"], np.arange(N))
    norms = jax.jit(lambda w: per_example_norms(nll, w, (x, y), loss_args=(key,)))(
        PARAMS["w"]
    )
    np.testing.assert_allclose(norms, np.sqrt(squared(expected)), rtol=1e-5)


@pytest.mark.long
def test_heads_and_complex_inputs():
    def apply_fn(w, x):
        h = jnp.fft.ifft(x * (1j + w["phase"])[None]).real
        return {"a": h[:, :3], "b": h[:, 3:]}

    nll = negative_log_likelihood(
        apply_fn, fsam.heads({"a": categorical, "b": gaussian()})
    )
    x = (normal(0, N, 5) + 1j * normal(1, N, 5)).astype(jnp.complex64)
    batch = x, {"a": LABELS[:, 0], "b": normal(2, N, 2)}
    params = {"phase": normal(3, 5)}
    rows = jax.tree.map(lambda x: x[:, None], batch)
    expected = in_full(nll, params, rows)
    norms = jax.jit(functools.partial(per_example_norms, nll, by_leaf=True))(
        params, batch
    )
    assert_close(norms, jax.tree.map(np.sqrt, expected))


# Transformations around it.


def mlp_loss(params, x):
    return jnp.sum(programs.mlp(params, x[None]) ** 2)


@pytest.mark.long
def test_maps_of_the_caller_and_no_derivative():
    ensemble = jax.tree.map(lambda w: jnp.stack([w, 2 * w, 0 * w]), programs.MLP)
    x = normal(0, 5, 6)

    def norms(params):
        return per_example_norms(mlp_loss, params, x)

    found = jax.jit(jax.vmap(norms))(ensemble)
    for k in range(3):
        member = jax.tree.map(lambda w, k=k: w[k], ensemble)
        expected = norms_in_full(mlp_loss, member, x)
        np.testing.assert_allclose(found[k], expected, rtol=1e-5)
    assert not np.any(found[2])  # A gradient of zero.
    _, stack = jax.jit(lambda p: lax.scan(lambda p, _: (p, norms(p)), p, length=2))(
        programs.MLP
    )
    np.testing.assert_allclose(stack[1], found[0], rtol=1e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(norms(p))))(programs.MLP)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
def test_on_each_device_of_a_shard_map(check_vma):
    loss_fn, params, batch, _ = programs.PROGRAMS["parts_of_one_parameter"]
    batch = jnp.concatenate([batch, batch, batch])[:12]
    run = jax.shard_map(
        lambda params, batch: per_example_norms(loss_fn, params, batch),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    expected = norms_in_full(loss_fn, params, batch)
    np.testing.assert_allclose(jax.jit(run)(params, batch), expected, rtol=1e-5)


@pytest.mark.short("True")
@pytest.mark.parametrize("check_vma", [True, False])
def test_clipped_on_each_device_of_a_shard_map(check_vma):
    nll = negative_log_likelihood(lambda w, x: x @ w, categorical)
    params, x = normal(0, 3, 4), normal(1, 8, 3)
    y, weights = np.arange(8) % 4, np.array([1, 1, 2, 0, 3, 1, 1, 1.0], np.float32)

    def each(*batch):
        return clipped_gradient(nll, params, batch, max_norm=0.5)[0]

    run = jax.shard_map(
        lambda *batch: each(*batch)[None],
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    batch = x, y, weights
    one = jax.jit(each)
    expected = [one(*(a[k : k + 2] for a in batch)) for k in range(0, 8, 2)]
    np.testing.assert_allclose(jax.jit(run)(*batch), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", [per_example_norms, clipped_gradient])
def test_a_key_that_examples_do_not_split_is_an_error(function):
    def model(w, x, key):
        return x @ w * jax.random.bernoulli(key, 0.5, (len(x), 4))

    nll = negative_log_likelihood(model, categorical, split_keys=False)
    batch = normal(1, 8, 3), np.arange(8) % 4
    options = {"loss_args": (jax.random.key(0),)}
    options |= {"max_norm": 1.0} if function is clipped_gradient else {}
    with pytest.raises(ValueError, match="are not known with a PRNG key"):
        function(nll, normal(0, 3, 4), batch, **options)


@pytest.mark.short("per_example_norms")
@pytest.mark.parametrize("function", ["per_example_norms", "clipped_gradient"])
def test_statistics_over_the_batch_are_an_error(function):
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    nll = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), categorical)
    batch = normal(1, 8, 3).astype("float32"), np.arange(8) % 3
    options = {"max_norm": 1.0} if function == "clipped_gradient" else {}
    with pytest.raises(ValueError, match="A statistic over the batch"):
        getattr(fsam_nnx, function)(nll, model, batch, **options)
    model.eval()
    nnx.jit(functools.partial(getattr(fsam_nnx, function), nll, **options))(
        model, batch
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind"),
    [("convolutional", AxisType.Auto), ("transformer", AxisType.Explicit)],
)
def test_devices_take_their_own_examples_and_exchange_nothing(monkeypatch, name, kind):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    count = importlib.import_module("compiled").count
    apply_fn, params, batch = shapes(mesh(kind), "data", None)[name]
    nll = negative_log_likelihood(apply_fn, categorical)

    def counted(params, batch):
        norms = jax.jit(lambda *args: per_example_norms(nll, *args))
        program = norms.lower(params, batch).compile()
        return count(program.as_text()), program.output_shardings

    whole, _ = counted(alone(params), alone(batch))
    each, sharding = counted(params, batch)
    assert set(each) == {"products"}
    assert each["products"] <= 1.02 * whole["products"] / 8
    assert sharding.is_equivalent_to(NamedSharding(mesh(kind), P("data")), 1)


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_devices(kind):
    devices = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(devices, P(*spec)))

    nll = negative_log_likelihood(model, categorical)
    params = {"table": PARAMS["table"], "w": PARAMS["w"]}
    norms = jax.jit(lambda *args: per_example_norms(nll, *args))
    expected = norms(params, (TOKENS, LABELS))
    placed = {"table": put(params["table"]), "w": put(params["w"], "model")}
    batch = put(TOKENS, "data"), put(LABELS, "data")
    np.testing.assert_allclose(norms(placed, batch), expected, rtol=1e-5)


# Numbers and cost.


@pytest.mark.short("bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_squared_in_float32(dtype):
    """Gradients of 1e3 in half precision, whose squares float16 does not hold."""
    params = {"w": jnp.ones((4, 2), dtype), "b": jnp.zeros(2, dtype)}
    x = jnp.full((3, 5, 4), 30, dtype) * jnp.arange(3, dtype=dtype)[:, None, None]

    def loss_fn(p, x):
        return jnp.sum((x @ p["w"] + p["b"][None]) * jnp.asarray(8, dtype))

    norms = jax.jit(functools.partial(per_example_norms, loss_fn))(params, x)
    assert norms.dtype == jnp.float32 and norms[1] > 1e3
    np.testing.assert_allclose(norms, norms_in_full(loss_fn, params, x), rtol=2e-2)


def test_no_examples_and_no_cancelling_below_zero():
    compiled = jax.jit(per_example_norms, static_argnums=0)
    assert compiled(mlp_loss, programs.MLP, jnp.zeros((0, 6))).shape == (0,)

    def loss_fn(w, x):
        first, second = jnp.tanh(x @ w)
        return jnp.sum(first - second)

    # Two equal positions: what they add cancels.
    w, x = normal(0, 50, 50), jnp.repeat(normal(1, 4, 1, 50), 2, axis=1)
    assert explain_squares(loss_fn, w, x)[0].rule == GRAM
    norms = compiled(loss_fn, w, x)
    largest = norms_in_full(lambda w, x: jnp.sum(jnp.tanh(x[0] @ w)), w, x)
    assert np.all(norms >= 0) and np.all(norms < 1e-3 * largest)


def test_rounding_makes_no_square_negative():
    """Positions of two directions, weighed so that their gradients cancel."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(32, 4, 2))
    x = directions @ rng.normal(size=(32, 2, 50))
    left_out, _ = np.linalg.qr(directions, mode="complete")
    c = left_out[:, :, 2:] @ rng.normal(size=(32, 2, 50))

    def loss_fn(w, example):
        x, c = example
        return jnp.sum(c * (x @ w))

    w, *batch = (np.float32(x) for x in (normal(0, 50, 50), x, c))
    assert explain_squares(loss_fn, w, batch)[0].rule == GRAM
    squares = np.asarray(jax.jit(functools.partial(example_squares, loss_fn))(w, batch))
    # Half of them would be below zero.
    assert np.all(squares >= 0) and np.any(squares == 0)
    assert np.all(squares < 1e-2)


def test_a_number_that_counts_several_times():
    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x * jnp.sum(w)))

    w, x = normal(0, 3), normal(1, 4, 5)
    (leaf,) = explain_squares(loss_fn, w, x)
    assert leaf.rule == "reduction"
    squares = jax.jit(functools.partial(example_squares, loss_fn))
    assert_close(squares(w, x), in_full(loss_fn, w, x))


@pytest.mark.parametrize("kind", [OUTER, GRAM, DENSE, "fallback"])
def test_no_array_of_all_gradients(kind):
    batch, width = 64, 128
    positions = {OUTER: 1, GRAM: 5, DENSE: 80, "fallback": 1}[kind]

    def loss_fn(w, x):
        w = lax.reduce_precision(w, 8, 22) if kind == "fallback" else w
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    w, x = normal(0, width, width), normal(1, batch, positions, width)
    (leaf,) = explain_squares(loss_fn, w, x)
    assert leaf.rule == kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used, plain = (
            programs.temporary_bytes(fn, w, x)
            for fn in (
                lambda *args: per_example_norms(loss_fn, *args),
                jax.grad(lambda w, x: jnp.sum(jax.vmap(loss_fn, (None, 0))(w, x))),
            )
        )
    # One copy of the activations is less than all gradients, and may be held.
    assert x.nbytes < 0.7 * w.nbytes * batch
    assert used - plain < x.nbytes + w.nbytes * batch / 8


def test_norms_cost_less_than_a_gradient():
    """Operations: one product less for each dense layer than a gradient has."""
    widths = (64, 64, 64, 10)
    params = [normal(k, m, n) for k, (m, n) in enumerate(itertools.pairwise(widths))]

    def apply_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    nll = negative_log_likelihood(apply_fn, categorical)
    batch = normal(0, 32, 64), programs.tokens(32, vocabulary=10)
    norms = patterns.operations(
        lambda *args: per_example_norms(nll, *args), params, batch
    )
    assert norms < 0.8 * patterns.operations(jax.grad(nll), params, batch)


# Clipping.


@pytest.mark.short("nll")
@pytest.mark.parametrize("form", ["nll", "loss"])
def test_clipped_gradient(form):
    real = {"table": PARAMS["table"], "w": PARAMS["w"]}
    labels, w = LABELS.at[1, 2:].set(-1), jnp.abs(normal(2, N, T)).at[3].set(0)
    batch = TOKENS, labels, w
    loss, total = weighed_loss, N
    if form == "nll":
        loss = negative_log_likelihood(model, categorical)
        total = jnp.sum(jnp.where(labels < 0, 0, w))
    grads = jax.jit(jax.vmap(jax.grad(weighed_loss), (None, 0)))(real, batch)
    norms = norms_in_full(weighed_loss, real, batch)
    limit = float(np.median(norms))
    factors = np.minimum(1, limit / np.maximum(norms, 1e-30))
    expected = jax.tree.map(
        lambda g: np.einsum("n,n...->...", factors, g) / total, grads
    )
    params = PARAMS if form == "nll" else real
    clipped = jax.jit(
        lambda params, limit: clipped_gradient(loss, params, batch, max_norm=limit)
    )
    found, before = clipped(params, limit)
    assert_close({k: found[k] for k in expected}, expected)
    np.testing.assert_allclose(before, norms, rtol=2e-5)
    whole, _ = clipped(params, jnp.inf)
    mean = jax.tree.map(lambda g: np.sum(g, 0) / total, grads)
    assert_close({k: whole[k] for k in mean}, mean)
    masked = functools.partial(
        clipped_gradient, loss, mask=lambda p: {k: k == "w" for k in p}
    )
    only, _ = jax.jit(masked)(params, batch, max_norm=limit)
    assert only["table"] == optax.MaskedNode() and only["w"].shape == (D, C)


# Modules.


@pytest.mark.long
def test_modules():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(D, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.out = nnx.Linear(4, C, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.dense(x))))

    net = Net(nnx.Rngs(0))
    batch = normal(0, N, D), LABELS[:, 0]
    nll = fsam_nnx.negative_log_likelihood(lambda m, x: m(x), categorical)
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def loss_fn(params, example):
        x, y = example
        h = nnx.merge(graph, params, rest)(x[None])
        return -jax.nn.log_softmax(h)[0, y]

    expected = norms_in_full(loss_fn, params, batch)
    norms = fsam_nnx.per_example_norms(nll, net, batch)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    by_leaf = fsam_nnx.per_example_norms(nll, net, batch, by_leaf=True)
    assert by_leaf["dense"]["kernel"][...].shape == (N,)
    grads, before = fsam_nnx.clipped_gradient(nll, net, batch, max_norm=1e9)
    np.testing.assert_allclose(before, expected, rtol=1e-5)
    mean = nnx.grad(lambda net: nll(net, batch))(net)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(mean))


def test_explain_counts_what_entries_that_count_apart_cost():
    x, mask = normal(1, 3, 50), normal(2, 50, 40) > 0

    def cost(weight):
        def loss_fn(w, x):
            return jnp.sum(jnp.tanh(x @ weight(w)))

        (leaf,) = explain_squares(loss_fn, normal(0, 50, 40), x)
        assert leaf.rule == OUTER
        return leaf.cost

    assert cost(lambda w: w) < 0.1
    assert cost(lambda w: jnp.where(mask, w, 0)) >= 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_are_as_wide_as_the_parameters(dtype):
    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    w, batch = (jnp.ones(shape, dtype) for shape in [(3, 2), (4, 3)])
    with jax.numpy_dtype_promotion("strict"):
        norms = per_example_norms(loss, w, batch)
        grads, _ = clipped_gradient(loss, w, batch, max_norm=1.0)
    assert norms.dtype == grads.dtype == dtype
