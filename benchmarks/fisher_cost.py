"""Question: what does each Fisher diagonal cost beside one gradient of the batch?

Every row is one jitted function; all rows of a model run in one process, interleaved,
and are divided by the time of `jax.grad` of the batch loss in the same round. The naive
way is `vmap(grad)` squared, which forms an array of batch x parameters.

    taskset -c 0 python benchmarks/fisher_cost.py
    taskset -c 0 python benchmarks/fisher_cost.py --models gpt2 --repeats 1  # 5 GB
    python benchmarks/fisher_cost.py --all-cores --models mlp mlp-512 cnn resnet transf.

kfac-jax keeps, for each layer that it recognises, the diagonal of a Fisher matrix for
its preconditioner. Beside ours it wants an environment of its own, since 0.0.8 does
not run on jax 0.10:

    pip install jax==0.7.0 optax==0.2.5 flax==0.11.2 rich . kfac-jax==0.0.8
    taskset -c 0 python benchmarks/fisher_cost.py --kfac --models mlp mlp-512 cnn resnet
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial

import cost
import harness
import jax
import jax.numpy as jnp
import optax
import zoo

import fsam_optax as fsam


MODELS = cost.PROBLEMS | {
    "unet": lambda: cost.problem(zoo.UNet(), (32, 32, 3), 8, 5, places=(32, 32)),
    "vit": lambda: cost.problem(zoo.ViT(), (32, 32, 3), 32),
    "mamba": lambda: cost.next_token(zoo.Mamba(), 16, 64),
    "gpt2": lambda: cost.gpt2(2, 256),
}
SMOKE = cost.SMOKE | {
    "mamba tiny": lambda: cost.next_token(zoo.Mamba(8, 2, 20), 2, 4),
    "gpt2 tiny": lambda: cost.gpt2(2, 4, width=16, heads=2, depth=2, vocabulary=20),
}
GRADIENT, BOTH = "gradient", "gradient and fisher_empirical"
NORMS = GRADIENT, "norms: vmap(grad)", "per_example_norms", "clipped_gradient"
ON_ALL_CORES = GRADIENT, "fisher_empirical", BOTH
STEPS = "SAM, both gradients", "Fisher SAM, both gradients"
SECOND = "fisher_i2, Hutchinson"
NAIVE, ONE = "empirical: vmap(grad) squared", "empirical: one example at a time"
# Of larger models; with a label a pixel or token the exact one has many columns.
LARGE = GRADIENT, NAIVE, ONE, "fisher_empirical", BOTH, "fisher_hutchinson"
ROWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("unet", "vit", "mamba"), LARGE),
    "gpt2": (GRADIENT, *LARGE[3:], *STEPS),
}
PEER = {"fisher_empirical": "kfac-jax, empirical", "fisher_exact": "kfac-jax, exact"}
PEERS = GRADIENT, *PEER, *PEER.values()


def make_rows(model: cost.Problem) -> dict[str, Callable]:
    """Returns `run(params, batch)` by name; the first is the yardstick."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    example = cost.of_example(loss)
    grads = jax.vmap(jax.grad(example), (None, 0))

    def naive_norms(params, batch):
        leaves = jax.tree.leaves(grads(params, batch))
        return jnp.sqrt(sum(jnp.sum(g * g, range(1, g.ndim)) for g in leaves))

    def in_chunks(size, params, batch):
        def add(total, chunk):
            found = grads(params, chunk)
            return jax.tree.map(lambda t, g: t + jnp.sum(g * g, 0), total, found), None

        chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]

    def estimate(make, **options):
        return partial(fsam.diagonal, make(loss, **options))

    def both_gradients(ball, **options):
        f = fsam.value_and_grad(loss, ball, metrics=False, **options)
        return lambda params, batch: f(params, f.init(params), batch)[1]

    key = {"key": jax.random.key(0)}
    fused = fsam.fisher_ellipsoid(0.1, fsam.given())
    return {
        GRADIENT: jax.grad(loss),
        NAIVE: cost.plain(loss),
        "empirical: 16 examples at a time": partial(in_chunks, 16),
        ONE: partial(in_chunks, 1),
        "fisher_empirical": estimate(fsam.fisher_empirical),
        BOTH: partial(fsam.loss_power_sums, example, powers=(1, 2)),
        "fisher_i1": estimate(fsam.fisher_i1, **key),
        "fisher_gnb": estimate(fsam.fisher_gnb, **key),
        "fisher_hutchinson": estimate(fsam.fisher_hutchinson, **key),
        "fisher_exact": estimate(fsam.fisher_exact),
        SECOND: estimate(fsam.fisher_i2, hessian="hutchinson", **key),
        "norms: vmap(grad)": naive_norms,
        "per_example_norms": partial(fsam.per_example_norms, loss),
        "clipped_gradient": partial(fsam.clipped_gradient, loss, max_norm=1.0),
        STEPS[0]: both_gradients(fsam.euclidean_ball(0.1)),
        STEPS[1]: both_gradients(fused, empirical_fisher=True),
    }


def kfac(model: cost.Problem) -> dict[str, Callable]:
    """Returns the same for the diagonals of kfac-jax, as trees like the parameters."""
    kfac_jax = importlib.import_module("kfac_jax")

    def loss(params, batch):
        x, y = batch
        logits = model.apply(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return -jnp.mean(fsam.categorical.log_prob(logits, y))

    layers = {
        "dense": kfac_jax.DenseDiagonal,
        "conv2d": kfac_jax.Conv2DDiagonal,
        "scale_and_shift": kfac_jax.ScaleAndShiftDiagonal,
        "generic": kfac_jax.NaiveDiagonal,
    }
    estimator = kfac_jax.BlockDiagonalCurvature(
        func=loss, params_index=0, layer_tag_to_block_ctor=layers
    )
    key, args = jax.random.PRNGKey(0), (model.params, model.batch)
    cached = {"exact_powers_to_cache": None, "approx_powers_to_cache": None}
    state, size = estimator.init(rng=key, func_args=args, **cached), len(args[1][1])

    def run(mode, scale, params, batch):
        new = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 1.0, size, key, (params, batch), mode
        )
        product = estimator.multiply(  # with ones: the diagonal
            *(new, jax.tree.map(jnp.ones_like, params), 0.0),
            **{"exact_power": True, "use_cached": False, "pmap_axis_name": None},
        )
        return jax.tree.map(lambda x: scale * x, product)

    # The empirical one squares the gradients of the mean loss.
    scales = {"fisher_empirical": size, "fisher_exact": 1.0}
    return {PEER[row]: partial(run, row, scale) for row, scale in scales.items()}


def measure(
    name: str,
    repeats: int,
    rows: tuple[str, ...] = (),
    # Of the processor: the machine does other things meanwhile.
    clock: Callable[[], float] = time.process_time,
) -> dict:
    """Returns what is known of the rows, by default of all diagonals."""
    model, left_out = (MODELS | SMOKE)[name](), NORMS + STEPS
    if name == "resnet":  # A Hessian-vector product for each of many arrays.
        left_out += (SECOND,)
    every, kind = make_rows(model), name.removesuffix(" tiny")
    every |= kfac(model) if rows == PEERS else {}
    others = GRADIENT, *(row for row in every if row not in left_out)
    fns = {row: every[row] for row in rows or ROWS.get(kind, others)}
    runs, facts = cost.programs(fns, model.params, model.batch)
    # Apart: the naive rows leave hundreds of megabytes behind, which would slow down
    # whatever runs next.
    for naive in (False, True):
        group = [row for row in runs if row == GRADIENT or (":" in row) == naive]
        if len(group) > 1:
            found = cost.ratios({row: runs[row] for row in group}, repeats, clock)
            for row in group:
                facts[row] |= found[row]
    for row, theirs in PEER.items() if rows == PEERS else ():
        mine = runs[row]()
        apart = optax.tree.norm(optax.tree.sub(runs[theirs](), mine))
        facts[theirs]["error"] = apart / optax.tree.norm(mine)
    return facts


@harness.experiment(
    smoke={
        **{"models": list(SMOKE), "repeats": 2},
        "kfac": importlib.util.find_spec("kfac_jax") is not None,
    },
    models={
        "default": [name for name in MODELS if name != "gpt2"],
        "choices": [*MODELS, *SMOKE],
    },
    kfac={"default": False, "help": "beside kfac-jax"},
    all_cores={"default": False, "help": "F on all cores, by the wall clock"},
    repeats=5,
)
def main(run: harness.Run) -> None:
    key, names = run.take("repeats"), run.options.models
    small = [name for name in names if not name.startswith("gpt2")]
    title, repeats = "Over one gradient of the batch", run.options.repeats
    if run.options.kfac:
        small = [name for name in small if name in cost.PROBLEMS | cost.SMOKE]
        found = run.each("model", small, measure, repeats, PEERS, rows="kfac", **key)
        cost.print_table(title, found)
        errors = [of[row]["error"] for of in found.values() for row in PEER.values()]
        print(f"kfac-jax is at most {max(errors):.0e} from fsam_optax.")
        return
    if run.options.all_cores:
        args = measure, repeats, ON_ALL_CORES, time.perf_counter
        found = run.each("model", names, *args, rows="all cores", **key)
        cost.print_table(title, found)
        return
    found = run.each("model", names, measure, repeats, **key)
    norms = run.each("model", small, measure, repeats, NORMS, rows="norms", **key)
    for results in (found, norms) if norms else (found,):
        cost.print_table(title, results)


if __name__ == "__main__":
    raise SystemExit(main())
