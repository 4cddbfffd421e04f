"""Every state in Orbax and Flax checkpoints, and what cannot be restored."""

import functools
import itertools
import signal
import subprocess
import sys
import threading

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_conformance import CASES, PARAMS, update

import fsam_optax as fsam


KEY = jax.random.key(5)
BATCH = (jnp.sin(jnp.arange(16.0).reshape(8, 2)), jnp.arange(8) % 2)


def model(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


def loss_fn(params, batch):
    return fsam.negative_log_likelihood(model, fsam.categorical)(params, batch)


SAMPLED = fsam.fisher_i1(model, fsam.categorical, key=KEY, standard_error=True)
BALL = fsam.euclidean_ball(0.1)
# Whatever has a state, besides the transformations that `test_conformance` lists.
ESTIMATORS = {
    "fisher_empirical": fsam.fisher_empirical(model, fsam.categorical),
    "fisher_exact": fsam.fisher_exact(model, fsam.categorical),
    "fisher_i1": SAMPLED,
    "fisher_i2": fsam.fisher_i2(model, fsam.categorical, key=KEY),
    "fisher_gnb": fsam.fisher_gnb(model, fsam.categorical, key=KEY),
    "fisher_hutchinson": fsam.fisher_hutchinson(model, fsam.categorical, key=KEY),
    "refresh_every": fsam.refresh_every(3, optax.chain(SAMPLED, optax.ema(0.9))),
    "by_group": fsam.by_group(
        {"k": "sampled", "b": "cheap"},
        {
            "sampled": fsam.fisher_gnb(model, fsam.categorical, key=KEY),
            "cheap": fsam.squared_gradient(),
        },
    ),
    "scale_by_inverse_fisher": fsam.scale_by_inverse_fisher(SAMPLED, damping=0.1),
    "scale_by_inverse_dense": fsam.scale_by_inverse_dense(
        lambda params, batch: fsam.dense_fisher(model, fsam.categorical, params, batch),
        damping=0.1,
    ),
    "inject_hyperparams": optax.inject_hyperparams(fsam.sam, static_args="base")(
        optax.adam(0.1), rho=optax.linear_schedule(0.1, 0.2, 5)
    ),
    "multi_steps": fsam.sam(
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    ),
}
TRANSFORMATIONS = {
    **{name: case.factory(**case.kwargs) for name, case in CASES.items()},
    **ESTIMATORS,
}


def save(how, path, tree):
    if how == "flax":
        path.write_bytes(flax.serialization.to_bytes(tree))
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load(how, path, like):
    if how == "flax":
        return flax.serialization.from_bytes(like, path.read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


@pytest.mark.short("flax")
@pytest.mark.parametrize("how", ["orbax", "flax"])
def test_fault_28_every_state_comes_back_bit_for_bit(tmp_path, how):
    like = {name: tx.init(PARAMS) for name, tx in TRANSFORMATIONS.items()}
    counter = itertools.count(1)
    states = jax.tree.map(lambda x: jnp.full_like(x, next(counter) / 3), like)
    save(how, tmp_path / "states", states)
    assert_same(load(how, tmp_path / "states", like), states)


def test_every_estimator_is_stored():
    for name, value in vars(fsam).items():
        if name.startswith("fisher_") and callable(value):
            assert name in TRANSFORMATIONS, name


# A run that stops and goes on


def trainer(rho=None, front_end="value_and_grad"):
    """A run in which everything that has a state takes part."""
    schedule = optax.linear_schedule(0.1, 0.5, 10)
    estimator = fsam.refresh_every(3, optax.chain(SAMPLED, optax.ema(0.9)))
    ellipsoid = fsam.fisher_ellipsoid(schedule if rho is None else rho, estimator)
    adam = optax.adam(optax.cosine_decay_schedule(0.1, 10))
    f = fsam.value_and_grad(loss_fn, ellipsoid, every=2, micro_batches=2)
    tx = fsam.sharpness_aware(adam, ellipsoid, every=2)

    def by_oracle(params, state):
        _, grads, fsam_state = f(params, state["fsam"], BATCH)
        updates, adam_state = adam.update(grads, state["adam"], params)
        return updates, {"fsam": fsam_state, "adam": adam_state}

    def by_transformation(params, state):
        def grad_fn(p):
            return jax.grad(loss_fn)(p, BATCH)

        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, batch=BATCH)

    pair = front_end == "value_and_grad"

    @jax.jit
    def step(params, state):
        updates, state = (by_oracle if pair else by_transformation)(params, state)
        return optax.apply_updates(params, updates), state

    def init(params):
        if not pair:
            return tx.init(params)
        return {"fsam": f.init(params), "adam": adam.init(params)}

    return init, step


@pytest.mark.short("flax-sharpness_aware")
@pytest.mark.parametrize(
    ("how", "front_end"), [("orbax", "value_and_grad"), ("flax", "sharpness_aware")]
)
def test_fault_28_training_resumes_bit_for_bit(tmp_path, how, front_end):
    init, step = trainer(front_end=front_end)
    checkpoint = PARAMS, init(PARAMS)
    for i in range(8):
        if i == 4:
            save(how, tmp_path / "run", checkpoint)
        checkpoint = step(*checkpoint)
    like = jax.tree.map(jnp.zeros_like, (PARAMS, init(PARAMS)))
    resumed = load(how, tmp_path / "run", like)
    for _ in range(4):
        resumed = step(*resumed)
    assert_same(resumed, checkpoint)
    assert optax.tree.get(resumed[1], "age") == 1  # 4 refreshes of 3


# What comes from where


def length(eps):
    return np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(eps)])


def ball(rho):
    return optax.with_extra_args_support(fsam.euclidean_ball(rho))


@pytest.mark.short("schedule")
@pytest.mark.parametrize(
    ("rho", "expected"),
    [(0.3, 0.3), (optax.linear_schedule(1.0, 2.0, 10), 1.1)],
    ids=["number", "schedule"],
)
def test_fault_28_rho_is_that_of_the_code_and_its_count_that_of_the_checkpoint(
    tmp_path, rho, expected
):
    _, state = update(ball(0.1))
    save("orbax", tmp_path / "state", state)
    restored = load("orbax", tmp_path / "state", ball(rho).init(PARAMS))
    np.testing.assert_allclose(restored.rho, 0.1, rtol=1e-6)  # a report of the past
    eps, state = update(ball(rho), restored)
    np.testing.assert_allclose(length(eps), expected, rtol=1e-6)
    assert state.count == 2


@pytest.mark.long
def test_fault_28_an_injected_rho_is_that_of_the_checkpoint(tmp_path):
    injected = optax.inject_hyperparams(fsam.euclidean_ball)
    save("orbax", tmp_path / "state", injected(rho=0.1).init(PARAMS))
    other = injected(rho=0.3)
    restored = load("orbax", tmp_path / "state", other.init(PARAMS))
    eps, _ = update(other, restored)
    np.testing.assert_allclose(length(eps), 0.1, rtol=1e-6)


def test_fault_28_the_key_is_that_of_the_checkpoint(tmp_path):
    def compiled(tx, state):
        update = jax.jit(functools.partial(tx.update, None))
        return update(state, PARAMS, batch=BATCH)

    _, state = compiled(SAMPLED, SAMPLED.init(PARAMS))
    save("orbax", tmp_path / "state", state)
    other = fsam.fisher_i1(
        model, fsam.categorical, key=jax.random.key(99), standard_error=True
    )
    restored = load("orbax", tmp_path / "state", other.init(PARAMS))
    assert_same(compiled(other, restored), compiled(SAMPLED, state))


# What cannot be restored


def test_fault_28_another_shape(tmp_path):
    # One array only: Orbax leaves the other reads behind where one fails.
    wider = {"k": jnp.ones((3, 2))}
    save("orbax", tmp_path / "orbax", wider)
    with pytest.raises(ValueError, match=r"\(2, 2\).*stored shape: \(3, 2\)"):
        load("orbax", tmp_path / "orbax", {"k": PARAMS["k"]})


def test_fault_28_flax_leaves_shapes_to_the_first_update(tmp_path):
    wider = {"k": jnp.ones((3, 2)), "b": PARAMS["b"]}
    average = optax.chain(fsam.squared_gradient(), optax.ema(0.9))
    tx = fsam.fisher_ellipsoid(0.1, average)
    save("flax", tmp_path / "state", (wider, tx.init(wider)))
    params, state = load("flax", tmp_path / "state", (PARAMS, tx.init(PARAMS)))
    named = r"leaf \['k'\] is of shape \(2, 2\) in `grads` and of shape \(3, 2\)"
    with pytest.raises(ValueError, match=named):
        update(tx, state, params=params)
    with pytest.raises((TypeError, ValueError), match=r"\(3, 2\)"):
        update(tx, state)


@pytest.mark.parametrize("how", ["orbax", "flax"])
def test_fault_28_another_structure(tmp_path, how):
    save(how, tmp_path / "state", fsam.sam(optax.sgd(0.1)).init(PARAMS))
    with pytest.raises(ValueError, match=r"match|do not"):
        load(how, tmp_path / "state", fsam.sam(optax.adam(0.1)).init(PARAMS))


@pytest.mark.parametrize("how", ["orbax", "flax"])
def test_fault_28_a_truncated_file(tmp_path, how):
    path = tmp_path / "state"
    state = {"k": jnp.arange(1000.0)}
    save(how, path, state)
    assert_same(load(how, path, state), state)
    # Orbax writes several files of data, and reads one.
    files = [path] if how == "flax" else [p for p in path.rglob("d/*") if p.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"(?i)incomplete|read|data|corrupt"):
        load(how, path, state)


# kill -9


SAVING = """
import sys
import jax, jax.numpy as jnp, optax
import orbax.checkpoint as ocp
import fsam_optax as fsam

manager = ocp.CheckpointManager(
    sys.argv[1], options=ocp.CheckpointManagerOptions(max_to_keep=2)
)
params = {f"layer{i}": jnp.zeros((64, 64)) for i in range(16)}
optimizer = fsam.sam(optax.adam(0.1))
for step in range(1, 1000):
    tree = jax.tree.map(
        lambda x: jnp.full_like(x, step), (params, optimizer.init(params))
    )
    print("saving", step, flush=True)
    manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_fault_28_kill_during_a_save_loses_nothing_that_was_saved(tmp_path):
    for delay in (0.0, 0.02):
        folder = tmp_path / str(delay)
        child = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        killer = threading.Timer(120, child.kill)
        killer.start()
        try:
            for line in child.stdout:
                if line == "saving 4\n":
                    break
            # Some time after the save began; where in it does not matter.
            threading.Event().wait(delay)
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split()
        finally:
            killer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        saved = int(rest[rest.index("saved") + 1]) if "saved" in rest else 3
        with ocp.CheckpointManager(folder) as manager:
            latest = manager.latest_step()
            assert latest >= saved
            params = {f"layer{i}": jnp.zeros((64, 64)) for i in range(16)}
            like = params, fsam.sam(optax.adam(0.1)).init(params)
            for step in {saved, latest}:
                tree = manager.restore(step, args=ocp.args.StandardRestore(like))
                assert all(np.all(x == step) for x in jax.tree.leaves(tree))
