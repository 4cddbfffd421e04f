"""What a step may cost, counted in the program: gradients, passes, copies, equations.

Never in seconds. The yardstick is the step that one would write by hand.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import (
    adaptive_ellipsoid,
    categorical,
    euclidean_ball,
    fisher_ellipsoid,
    fisher_empirical,
    fisher_hutchinson,
    fisher_i1,
    given,
    negative_log_likelihood,
    refresh_every,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)
from fsam_optax._engine.jaxpr import Dataflow
from fsam_optax._fisher.one_pass import value_grad_and_fisher


SIZES = (96, 160, 128, 10)
BASE = optax.sgd(0.1, momentum=0.9)
PERTURBATIONS = {
    "sam": euclidean_ball(0.05),
    "asam": adaptive_ellipsoid(0.5),
    "fisher_sam": fisher_ellipsoid(0.1, squared_gradient()),
}


def model(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b[None])
    w, b = params[-1]
    return x @ w + b[None]


loss = negative_log_likelihood(model, categorical)
PARAMS = [
    (jnp.full(shape, 0.01, jnp.float32), jnp.zeros(shape[1], jnp.float32))
    for shape in itertools.pairwise(SIZES)
]
BATCH = (jnp.ones((64, SIZES[0]), jnp.float32), jnp.arange(64) % 10)
COPY = sum(x.nbytes for x in jax.tree.leaves(PARAMS))


def updated(grads, params, state):
    updates, state = BASE.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def plain(params, state):
    return updated(jax.grad(loss)(params, BATCH), params, state)


def by_hand(params, state):
    grads = jax.grad(loss)(params, BATCH)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.05 * g / norm, params, grads)
    return updated(jax.grad(loss)(point, BATCH), params, state)


def with_optimizer(perturbation, **options):
    tx = sharpness_aware(BASE, perturbation, **options)

    def step(params, state):
        def grad_fn(params):
            return jax.grad(loss)(params, BATCH)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step, tx.init(PARAMS)


def with_oracle(perturbation, **options):
    f = value_and_grad(loss, perturbation, **options)

    def step(params, state):
        _, grads, ascent = f(params, state[0], BATCH)
        params, base = updated(grads, params, state[1])
        return params, (ascent, base)

    return step, (f.init(PARAMS), BASE.init(PARAMS))


FRONT_ENDS = {"transformation": with_optimizer, "oracle": with_oracle}


def compiled(step, state):
    return jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state).compile()


def passes(program):
    """Counts what the program writes that has the shape of a weight matrix.

    In its main line and in its loops, those of the norms.
    """
    text = program.as_text()
    main = text[text.index("\nENTRY") :]
    for body in re.findall(r" while\(.*?body=(%?[\w.-]+)", main):
        main += re.search(rf"^{re.escape(body)} .*?^}}", text, re.M | re.S)[0]
    count = 0
    for shape in itertools.pairwise(SIZES[:-1]):
        made = re.findall(rf"= f32\[{shape[0]},{shape[1]}\]\S* (\S+?)\(", main)
        count += len([x for x in made if x not in ("parameter", "get-tuple-element")])
    return count


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def equations(jaxpr, name=None):
    """Counts equations, those of branches and loops included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += name in (None, eqn.primitive.name)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                count += equations(value.jaxpr, name)
    return count


def products(step, state):
    """Counts matrix products: 3 layers take 3 + 5 for a gradient."""
    return equations(jax.make_jaxpr(step)(PARAMS, state).jaxpr, "dot_general")


GRADIENT = 8


@pytest.mark.short("fisher_sam-transformation")
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_step_is_two_gradients(name, front_end):
    assert products(plain, BASE.init(PARAMS)) == GRADIENT
    for metrics in (True, False):
        step, state = FRONT_ENDS[front_end](PERTURBATIONS[name], metrics=metrics)
        assert products(step, state) == 2 * GRADIENT


def test_a_step_between_perturbations_is_one_gradient():
    step, state = with_optimizer(euclidean_ball(0.05), every=2)
    jaxpr = jax.make_jaxpr(step)(PARAMS, state).jaxpr
    (choice,) = (
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "cond" and equations_of(eqn, "dot_general")
    )
    counts = [equations(b.jaxpr, "dot_general") for b in choice.params["branches"]]
    assert sorted(counts) == [0, GRADIENT]
    assert equations(jaxpr, "dot_general") == 2 * GRADIENT


def equations_of(eqn, name):
    return sum(equations(b.jaxpr, name) for b in eqn.params["branches"])


def operations(step, state):
    return compiled(step, state).cost_analysis()["flops"]


@pytest.mark.long
def test_the_exact_empirical_fisher_shares_the_first_gradient():
    """Its squares are one more product for each weight, and no new pass."""
    one_pass = fisher_ellipsoid(0.1, given())
    apart = fisher_ellipsoid(0.1, fisher_empirical(model, categorical))
    gradient = operations(plain, BASE.init(PARAMS))
    assert operations(*with_oracle(one_pass, empirical_fisher=True)) < 2.6 * gradient
    assert operations(*with_oracle(apart)) < 3.3 * gradient


def test_a_cached_fisher_costs_nothing_between_its_refreshes():
    estimator = refresh_every(10, fisher_empirical(model, categorical))
    step, state = with_oracle(fisher_ellipsoid(0.1, estimator))
    jaxpr = jax.make_jaxpr(step)(PARAMS, state).jaxpr
    conditional = sum(
        equations_of(eqn, "dot_general")
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "cond"
    )
    assert conditional >= GRADIENT
    assert products(step, state) - conditional == 2 * GRADIENT


@pytest.mark.short("fisher_sam-4-0.25-transformation")
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(
    ("name", "more_passes", "copies"),
    [("sam", 0, 0.25), ("asam", 2, 0.25), ("fisher_sam", 4, 0.25)],
)
def test_no_more_passes_and_memory_than_by_hand(name, more_passes, copies, front_end):
    """Passes are of two weight matrices; copies are of all parameters.

    The metrics hold on to both gradients.
    """
    yardstick = yardstick_program()
    assert passes(yardstick) > 4
    copies += jax.__version_info__ < (0, 10)  # XLA wrote squares down in jax 0.7.
    for metrics in (False, True):
        program = compiled(*FRONT_ENDS[front_end](PERTURBATIONS[name], metrics=metrics))
        copied = (temporaries(program) - temporaries(yardstick)) / COPY
        if metrics:
            assert copied <= copies + 2
        else:
            assert copied <= copies
            assert passes(program) <= passes(yardstick) + more_passes


def test_the_fisher_of_the_first_gradient_is_one_more_copy():
    """It becomes the operator in place, and the gradient becomes w + eps."""
    step, state = with_oracle(
        fisher_ellipsoid(0.1, given()), empirical_fisher=True, metrics=False
    )
    program, yardstick = compiled(step, state), yardstick_program()
    copied = (temporaries(program) - temporaries(yardstick)) / COPY
    old = jax.__version_info__ < (0, 10)
    assert copied <= 1.25 + old
    assert passes(program) <= passes(yardstick) + (6 if old else 4)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA wrote squares down in jax 0.7"
)
def test_the_loop_of_a_norm_sets_no_memory_aside():
    grads = jnp.ones((784, 512), jnp.float32)
    ball = euclidean_ball(0.05)
    norm = jax.jit(lambda g: ball.update(g, ball.init(g))[1].dual_norm)
    program = norm.lower(grads).compile()
    assert temporaries(program) < 0.1 * grads.nbytes


@functools.cache
def yardstick_program():
    return compiled(by_hand, BASE.init(PARAMS))


@pytest.mark.long
@pytest.mark.parametrize("leaves", [100])
def test_the_program_grows_with_the_leaves_as_by_hand_does(leaves):
    """Compile time follows the size of the program that is lowered."""
    params = [jnp.ones(3)] * leaves
    tx = fsam_optax.sam(BASE)

    def grads(params):
        return jax.tree.map(jnp.sin, params)

    def step(params, state):
        return tx.update(grads(params), state, params, grad_fn=grads)

    def hand(params, state):
        g = grads(params)
        norm = optax.tree.norm(g)
        point = jax.tree.map(lambda w, g: w + 0.05 * g / norm, params, g)
        return BASE.update(grads(point), state, params)

    def size(step, state):
        return jax.jit(step).lower(params, state).as_text().count("\n")

    assert size(step, tx.init(params)) < 4 * size(hand, BASE.init(params))


def test_a_layer_of_the_fisher_is_few_operations_more_than_of_the_gradient():
    """Compile time follows their number; what layers that are alike share counts once.

    Two more for each array: a parameter that is NaN has no Fisher.
    """

    def apply_fn(params, x):
        for w, b, scale in params:
            x = jax.nn.relu(x @ w + b[None]) * scale[None]
        return x

    nll = negative_log_likelihood(apply_fn, categorical)
    batch = jnp.ones((8, 4)), jnp.arange(8) % 4
    fisher = functools.partial(fsam_optax.diagonal, fisher_empirical(nll))

    def operations(fn, depth):
        params = [(jnp.eye(4), jnp.ones(4), jnp.ones(4))] * depth
        text = jax.jit(fn).lower(params, batch).as_text()
        return len(re.findall("= (?:stablehlo|call|func)", text))

    def both(params, batch):
        return value_grad_and_fisher(nll, params, batch, (), {})

    fns = jax.grad(nll), fisher, both
    each = [operations(fn, 5) - operations(fn, 4) for fn in fns]
    assert 0 < each[1] <= each[0] + 6
    assert 0 < each[2] <= each[0]


def test_the_fisher_of_tokens_has_one_loop_for_all_weights_of_a_shape():
    """Their products are the same function, which is traced and lowered once."""

    def apply_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    batch = jnp.ones((8, 24, 4)), jnp.zeros((8, 24), jnp.int32)
    estimator = fisher_empirical(negative_log_likelihood(apply_fn, categorical))

    def loops(depth):
        params = [jnp.eye(4)] * depth
        fisher = jax.jit(functools.partial(fsam_optax.diagonal, estimator))
        return fisher.lower(params, batch).as_text().count("stablehlo.while")

    assert 0 < loops(2) == loops(4)


@pytest.mark.parametrize("estimator", [fisher_i1, fisher_hutchinson])
def test_draws_take_three_programs_of_random_bits(estimator):
    """Those of the next state, of a key for each draw, and of what is drawn.

    Each takes a CPU as long to compile as a model of a few layers.
    """
    f = estimator(lambda w, x: x @ w, categorical, key=jax.random.key(0), num_samples=2)
    batch = jnp.ones((8, 4)), None
    text = str(
        jax.make_jaxpr(functools.partial(fsam_optax.diagonal, f))(jnp.eye(4), batch)
    )
    assert len(re.findall("random_(?:split|bits|fold_in)", text)) == 3


BALLS = {
    "each array": euclidean_ball(0.05, per_leaf=True),
    "mean of F": fisher_ellipsoid(0.1, squared_gradient()),
}


@pytest.mark.long
@pytest.mark.parametrize("name", BALLS)
def test_the_compiled_program_grows_with_the_number_of_arrays(name):
    """And not with its square: what decides for all is not made anew for each."""
    ball = BALLS[name]

    def size(leaves):
        params = [jnp.ones(3)] * leaves

        def update(g):
            return ball.update(g, ball.init(params), params)

        program = jax.jit(update).lower(params).compile()
        return len(re.findall("\n", program.as_text()))

    assert size(40) < 2.2 * size(20)


@pytest.mark.parametrize("name", ["oracle", "family"])
def test_no_norm_waits_for_the_host_on_an_accelerator(name):
    """No loop hangs on a number that the device has to tell first."""
    if name == "oracle":
        empirical = fisher_ellipsoid(0.1, given())
        step, state = with_oracle(empirical, empirical_fisher=True)
    else:
        descent = fsam_optax.surrogate_gap(0.1)
        step, state = with_optimizer(adaptive_ellipsoid(0.5), descent=descent)
    traced = jax.jit(step).trace(PARAMS, state)
    on_cpu, text = (
        traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    )
    assert "stablehlo.while" in on_cpu
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0, jnp.nan, jnp.inf])
def test_norms_are_the_same_on_an_accelerator(monkeypatch, size):
    """To the last digit, in range or out of it; beside an array that is in range."""

    def norms(g):
        def linear(w, slopes):
            return sum(map(jnp.vdot, slopes, w))

        f = value_and_grad(linear, adaptive_ellipsoid(0.5))
        return f(g, f.init(g), g)[2].metrics

    g = [jnp.arange(1.0, 12) / 7, size * (1 + jnp.arange(6.0) / 7)]
    expected = jax.jit(norms)(g)
    by_platform = jax.lax.platform_dependent
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **_: by_platform(*args, default=default),
    )
    # Of other shapes, so that nothing is taken from what was traced before.
    g = [x[:, None] for x in g]
    assert "while" not in str(jax.make_jaxpr(norms)(g))
    found = jax.jit(norms)(g)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.long
def test_metrics_can_be_left_out():
    ball = euclidean_ball(0.05)
    step, state = with_optimizer(ball, every=2)
    bare, bare_state = with_optimizer(ball, every=2, metrics=False)
    params, state = step(PARAMS, state)
    bare_params, bare_state = bare(PARAMS, bare_state)
    jax.tree.map(np.testing.assert_array_equal, params, bare_params)
    assert bare_state.metrics is None and state.metrics.grad_norm > 0
    assert optax.tree.get(bare_state, "rho") == jnp.float32(0.05)
    f = value_and_grad(loss, euclidean_ball(0.05), metrics=False, micro_batches=2)
    _, _, state = f(PARAMS, f.init(PARAMS), BATCH)
    assert state.metrics is None and state.sharpness > 0


@pytest.mark.short("True")
@pytest.mark.parametrize("looped", [False, True])
def test_the_engine_looks_at_each_equation_a_few_times(monkeypatch, looped):
    """However deep the model is: tracing takes as long a layer."""
    looks = 0
    varies = Dataflow.varies

    def counted(self, v):
        nonlocal looks
        looks += 1
        return varies(self, v)

    monkeypatch.setattr(Dataflow, "varies", counted)

    def blocks(x, layers):
        for layer in layers:
            x = jnp.tanh(x @ layer["w"] + layer["b"][None, None])
            x = x + jax.lax.conv_general_dilated(
                x, layer["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        return x, None

    def apply_fn(params, x):
        x, _ = jax.lax.scan(blocks, x, params) if looped else blocks(x, params)
        return x[:, 0]

    estimator = fisher_empirical(apply_fn, categorical)
    batch = jnp.ones((2, 5, 4)), jnp.arange(2)
    layer = {"w": jnp.eye(4), "k": jnp.ones((3, 4, 4)), "b": jnp.ones(4)}
    if looped:
        layer = jax.tree.map(lambda x: jnp.stack([x] * 3), layer)

    def looks_at(depth):
        nonlocal looks
        looks = 0
        jax.eval_shape(
            lambda p: estimator.update(p, estimator.init(p), p, batch=batch),
            [layer] * depth,
        )
        return looks

    assert 0 < looks_at(12) < 2.2 * looks_at(6)


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_engine_traces_a_model_for_the_batch_and_for_an_example(one_pass):
    """Once each: most of tracing is the Python code of the model."""
    sizes = []

    def counted(params, x):
        sizes.append(len(x))
        return model(params, x)

    nll = negative_log_likelihood(counted, categorical)
    estimator = fisher_empirical(nll)

    def run(params):
        if one_pass:
            return value_grad_and_fisher(nll, params, BATCH, (), {})
        return fsam_optax.diagonal(estimator, params, BATCH)

    jax.eval_shape(run, PARAMS)
    assert sorted(sizes) == [1, len(BATCH[1])]
