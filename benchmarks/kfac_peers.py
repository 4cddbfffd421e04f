# pyright: reportMissingImports=false
"""Question: what do kfac-jax's diagonal blocks cost, and where are they right?

kfac-jax keeps, for each layer that it recognises, the diagonal of a Fisher matrix for
its preconditioner. Each row is one jitted function, divided by the batch gradient
in the same round, as in `fisher_cost.py`. The error is the relative distance of the
diagonal from that of `fsam_optax`, which the tests compare with one gradient for each
example and class. kfac-jax gives its diagonal out as a product with ones.

It wants an environment of its own, since kfac-jax 0.0.8 does not run on jax 0.10:

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
from cost import compiled, Problem, ratios

import fsam_optax as fsam


MODES = {
    "empirical": ("fisher_empirical", fsam.fisher_empirical),
    "one drawn label": ("fisher_gradients", fsam.fisher_i1),
    "exact": ("fisher_exact", fsam.fisher_exact),
}


def kfac(model: Problem, mode: str):
    """Returns `run(params, batch)`: the diagonal as a tree like the parameters."""

    def loss(params, batch):
        x, y = batch
        logits = model.apply(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return -jnp.mean(fsam.categorical.log_prob(logits, y))

    estimator = kfac_jax.BlockDiagonalCurvature(
        func=loss,
        params_index=0,
        layer_tag_to_block_ctor={
            "dense": kfac_jax.DenseDiagonal,
            "conv2d": kfac_jax.Conv2DDiagonal,
            "scale_and_shift": kfac_jax.ScaleAndShiftDiagonal,
            "generic": kfac_jax.NaiveDiagonal,
        },
    )
    key = jax.random.PRNGKey(0)
    state = estimator.init(
        rng=key,
        func_args=(model.params, model.batch),
        exact_powers_to_cache=None,
        approx_powers_to_cache=None,
    )
    # The empirical one squares the gradients of the mean loss.
    scale = len(model.batch[1]) if mode == "fisher_empirical" else 1.0

    def run(params, batch):
        new = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 1.0, len(batch[1]), key, (params, batch), mode
        )
        ones = jax.tree.map(jnp.ones_like, params)
        product = estimator.multiply(
            new, ones, 0.0, exact_power=True, use_cached=False, pmap_axis_name=None
        )
        return jax.tree.map(lambda x: scale * x, product)

    return run


def measure(name: str, repeats: int):
    """Returns time ratios, compile seconds, temporaries and errors of each row."""
    model = (cost.SMOKE | cost.PROBLEMS)[name]()
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    runs = {"gradient": jax.grad(loss)}
    for row, (mode, make) in MODES.items():
        options = {"key": jax.random.key(0)} if make is fsam.fisher_i1 else {}
        runs[f"{row}: fsam_optax"] = partial(fsam.diagonal, make(loss, **options))
        runs[f"{row}: kfac-jax"] = kfac(model, mode)
    programs, facts, found = {}, {}, {}
    for row, run in runs.items():
        try:
            program, facts[row] = compiled(run, model.params, model.batch)
        except Exception as error:
            if "kfac-jax" not in row:
                raise
            # What a peer cannot do is part of the answer.
            print(f"{name}, {row}: {type(error).__name__}: {error}")
            continue
        programs[row] = partial(program, model.params, model.batch)
        found[row] = programs[row]()
    for row, ratio in ratios(programs, repeats).items():
        facts[row] |= ratio
        mine = found.get(f"{row.partition(':')[0]}: fsam_optax")
        if "kfac" in row and "drawn" not in row and mine is not None:
            apart = optax.tree.norm(optax.tree.sub(found[row], mine))
            facts[row]["error"] = float(apart / optax.tree.norm(mine))
            print(f"{name}, {row}: differs by {facts[row]['error']:.1e}")
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
    settings = run.take("repeats")
    args = measure, *settings.values()
    results = run.each("model", run.options.models, *args, **settings)
    cost.print_tables("Ratio to one gradient of the batch", results)


if __name__ == "__main__":
    raise SystemExit(main())
