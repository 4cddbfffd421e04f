"""The engine in bounded memory: loops over cotangents and examples, by platform."""

import functools
import re
import warnings

import engine_oracles as oracles
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

from fsam_optax import (
    categorical,
    diagonal,
    euclidean_ball,
    explain,
    fisher_ellipsoid,
    fisher_empirical,
    fisher_exact,
    fisher_hutchinson,
    fisher_i1,
    fisher_i2,
    gaussian,
    given,
    loss_power_sums,
    negative_log_likelihood,
    power_sums,
    value_and_grad,
)
from fsam_optax._engine import explain_loss
from fsam_optax._fisher.one_pass import value_grad_and_fisher


BUDGET = 64 << 20
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def normal(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def temporaries(fn, *args):
    used = jax.jit(fn).lower(*args).compile().memory_analysis()
    return getattr(used, "temp_size_in_bytes")  # noqa: B009  (None has not)


def segment(params, x):
    """A hidden convolution, and one of size one."""
    x = jax.lax.conv_general_dilated(
        x, params["c"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(x) @ params["w"]


def dense(params, x):
    return jnp.tanh(x @ params["c"]) @ params["w"]


LARGE = {
    "segmentation": (
        segment,
        {"c": like(3, 3, 3, 8), "w": like(8, 5)},
        like(8, 32, 32, 3),
    ),
    "tokens": (dense, {"c": like(32, 32), "w": like(32, 1000)}, like(8, 64, 32)),
    "1000 classes": (dense, {"c": like(32, 64), "w": like(64, 1000)}, like(64, 32)),
}


@pytest.mark.short("1000 classes")
@pytest.mark.parametrize("name", LARGE)
def test_the_columns_of_the_exact_fisher_keep_to_the_budget(name):
    model, params, x = LARGE[name]
    labels = like(*jax.eval_shape(model, params, x).shape[:-1], dtype=jnp.int32)
    gradient = temporaries(
        jax.grad(negative_log_likelihood(model, categorical)), params, (x, labels)
    )
    allowed = max(2 * gradient, BUDGET)
    for estimator in (
        fisher_exact(model, categorical),
        fisher_i2(model, categorical, key=KEY, hessian="hutchinson"),
    ):
        fn = functools.partial(diagonal, estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # For the tokens, see below.
            assert (
                temporaries(lambda p, x, fn=fn: fn(p, (x, None)), params, x) < allowed
            )


def test_products_with_a_hessian_keep_to_the_budget():
    """Of a weight that is used twice there is one for each entry, many at a time."""

    def twice(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    estimator = fisher_i2(twice, gaussian(), key=KEY)
    used = temporaries(
        lambda w, x: diagonal(estimator, w, (x, None)), like(16, 16), like(64, 512, 16)
    )
    assert used < BUDGET


def test_many_columns_are_too_many():
    model, params, x = LARGE["tokens"]
    estimator = fisher_exact(model, categorical)
    with pytest.warns(UserWarning, match="63936 cotangents an example.*hutchinson"):
        jax.eval_shape(lambda p, x: diagonal(estimator, p, (x, None)), params, x)
    nll = negative_log_likelihood(model, categorical)
    params, x = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, x))
    explanation = explain(nll, params, (x, jnp.zeros(x.shape[:2], int)))
    assert "63936 cotangents an example" in str(explanation)


@pytest.mark.long
def test_draws_of_large_outputs_keep_to_what_is_asked_for():
    model, params, x = LARGE["tokens"]
    used = {}
    for draws, chunk_bytes in (1, None), (32, 1), (32, 1 << 30):
        estimator = fisher_hutchinson(
            model, categorical, key=KEY, num_samples=draws, chunk_bytes=chunk_bytes
        )
        used[draws, chunk_bytes] = temporaries(
            lambda p, x, e=estimator: diagonal(e, p, (x, None)), params, x
        )
    assert used[32, 1] < 1.5 * used[1, None]
    assert used[32, 1 << 30] > 5 * used[1, None]


@pytest.mark.long
def test_signs_of_large_outputs_hold_little_more_than_the_gradient():
    model, params, x = LARGE["tokens"]
    nll = negative_log_likelihood(model, categorical)
    labels = like(8, 64, dtype=jnp.int32)
    gradient = temporaries(jax.grad(nll), params, (x, labels))
    estimator = fisher_hutchinson(nll, key=KEY)
    used = temporaries(functools.partial(diagonal, estimator), params, (x, labels))
    assert used < 1.5 * gradient


def layers_of_words(params, tokens):
    """Equal layers in a loop, recomputed, between a table and a matrix of words."""

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, params["table"][tokens], params["layers"])
    return x @ params["head"]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older compiler")
def test_the_sums_of_layers_are_held_from_where_they_begin():
    """Not from the beginning on, beside the largest activations."""
    shapes = {"table": (2000, 64), "layers": (24, 64, 64), "head": (64, 2000)}
    params = {name: like(*shape) for name, shape in shapes.items()}
    batch = tuple(like(4, 64, dtype=jnp.int32) for _ in range(2))
    nll = negative_log_likelihood(layers_of_words, categorical)
    gradient = temporaries(jax.grad(nll), params, batch)

    def one_pass(params, batch):
        _, grads, fisher = value_grad_and_fisher(nll, params, batch, (), {})
        return jax.tree.map(jnp.add, grads, fisher)

    alone = functools.partial(diagonal, fisher_empirical(nll))
    assert temporaries(alone, params, batch) < 0.85 * gradient
    assert temporaries(one_pass, params, batch) < 0.65 * gradient


def test_the_second_gradient_takes_its_memory_when_it_begins():
    """Not from the beginning on, beside the first one and the Fisher."""

    def words(params, tokens):
        @jax.checkpoint
        def layer(x, w):
            up, down = w
            return x + jnp.tanh(x @ up) @ down, None

        x, _ = jax.lax.scan(layer, params["table"][tokens], params["layers"])
        return x @ params["table"].T

    layers = like(24, 32, 128), like(24, 128, 32)
    params = {"table": like(2000, 32), "layers": layers}
    batch = tuple(like(2, 10, dtype=jnp.int32) for _ in range(2))
    nll = negative_log_likelihood(words, categorical)

    def gradients(ball, **options):
        f = value_and_grad(nll, ball, metrics=False, **options)
        step = functools.partial(lambda f, p, b: f(p, f.init(p), b)[1], f)
        return temporaries(step, params, batch)

    ball = fisher_ellipsoid(0.1, given())
    fisher_sam = gradients(ball, empirical_fisher=True)
    assert fisher_sam < 1.25 * gradients(euclidean_ball(0.1))


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older compiler")
def test_squares_of_activations_are_made_when_they_are_used():
    """Not held, beside the activations, all the way back to their layer."""

    def perceptron(params, x):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ params[-1]

    params = [like(256, 256)] * 6 + [like(256, 10)]
    batch = like(128, 256), like(128, dtype=jnp.int32)
    nll = negative_log_likelihood(perceptron, categorical)
    gradient = temporaries(jax.grad(nll), params, batch)
    alone = functools.partial(diagonal, fisher_empirical(nll))
    assert temporaries(alone, params, batch) < 0.6 * gradient


def test_the_columns_at_a_time_are_chosen_for_the_platform():
    """All on an accelerator; on a CPU one, if loops take the examples one by one."""
    params = {"c": like(3, 3, 3, 16), "w": like(16, 10)}
    x = like(64, 16, 16, 3)

    def pooled(params, x):
        return jnp.mean(segment(params, x), (1, 2))

    nll = negative_log_likelihood(pooled, categorical)
    gradient = temporaries(jax.grad(nll), params, (x, like(64, dtype=jnp.int32)))

    def exact(params, x):
        return diagonal(fisher_exact(nll), params, (x, None))

    assert temporaries(exact, params, x) < 1.5 * gradient
    text = jax.jit(exact).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text


PARAMS = {"c": normal(4, 3) / 2, "w": normal(3, 5) / 2}
POSITIONS = normal(6, 5, 4)
WEIGHTS = np.asarray(RNG.uniform(size=(6, 5)) * (RNG.uniform(size=(6, 5)) > 0.3))


@pytest.mark.short("False-8000", "True-1")
@pytest.mark.parametrize("chunk_bytes", [1, 8_000, 16_000, 1 << 20, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_are_the_factor_whatever_their_number_at_a_time(chunk_bytes, weighted):
    """Twenty columns of each example, by 1, 3 and 7; against all Jacobians at once."""
    batch = (POSITIONS, None, WEIGHTS) if weighted else (POSITIONS, None)
    m = WEIGHTS if weighted else np.ones((6, 5))
    estimator = fisher_exact(dense, categorical, chunk_bytes=chunk_bytes)
    found = jax.jit(functools.partial(diagonal, estimator))(PARAMS, batch)

    def columns(params, x):
        return jax.jacobian(dense)(params, x[None])  # (1, T, C, *shape)

    factors = jax.jit(lambda p, x: categorical.factor(dense(p, x)))(  # (N, T, C, K)
        PARAMS, POSITIONS
    )
    a = np.max(m, 1, keepdims=True)
    within = np.divide(m, a, where=a > 0, out=np.zeros_like(m))
    scale = a * within**2 / np.sum(m)
    jacobians = jax.jit(jax.vmap(columns, (None, 0)))(PARAMS, POSITIONS)
    for name, jacobian in jacobians.items():
        rows = np.einsum("ntcij,ntck->ntkij", np.asarray(jacobian)[:, 0], factors)
        expected = np.einsum("nt,ntkij->ij", scale, rows**2)
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empirical", "i1", "hutchinson", "i2"])
def test_the_budget_does_not_change_the_estimate(name):
    estimator = {
        "empirical": fisher_empirical,
        "i1": functools.partial(fisher_i1, key=KEY, num_samples=3),
        "hutchinson": functools.partial(fisher_hutchinson, key=KEY, num_samples=3),
        "i2": functools.partial(fisher_i2, key=KEY),
    }[name]
    batch = POSITIONS, RNG.integers(5, size=(6, 5))
    found = [
        diagonal(estimator(dense, categorical, chunk_bytes=b), PARAMS, batch)
        for b in (None, 1)
    ]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_a_budget_is_a_number_of_bytes(wrong):
    with pytest.raises(ValueError, match="chunk_bytes"):
        fisher_exact(dense, categorical, chunk_bytes=wrong)


def written_out(w, x):
    return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])


def scanned(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x, w)[0]


# The input and what each layer puts out; the input of each layer, which is recomputed.
@pytest.mark.parametrize(("model", "copies"), [(written_out, 3), (scanned, 2)])
def test_a_step_may_hold_a_sixteenth_of_what_a_gradient_keeps(model, copies):
    """Lowered, not run: what 16384 examples keep is gigabytes."""

    def program(n, **options):
        shapes = (2, 64, 64), (n, 256, 64)
        args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

        def squares(w, x):
            return power_sums(model, w, x, lambda h, _: h[None], **options)

        traced = jax.jit(squares).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    kept = copies * 4 * 256 * 64
    assert program(16384) == program(16384, chunk_bytes=16384 * kept // 16)
    assert program(16384) != program(16384, chunk_bytes=64 << 20)
    assert program(4096) == program(4096, chunk_bytes=64 << 20)


def in_layers(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def in_halves(w, x):
    return jnp.tanh(x[:16] @ w[0, :16]) + jnp.tanh(x[16:] @ w[0, 16:])


def in_a_loop(w, x):
    """It is rounded at each step, so that the loop adds up what is rounded."""

    def step(h, _):
        return jnp.tanh(h @ jax.lax.reduce_precision(w[0], 8, 20)), None

    return jax.lax.scan(step, x, None, length=3)[0]


def in_a_branch(w, x):
    return jax.lax.cond(w[0, 0, 0] > 0, lambda: jnp.tanh(x @ w[0]), lambda: x)


@pytest.mark.parametrize("model", [in_layers, in_halves, in_a_loop, in_a_branch])
def test_products_behind_an_unknown_map_are_not_held_for_all_examples(model):
    def loss_fn(w, x):
        return jnp.sum(model(jax.lax.reduce_precision(w, 8, 20), x) ** 2)

    (leaf,) = explain_loss(loss_fn, like(3, 32, 32), like(16, 32))
    assert leaf.rule == "fallback"


@pytest.mark.long
def test_what_the_gradient_holds_for_all_examples_may_be_held():
    """Going back an equation is solved together with the gradient of its parameters."""

    def loss_fn(w, x):
        y = odeint(lambda y, t, w: jnp.tanh(w @ y), x, jnp.array([0.0, 1.0]), w)
        return jnp.sum(y**2)

    args = like(8, 8), like(16, 8)
    (leaf,) = explain_loss(loss_fn, *args)
    assert leaf.rule == "reduction"
    gradient = jax.grad(lambda w, x: jnp.sum(jax.vmap(loss_fn, (None, 0))(w, x)))
    held = temporaries(lambda *args: loss_power_sums(loss_fn, *args), *args)
    assert held <= 1.2 * temporaries(gradient, *args)


def test_a_cpu_scatters_to_known_places_one_example_at_a_time():
    """So that next to the scores that it scatters it holds no copy of them."""
    offsets = np.arange(64)[:, None] - np.arange(64)[None] + 63

    def loss_fn(p, x):
        return jnp.sum((jax.nn.softmax(x @ x.T + p[offsets]) @ x) ** 2)

    p, x = like(127), like(64, 64, 8)
    gradient = jax.grad(lambda p, x: jnp.sum(jax.vmap(loss_fn, (None, 0))(p, x)))
    held = temporaries(lambda *args: loss_power_sums(loss_fn, *args), p, x)
    scores = 4 * x.shape[0] * offsets.size
    assert held <= 1.1 * max(scores, temporaries(gradient, p, x))


def test_the_loop_over_examples_is_chosen_for_the_platform():
    """Single examples on CPUs, whatever the machine that lowers the program."""

    def squares(w, x, **options):
        def model(w, x):
            return jnp.tanh(x @ w)

        return power_sums(model, w, x, lambda h, _: h[None], **options)

    args = normal(16, 16) / 8, normal(8, 32, 16)
    traced = jax.jit(squares).trace(*args)
    text = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    generous = jax.jit(functools.partial(squares, chunk_bytes=1 << 30)).lower(*args)
    assert "stablehlo.while" in text["cpu"] and text["cpu"] == generous.as_text()
    assert "stablehlo.while" not in text["cuda"] + text["tpu"]
    exported = jax.export.export(jax.jit(squares), platforms=("cuda", "cpu"))(*args)
    found = traced.lower().compile()(*args)
    for x, y in zip(exported.call(*args), found, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


def test_a_branch_for_a_platform_is_chosen_when_the_program_is_lowered():
    """Those for other platforms need not run on this one."""

    def apply(w, x):
        return jax.lax.platform_dependent(x @ w, cpu=jnp.tanh, default=jnp.exp)

    def squares(w, x):
        return power_sums(apply, w, x, lambda h, _: h[None])[0]

    args = normal(4, 4), normal(3, 4)
    traced = jax.jit(squares).trace(*args)
    for platform, name in (("cpu", "tanh"), ("cuda", "exponential")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall("tanh|exponential", text)) == {name}
    (expected,) = oracles.power_sums(apply, *args, lambda h, _: h[None])
    oracles.assert_close(squares(*args), expected)


def convolved(layout):
    """Returns a model of three convolutions, and its kernels, in some layout."""
    data, kernels, groups = layout
    sizes = {"O": 8, "I": 8 // groups, "H": 3, "W": 3}
    params = {k: normal(*(sizes[d] for d in kernels)) / 4 for k in "abc"}

    def apply(params, x):
        for kernel in params.values():
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1) if kernel is params["a"] else (2, 2),
                "SAME",
                dimension_numbers=(data, kernels, data),
                feature_group_count=groups,
            )
            x = jnp.tanh(x)
        return jnp.sum(x, [data.index(d) for d in "HW"])

    x = normal(5, *({"C": 8, "H": 9, "W": 8}[d] for d in data[1:]))
    return apply, params, x


@pytest.mark.short("layout3")
@pytest.mark.parametrize(
    "layout",
    [
        ("NHWC", "HWIO", 1),
        ("NCHW", "OIHW", 1),
        ("NHCW", "WOIH", 1),
        ("NCHW", "OIHW", 4),
    ],
)
def test_convolutions_in_loops_have_their_channels_last(layout):
    """As XLA:CPU runs them fast; in loops it does not bring them into that form."""
    apply, params, x = convolved(layout)
    columns = np.asarray(RNG.normal(size=(3, 8)), np.float32)

    def cotangents(h, target):
        return columns * h[None]

    powers = (1, 2, 4)
    fn = jax.jit(
        lambda params, x: power_sums(
            apply, params, x, cotangents, powers=powers, chunk_bytes=1
        )
    )
    text = fn.lower(params, x).as_text()
    found = re.findall(r"stablehlo.convolution.*dim_numbers = (\S.*?\]->\[.*?\])", text)
    assert "stablehlo.while" in text
    assert set(found) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    expected = oracles.power_sums(apply, params, x, cotangents, powers=powers)
    for p, q in zip(fn(params, x), expected, strict=True):
        oracles.assert_close(p, q, 2e-5)
