"""Two processes under `jax.distributed`: run as a script, this file is one of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import fsam_optax as fsam


STEPS = 6
SECONDS = 180
pytestmark = pytest.mark.slow
RNG = np.random.default_rng(0)
PARAMS = {
    "w1": RNG.normal(size=(3, 8)).astype(np.float32),
    "b1": RNG.normal(size=8).astype(np.float32),
    "w2": RNG.normal(size=(8, 4)).astype(np.float32),
}
SPECS = {"w1": P(None, "d"), "b1": P("d"), "w2": P("d")}
BATCH = (
    RNG.normal(size=(16, 3)).astype(np.float32),
    RNG.integers(4, size=16).astype(np.int32),
)


def model(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


def train(mesh, process=0, processes=1, folder=None):
    """Fisher SAM on sharded parameters and batch, from the last checkpoint if any."""
    replicated = NamedSharding(mesh, P())
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        PARAMS,
        shardings,
    )
    # Each process has its own examples.
    size = len(BATCH[0]) // processes
    rows = slice(process * size, (process + 1) * size)
    batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("d")), x[rows]
        ),
        BATCH,
    )
    key = jax.random.key(0)
    sampled = fsam.fisher_i1(model, fsam.categorical, key=key)
    f = fsam.value_and_grad(
        fsam.negative_log_likelihood(model, fsam.categorical),
        fsam.fisher_ellipsoid(
            optax.linear_schedule(0.1, 0.5, STEPS),
            fsam.refresh_every(2, optax.chain(sampled, optax.ema(0.9))),
        ),
    )
    adam = optax.adam(0.1)

    def step(params, states, batch):
        _, grads, state = f(params, states[0], batch)
        updates, adam_state = adam.update(grads, states[1], params)
        return optax.apply_updates(params, updates), (state, adam_state)

    step = jax.jit(step, out_shardings=(shardings, replicated))
    init = jax.jit(lambda p: (f.init(p), adam.init(p)), out_shardings=replicated)
    done, states = 0, init(params)
    if folder is not None:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(folder)
        if (latest := manager.latest_step()) is not None:
            template = ocp.args.StandardRestore((params, states))
            params, states = manager.restore(latest, args=template)
            done = latest
    print("from", done, flush=True)
    for i in range(done, STEPS):
        params, states = step(params, states, batch)
        if folder is not None:
            manager.save(i + 1, args=ocp.args.StandardSave((params, states)))
            manager.wait_until_finished()
            print("saved", i + 1, flush=True)
    if folder is not None:
        manager.close()
    gather = jax.jit(lambda tree: tree, out_shardings=replicated)
    return jax.tree.map(np.asarray, gather((params, states)))


def main(port, process, folder):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(process)
    )
    assert jax.process_count() == 2 and jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    trained = train(mesh, int(process), 2, folder or None)
    print(json.dumps([x.tobytes().hex() for x in jax.tree.leaves(trained)]))


@contextlib.contextmanager
def two_processes(logs, folder=""):
    """Starts both, and leaves neither behind, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    children = []
    killer = threading.Timer(SECONDS, lambda: [child.kill() for child in children])
    try:
        for process in range(2):
            with open(logs / f"stderr-{process}", "a") as stderr:
                child = subprocess.Popen(
                    [sys.executable, __file__, str(port), str(process), str(folder)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            children.append(child)
        killer.start()
        yield children
    finally:
        killer.cancel()
        for child in children:
            child.kill()
        for child in children:
            child.wait()
            child.stdout.close()


def finish(children, logs):
    """Returns how each process began, and the bytes of what it trained."""
    lines = [child.stdout.read().splitlines() for child in children]
    codes = [child.wait() for child in children]
    errors = "".join(path.read_text()[-3000:] for path in sorted(logs.glob("stderr*")))
    assert codes == [0, 0], errors
    starts = [x for out in lines for x in out if x.startswith("from ")]
    return starts, [json.loads(out[-1]) for out in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    logs = tmp_path_factory.mktemp("uninterrupted")
    with two_processes(logs) as children:
        starts, trained = finish(children, logs)
    assert starts == ["from 0"] * 2
    return trained


def test_two_processes_agree_with_each_other_and_with_one(uninterrupted):
    trained, other = uninterrupted
    assert trained == other
    alone = train(Mesh(np.array(jax.devices()[:1]), ("d",)))
    for stored, expected in zip(trained, jax.tree.leaves(alone), strict=True):
        actual = np.frombuffer(bytes.fromhex(stored), expected.dtype)
        np.testing.assert_allclose(actual, expected.ravel(), rtol=1e-5, atol=1e-5)


def test_fault_28_two_killed_processes_continue_bit_for_bit(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with two_processes(tmp_path, folder) as children:
        for line in children[0].stdout:
            if line == "saved 3\n":
                break
        for child in children:
            child.send_signal(signal.SIGKILL)
    with two_processes(tmp_path, folder) as children:
        starts, resumed = finish(children, tmp_path)
    # The next steps may have been saved before the kill, but the third was.
    assert starts[0] == starts[1] and int(starts[0].removeprefix("from ")) in (3, 4, 5)
    assert resumed == uninterrupted


if __name__ == "__main__":
    main(*sys.argv[1:])
