"""Plausible mistakes: each message names the fault and says what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam


X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
Y = jnp.argmax(X[:, :3], axis=1)
B = X, Y
P = {"w": jnp.ones((4, 3)) / 3, "b": jnp.zeros(3)}


def model(p, x):
    return x @ p["w"] + p["b"][None]


@jax.jit
def loss(p, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(p, x), y).mean()


def loss_and_aux(p, batch):
    return loss(p, batch), model(p, batch[0])


def grad_fn(p):
    return jax.grad(loss)(p, B)


BALL = fsam.euclidean_ball(0.05)
NLL = fsam.negative_log_likelihood(model, fsam.categorical)
OPT = fsam.sam(optax.adam(1e-3))
G, S = jax.jit(grad_fn)(P), OPT.init(P)
F = fsam.value_and_grad(loss, BALL)
FS = F.init(P)
Wrong: Any = None


def update(g: Any = G, s: Any = S, p: Any = P, tx: Any = OPT, **kwargs: Any):
    return tx.update(g, s, p, **{"grad_fn": grad_fn, **kwargs})


def call(loss_fn: Any = loss, ball: Any = BALL, batch: Any = B, *args, **options: Any):
    f = fsam.value_and_grad(loss_fn, ball, **options)
    return f(P, f.init(P), batch, *args)


def bsam(**options: Any):
    return fsam.bsam(0.1, num_data=6, key=jax.random.key(0), **options)


class TrainState:
    """Stands for that of Flax: it has parameters and `apply_gradients`."""

    params = P

    def apply_gradients(self):
        """Does nothing."""


# Mistake -> the exception and what its message must contain.
MISTAKES = {
    # Arguments in each other's places, or not called.
    "sam(0.05, base)": (
        lambda: fsam.sam(Wrong or 0.05, Wrong or optax.adam(1e-3)),  # type: ignore
        TypeError,
        r"`rho` must be a number.*got an optax.GradientTransformation: the arguments",
    ),
    "sam(optax.adam)": (
        lambda: fsam.sam(optax.adam),  # type: ignore
        TypeError,
        r"`base` must be an optax.GradientTransformation.*Call it first: `adam\(\.\.\.",
    ),
    "value_and_grad(ball, loss)": (
        lambda: call(BALL, loss),
        TypeError,
        r"`loss_fn` must be a function, got an optax.*`value_and_grad\(loss_fn, pert",
    ),
    "value_and_grad(loss, rho)": (
        lambda: call(loss, 0.05),
        TypeError,
        r"`perturbation` must be.*such as euclidean_ball\(0.05\), got 0.05",
    ),
    "value_and_grad(loss, euclidean_ball)": (
        lambda: call(loss, fsam.euclidean_ball),
        TypeError,
        r"got the function `euclidean_ball`. Call it first: `euclidean_ball\(",
    ),
    "value_and_grad(loss(params, batch), ball)": (
        lambda: call(loss(P, B)),
        TypeError,
        r"`loss_fn` must be a function, got an array of shape \(\)",
    ),
    "fisher_ellipsoid(estimator, rho)": (
        lambda: fsam.fisher_ellipsoid(fsam.given(), 0.1),  # type: ignore
        TypeError,
        r"the arguments are `fisher_ellipsoid\(rho, estimator\)`",
    ),
    "fisher_ellipsoid(rho, fisher_exact)": (
        lambda: fsam.fisher_ellipsoid(0.1, fsam.fisher_exact),  # type: ignore
        TypeError,
        r"`estimator` must be.*Call it first: `fisher_exact\(",
    ),
    "fisher_exact(categorical, model)": (
        lambda: fsam.fisher_exact(fsam.categorical, model),  # type: ignore
        TypeError,
        r"takes `\(apply_fn, likelihood\)` in this order",
    ),
    "f(state, params, batch)": (
        lambda: F(FS, P, B),  # type: ignore
        TypeError,
        r"call `value, grads, state = f\(params, state, batch\)`",
    ),
    "f(params, batch, state)": (
        lambda: F(P, B, FS),  # type: ignore
        TypeError,
        r"call `value, grads, state = f\(params, state, batch\)`",
    ),
    "f(params, batch)": (
        lambda: F(P, B),  # type: ignore
        TypeError,
        r"the first state is `f.init\(params\)`",
    ),
    "f.init()": (lambda: F.init(), ValueError, r"call `f.init\(params\)`"),  # type: ignore
    "f(params, state, batch, every=2)": (
        lambda: F(P, FS, B, every=2),
        TypeError,
        r"options such as `every`.*given to `value_and_grad`",
    ),
    # An optimizer in the place of a perturbation.
    "value_and_grad(loss, adam)": (
        lambda: call(loss, optax.adam(1e-3)),
        TypeError,
        r"`perturbation` is an optimizer.*ScaleByAdamState.*`euclidean_ball\(0.05\)`",
    ),
    "sharpness_aware(ball, momentum)": (
        lambda: fsam.sharpness_aware(BALL, optax.sgd(0.1, momentum=0.9)).init(P),
        TypeError,
        r"`base` is a perturbation.*`sharpness_aware\(base, pert.*comes first",
    ),
    # What is neither a ball nor an optimizer, or not where it belongs.
    "value_and_grad(nll, estimator)": (
        lambda: call(NLL, fsam.fisher_exact(NLL)),
        TypeError,
        r"`perturbation` is an estimator.*`fisher_ellipsoid\(0.1, estimator\)`",
    ),
    "a sampled estimator": (
        lambda: call(NLL, fsam.fisher_i1(NLL, key=jax.random.key(0))),
        TypeError,
        r"`perturbation` is an estimator",
    ),
    "descent=euclidean_ball": (
        lambda: call(descent=BALL),
        TypeError,
        r"`descent` is a perturbation.*the ball is the `perturbation`",
    ),
    "sharpness_aware(ball, sgd)": (
        lambda: fsam.sharpness_aware(BALL, optax.sgd(0.1)).init(P),
        TypeError,
        r"`base` is a perturbation.*the optimizer comes first",
    ),
    "displaced(ball, sgd)": (
        lambda: fsam.displaced(BALL, optax.sgd(0.1)).init(P),
        TypeError,
        r"`base` is a perturbation.*the optimizer comes first",
    ),
    "displaced(sgd, adam)": (
        lambda: fsam.displaced(optax.sgd(0.1), optax.adam(0.1)).init(P),
        TypeError,
        r"`perturbation` is an optimizer",
    ),
    "a ball around a ball": (
        lambda: call(NLL, fsam.fisher_ellipsoid(0.1, BALL)),
        TypeError,
        r"`estimator` is a perturbation.*taken for a Fisher diagonal.*`fisher_exact",
    ),
    "fisher_ellipsoid(rho, adam)": (
        lambda: call(NLL, fsam.fisher_ellipsoid(0.1, optax.adam(0.1))),
        TypeError,
        r"`estimator` is an optimizer",
    ),
    "refresh_every(k, ball)": (
        lambda: fsam.refresh_every(2, optax.chain(BALL)).init(P),
        TypeError,
        r"`estimator` is a perturbation",
    ),
    "refresh_every(k, sgd)": (
        lambda: fsam.refresh_every(2, optax.sgd(0.1, momentum=0.9)).init(P),
        TypeError,
        r"`estimator` is an optimizer",
    ),
    "by_group(ball)": (
        lambda: fsam.by_group(lambda p: dict.fromkeys(p, "a"), {"a": BALL}).init(P),
        TypeError,
        r"`estimator` is a perturbation",
    ),
    "diagonal(ball)": (
        lambda: fsam.diagonal(BALL, P, B),
        TypeError,
        r"`estimator` is a perturbation",
    ),
    "dataset_diagonal(adam)": (
        lambda: fsam.dataset_diagonal(optax.adam(0.1), P, [B]),
        TypeError,
        r"`estimator` is an optimizer",
    ),
    "chain(estimator, ball)": (
        lambda: call(NLL, optax.chain(fsam.fisher_exact(NLL), BALL)),
        TypeError,
        r"`perturbation` is an estimator.*Put it into a ball",
    ),
    "friendly alone": (
        lambda: call(loss, fsam.friendly()),
        TypeError,
        r"goes before the ball, `optax.chain\(friendly\(\), euclidean_ball",
    ),
    "averaged after a ball": (
        lambda: call(loss, optax.chain(BALL, fsam.averaged())),
        TypeError,
        r"`perturbation` ends with `friendly` or `averaged`.*before the ball",
    ),
    "descent=adam": (
        lambda: call(descent=optax.adamw(1e-3)),
        TypeError,
        r"`descent` is an optimizer.*the optimizer is the base",
    ),
    "msam(decay=2)": (
        lambda: fsam.msam(optax.sgd(0.1), decay=2),
        ValueError,
        r"`decay` must be a number in \[0, 1\], got 2",
    ),
    "sharpness_aware(metrics='no')": (
        lambda: fsam.sharpness_aware(optax.sgd(0.1), BALL, metrics="no"),  # type: ignore
        TypeError,
        r"`metrics` must be True or False, got 'no'",
    ),
    **{
        f"no such axis: {name}": (
            mistake,
            NameError,
            r"`axis_name` names 'data'.*Leave it out under plain `jax.jit`",
        )
        for name, mistake in {
            "value_and_grad": lambda: call(axis_name="data"),
            "lagged": lambda: call(axis_name="data", lagged=True),
            "sharpness_aware": lambda: update(
                tx=fsam.sharpness_aware(optax.adam(1e-3), BALL, axis_name="data")
            ),
            "bsam": lambda: update(tx=bsam(axis_name="data"), s=bsam().init(P)),
        }.items()
    },
    "a loss as model": (
        lambda: fsam.diagonal(fsam.fisher_exact(loss, fsam.categorical), P, B),
        TypeError,
        r"`apply_fn` failed.*given the inputs alone. If it is a loss.*pass the model",
    ),
    "a loss of the inputs as model": (
        lambda: fsam.negative_log_likelihood(
            lambda p, x: jnp.mean(model(p, x)), fsam.categorical
        )(P, B),
        ValueError,
        r"outputs of shape \(\).*If it is a loss, pass the model instead",
    ),
    "check_separable(nll)": (
        lambda: fsam.check_separable(NLL, P, B),
        ValueError,
        r"leading axis of examples.*got shape \(\) for 6.*Pass the model",
    ),
    "every returns text": (
        lambda: call(every=lambda step: "no"),
        ValueError,
        r"`every` must return one bool.*got 'no'",
    ),
    "rho returns text": (
        lambda: call(loss, fsam.euclidean_ball(lambda count: "0.1")),  # type: ignore
        ValueError,
        r"`rho\(count\)` must be a number.*got '0.1'",
    ),
    "euclidean_ball(True)": (
        lambda: fsam.euclidean_ball(True),
        TypeError,
        r"`rho` must be a number, got True",
    ),
    "lagged is text": (
        lambda: call(lagged="yes"),
        TypeError,
        r"`lagged` must be True or False, got 'yes'",
    ),
    "value_fn returns a vector": (
        lambda: update(grad_fn=None, value_fn=lambda p: model(p, X)),
        TypeError,
        r"`value_fn`.*must return the loss, one number, got an array of shape \(6, 3\)",
    ),
    "an argument with rows beside numbers": (
        lambda: call(
            lambda p, b, d: loss(p, b) * jnp.mean(d["a"]) * d["s"],
            BALL,
            B,
            {"a": jnp.ones(6), "s": 2.0},
            micro_batches=2,
        ),
        ValueError,
        r"Argument number 4.*leading size 6.*Put it into `batch`",
    ),
    "one batch in the place of batches": (
        lambda: fsam.dataset_diagonal(fsam.fisher_exact(NLL), P, B),
        TypeError,
        r"`batches` is one batch.*`\[\(inputs, targets\)\]`",
    ),
    "variance of a pair": (
        lambda: fsam.variance.fisher_variance_i1(model, fsam.categorical, P, B),
        TypeError,
        r"take the inputs alone, not `\(inputs, targets\)`",
    ),
    # The state of something else.
    "state of adam": (
        lambda: update(s=optax.adam(1e-3).init(P)),
        TypeError,
        r"state of another optimizer \(ScaleByAdamState\).*`state = optimizer.init",
    ),
    "state of value_and_grad in an optimizer": (
        lambda: update(s=FS),
        TypeError,
        r"must be a SharpnessAwareState, got ValueAndGradState.*`state = optimizer.in",
    ),
    "state of an optimizer in value_and_grad": (
        lambda: F(P, S, B),  # type: ignore
        TypeError,
        r"must be a ValueAndGradState, got SharpnessAwareState.*`state = f.init\(par",
    ),
    "no state": (
        lambda: F(P, None, B),  # type: ignore
        TypeError,
        r"got NoneType: the first one is `state = f.init\(params\)`",
    ),
    "state of another base": (
        lambda: update(s=fsam.sam(optax.sgd(0.1)).init(P)),
        ValueError,
        r"does not belong to these parameters and settings.*\.base.*`state = optimizer",
    ),
    "state of other parameters": (
        lambda: update(s=OPT.init({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})),
        ValueError,
        r"\['w'\].*\(2, 3\).*\(4, 3\)",
    ),
    # The second gradient.
    "no grad_fn": (
        lambda: update(grad_fn=None),
        TypeError,
        r"grad_fn=lambda p: jax.grad\(loss\)\(p, batch\).*TrainState.*value_and_grad",
    ),
    "grad_fn=gradients": (
        lambda: update(grad_fn=G),
        TypeError,
        r"got `grad_fn`: a dict of arrays",
    ),
    "grad_fn=loss": (
        lambda: update(grad_fn=lambda p: loss(p, B)),
        TypeError,
        r"returned one number, as a loss does.*`value_fn=",
    ),
    "grad_fn=value_and_grad": (
        lambda: update(grad_fn=lambda p: jax.value_and_grad(loss)(p, B)),
        TypeError,
        r"returned \(value, grads\).*`grad_fn=lambda p: jax.grad\(loss\)\(p, batch\)`",
    ),
    "grad_fn with aux": (
        lambda: update(grad_fn=lambda p: jax.grad(loss_and_aux, has_aux=True)(p, B)),
        TypeError,
        r"returned \(grads, aux\).*has_aux=True\)\(p, batch\)\[0\]",
    ),
    "grad_fn of two arguments": (
        lambda: update(grad_fn=jax.grad(loss)),
        TypeError,
        r"take the parameters alone, got a function of `\(p, batch\)`. Close over",
    ),
    "grad_fn of two arguments, hidden": (
        lambda: update(grad_fn=lambda *args: jax.grad(loss)(*args)),
        TypeError,
        r"must take the parameters alone: close over the rest",
    ),
    "grad_fn that returns nothing": (
        lambda: update(grad_fn=lambda p: None),
        TypeError,
        r"`grad_fn` must return the gradient",
    ),
    # Parameters.
    "no params": (
        lambda: OPT.update(G, S, grad_fn=grad_fn),
        ValueError,
        r"`params` was not passed: call `update\(grads, state, params\)`",
    ),
    "train state": (
        lambda: F(TrainState(), FS, B),
        TypeError,
        r"`params` is a TrainState: pass the parameters in it, `state.params`",
    ),
    "train state in update": (
        lambda: update(p=TrainState()),
        TypeError,
        r"pass the parameters in it, `state.params`",
    ),
    "lookahead": (
        lambda: F(optax.LookaheadParams(P, P), FS, B),
        TypeError,
        r"pass the fast ones, `params.fast`",
    ),
    "integers": (
        lambda: F({**P, "n": jnp.array(3)}, FS, B),
        TypeError,
        r"leaf \['n'\] of `params` has dtype int.*pass it to the loss as another",
    ),
    "integers under jax.grad": (
        lambda: update(
            *({**tree, "n": jnp.array(3)} for tree in (G,)),
            s=OPT.init({**P, "n": jnp.array(3)}),
            p={**P, "n": jnp.array(3)},
        ),
        TypeError,
        r"Leaf \['n'\] of `params` has no gradient: keep it out",
    ),
    "text": (
        lambda: F({**P, "name": "net"}, FS, B),
        TypeError,
        r"leaf \['name'\] of `params` is 'net', not an array",
    ),
    "complex": (
        lambda: F({"w": jnp.ones(2, complex)}, FS, B),
        TypeError,
        r"keep the real and the imaginary part as two real leaves",
    ),
    "gradient of another structure": (
        lambda: update({"w": G["w"]}),
        ValueError,
        r"`grads` must have the structure of `params`, but leaf \['b'\]",
    ),
    "transposed gradient": (
        lambda: update({**G, "w": G["w"].T}),
        ValueError,
        r"\['w'\] is of shape \(3, 4\) in `grads` and of shape \(4, 3\) in `params`",
    ),
    # The loss.
    "loss of each example": (
        lambda: call(lambda p, b: jnp.sum(model(p, b[0]), 1)),
        TypeError,
        r"scalar loss, got an array of shape \(6,\). Take the mean over the batch",
    ),
    "aux without has_aux": (
        lambda: call(loss_and_aux),
        TypeError,
        r"got a tuple of arrays. Pass `has_aux=True`",
    ),
    "has_aux without aux": (
        lambda: call(has_aux=True),
        TypeError,
        r"`loss_fn` must return `\(loss, aux\)`, got an array of shape \(\)",
    ),
    "gradient in the place of the loss": (
        lambda: call(jax.grad(loss)),
        TypeError,
        r"got a dict of arrays. Pass the loss itself, not its gradient",
    ),
    "loss that wants a key": (
        lambda: call(lambda p, b, key: loss(p, b)),
        TypeError,
        r"more arguments than it was given: pass them after the batch, `f\(params",
    ),
    "aux of the likelihood": (
        lambda: call(NLL, has_aux=True),
        ValueError,
        r"give both the same",
    ),
    "one pass of a loss without model": (
        lambda: call(empirical_fisher=True),
        TypeError,
        r"`empirical_fisher=True` needs.*`negative_log_likelihood\(apply_fn, likelih",
    ),
    "two clean passes": (
        lambda: call(NLL, empirical_fisher=True, functional=True),
        ValueError,
        r"two clean passes: take one",
    ),
    "fisher that nobody gave": (
        lambda: call(loss, fsam.fisher_ellipsoid(0.1, fsam.given())),
        TypeError,
        r"fisher",
    ),
    # Options.
    "every=0": (lambda: call(every=0), ValueError, r"`every` must be an integer of at"),
    "every='2'": (lambda: call(every="2"), TypeError, r"`every` must be an integer"),
    "every of a vector": (
        lambda: call(every=lambda step: jnp.ones(2, bool)),
        ValueError,
        r"`every` must return one bool for a step",
    ),
    "micro_batches=2.5": (
        lambda: call(micro_batches=2.5),
        ValueError,
        r"`micro_batches` must be an integer of at least 1, got 2.5",
    ),
    "micro_batches that do not divide": (
        lambda: call(micro_batches=4),
        ValueError,
        r"leaf \[0\] of shape \(6, 4\) cannot be cut into `micro_batches=4`",
    ),
    "rows beside the batch": (
        lambda: call(lambda p, b, m: loss(p, b), BALL, B, X, micro_batches=2),
        ValueError,
        r"Argument number 4 of the call.*Put it into `batch`",
    ),
    "merge_aux of nothing": (
        lambda: call(merge_aux=lambda aux: aux),
        ValueError,
        r"needs `has_aux=True` and `micro_batches`",
    ),
    "perturb_dtype of integers": (
        lambda: call(perturb_dtype=jnp.int32),
        TypeError,
        r"`perturb_dtype` must be a floating-point dtype such as jnp.float32",
    ),
    "descent=0.5": (
        lambda: call(descent=0.5),
        TypeError,
        r"`descent` must be.*such as surrogate_gap\(0.4\), got 0.5",
    ),
    "rho=-1": (lambda: fsam.sam(optax.sgd(0.1), -1), ValueError, r"`rho` must be.*-1"),
    "rho='0.05'": (
        lambda: fsam.sam(optax.sgd(0.1), "0.05"),  # type: ignore
        TypeError,
        r"got the text '0.05': give `float\(",
    ),
    "scope typo": (
        lambda: fsam.adaptive_ellipsoid(0.5, scope="filters"),  # type: ignore
        ValueError,
        r"`scope` must be \"element\", \"filter\" or \"layer\", got 'filters'",
    ),
    "mask of arrays": (
        lambda: call(
            loss, fsam.euclidean_ball(0.1, mask={"w": jnp.ones((4, 3)), "b": True})
        ),
        (TypeError, ValueError),
        r"`mask` must",
    ),
    "key=0": (
        lambda: fsam.fisher_i1(model, fsam.categorical, key=0),  # type: ignore
        TypeError,
        r"one PRNG key, such as `jax.random.key\(0\)`",
    ),
    "squared_gradient in diagonal": (
        lambda: fsam.diagonal(fsam.squared_gradient(), P, B),
        TypeError,
        r"reads the gradient, as `squared_gradient` does, call `update` with one",
    ),
    "inside optax.masked": (
        lambda: update(
            tx=(tx := optax.masked(OPT, {"w": True, "b": False})), s=tx.init(P)
        ),
        ValueError,
        r"MaskedNode at \['b'\].*Put `sharpness_aware` outside.*`mask=`",
    ),
    # Metrics.
    "metric typo": (
        lambda: fsam.metrics(FS)["gradient_cos"],
        KeyError,
        r"no metric 'gradient_cos', but dual_norm, grad_norm, gradient_cosine",
    ),
    "metrics of adam": (
        lambda: fsam.metrics(optax.adam(1e-3).init(P)),
        TypeError,
        r"pass the state that `update` of `sharpness_aware`, or `f`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_says_what_to_do(name):
    mistake, kind, match = MISTAKES[name]
    with pytest.raises(kind, match=match) as caught:
        mistake()
    text = str(caught.value)
    # It is about the caller's code, readable, without the contents of arrays.
    assert len(text) < 1000
    assert "Array(" not in text and "<function" not in text


def test_what_cannot_be_told_from_a_perturbation_runs():
    # Plain SGD has no state: a perturbation of the caller's own may look the same.
    value, _, _ = call(loss, optax.sgd(0.1))
    np.testing.assert_allclose(value, loss(P, B), rtol=1e-6)


def test_other_errors_pass_as_they_are():
    def broken(p, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(broken)
    with pytest.raises(KeyError, match="mine"):
        update(grad_fn=lambda p: broken(p, B))


def test_metrics_are_all_there_under_jit():
    _, _, state = jax.jit(F)(P, FS, B)
    found = jax.jit(fsam.metrics)({"ascent": state, "step": 3})
    assert set(found) == {
        *fsam.Metrics._fields,
        "rho",
        "dual_norm",
        "skipped",
        "sharpness",
    }
    assert found["sharpness"] == state.sharpness > 0
    np.testing.assert_allclose(found["rho"], 0.05)
    assert found["leaf_perturbation_norms"].keys() == P.keys()
    _, state = update()
    assert "sharpness" not in fsam.metrics(state)
    two = fsam.metrics((state, F.init(P)))
    assert two["rho_0"] == jnp.float32(0.05) and two["rho_1"] == 0
    bare = fsam.sharpness_aware(optax.sgd(0.1), BALL, metrics=False)
    assert set(fsam.metrics(bare.init(P))) == {"rho", "dual_norm", "skipped"}
