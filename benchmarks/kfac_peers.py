# pyright: reportMissingImports=false
"""Question: what do kfac-jax's diagonal blocks cost, and where are they right?

kfac-jax keeps, for each layer that it recognises, the diagonal of a Fisher matrix for
its preconditioner. Each row is one jitted function, divided by the batch gradient
in the same round, as in `fisher_cost.py`. The error is the relative distance of the
diagonal from that of `fsam_optax`, which the tests compare with one gradient for each
example and class. It wants an environment of its own, since kfac-jax 0.0.8 does not
run on jax 0.10:

    pip install jax==0.7.0 optax==0.2.5 flax==0.11.2 rich . kfac-jax==0.0.8
    python benchmarks/kfac_peers.py
"""

from functools import partial

import cost
import harness
import jax
import jax.numpy as jnp
import kfac_jax
import optax

import fsam_optax as fsam


OURS = {"empirical": fsam.fisher_empirical, "exact": fsam.fisher_exact}
LAYERS = {
    "dense": kfac_jax.DenseDiagonal,
    "conv2d": kfac_jax.Conv2DDiagonal,
    "scale_and_shift": kfac_jax.ScaleAndShiftDiagonal,
    "generic": kfac_jax.NaiveDiagonal,
}


def kfac(model: cost.Problem, row: str):
    """Returns `run(params, batch)`: the diagonal as a tree like the parameters."""

    def loss(params, batch):
        x, y = batch
        logits = model.apply(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return -jnp.mean(fsam.categorical.log_prob(logits, y))

    estimator = kfac_jax.BlockDiagonalCurvature(
        func=loss, params_index=0, layer_tag_to_block_ctor=LAYERS
    )
    key, args = jax.random.PRNGKey(0), (model.params, model.batch)
    cached = {"exact_powers_to_cache": None, "approx_powers_to_cache": None}
    state = estimator.init(rng=key, func_args=args, **cached)
    # The empirical one squares the gradients of the mean loss.
    size = len(model.batch[1])
    scale = size if row == "empirical" else 1.0

    def run(params, batch):
        new = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 1.0, size, key, (params, batch), f"fisher_{row}"
        )
        product = estimator.multiply(  # with ones: the diagonal
            *(new, jax.tree.map(jnp.ones_like, params), 0.0),
            **{"exact_power": True, "use_cached": False, "pmap_axis_name": None},
        )
        return jax.tree.map(lambda x: scale * x, product)

    return run


def measure(name: str, repeats: int) -> dict:
    """Returns what is known of the rows, those of a peer with their errors."""
    model = (cost.SMOKE | cost.PROBLEMS)[name]()
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    fns = {"gradient": jax.grad(loss)}
    for row, make in OURS.items():
        fns[f"{row}: fsam_optax"] = partial(fsam.diagonal, make(loss))
        fns[f"{row}: kfac-jax"] = kfac(model, row)
    runs, facts = cost.programs(fns, model.params, model.batch)
    for row, found in cost.ratios(runs, repeats).items():
        facts[row] |= found
    for row in OURS:
        mine, theirs = (runs[f"{row}: {who}"]() for who in ("fsam_optax", "kfac-jax"))
        apart = optax.tree.norm(optax.tree.sub(theirs, mine)) / optax.tree.norm(mine)
        facts[f"{row}: kfac-jax"]["error"] = apart
    return facts


@harness.experiment(
    smoke={"models": list(cost.SMOKE), "repeats": 2},
    models={
        "default": ["mlp", "mlp-512", "cnn", "resnet"],
        "choices": [*cost.PROBLEMS, *cost.SMOKE],
    },
    repeats=5,
)
def main(run: harness.Run) -> None:
    args = run.options.models, measure, run.options.repeats
    results = run.each("model", *args, **run.take("repeats"))
    cost.print_table("Over one gradient of the batch", results)
    errors = [f.get("error", 0) for facts in results.values() for f in facts.values()]
    print(f"kfac-jax is at most {max(errors):.0e} from fsam_optax.")


if __name__ == "__main__":
    raise SystemExit(main())
