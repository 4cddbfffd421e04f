"""Optax's own suite for contributed optimizers, from its wheel, over every method.

The suite calls `update(grads, state, params)` and, for optimizers that it knows to ask
for it, passes the loss as `obj_fn`: here for all of them.
"""

import functools
import importlib.util
import pathlib
import re
import types
import unittest

import jax
import optax
import pytest

import fsam_optax


ADAM = optax.adam(1e-2)


def bsam(learning_rate):
    """Takes the loss where the suite passes it."""
    tx = fsam_optax.bsam(
        learning_rate, 1e-3, num_data=1e6, key=jax.random.key(0), weight_decay=0.0
    )

    def update(grads, state, params, *, obj_fn=None, **extra):
        grad_fn = jax.grad(obj_fn) if obj_fn else lambda _: grads
        return tx.update(grads, state, params, grad_fn=grad_fn, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def on_adam(factory, **hyperparams):
    """A factory of hyper-parameters alone, and these."""
    return functools.partial(factory, ADAM), hyperparams


METHODS = {
    "sam": on_adam(fsam_optax.sam, rho=1e-3),
    "asam": on_adam(fsam_optax.asam, rho=1e-3),
    "fisher_sam": on_adam(fsam_optax.fisher_sam, rho=1e-3),
    "gsam": on_adam(fsam_optax.gsam, rho=1e-3, alpha=0.1),
    "wsam": on_adam(fsam_optax.wsam, rho=1e-3, gamma=0.8),
    "looksam": on_adam(fsam_optax.looksam, rho=1e-3, alpha=0.03, every=2),
    "friendly_sam": on_adam(fsam_optax.friendly_sam, rho=1e-3, sigma=0.5),
    "msam": on_adam(fsam_optax.msam, rho=1e-3),
    "bsam": (bsam, {"learning_rate": 1e-2}),
}


def suite():
    """Compiles the suite with our methods in the place of Optax's."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    if spec is None or spec.origin is None:
        pytest.skip("this version of optax has no suite in its wheel")
    source = pathlib.Path(spec.origin).read_text()
    # Every method is one that the suite passes the loss to.
    source, number = re.subn(
        r"opt_name == 'sophia'|opt_name in \['sophia'\]", "True", source
    )
    head, tests = source.split("class ContribTest", 1)
    assert number >= 4
    module = types.ModuleType("optax_common_test")
    module.__file__ = spec.origin
    exec(compile(head, spec.origin, "exec"), module.__dict__)
    ours = tuple(
        {
            "opt_name": name,
            "opt_kwargs": kwargs,
            "wrapper_name": None,
            "wrapper_kwargs": None,
        }
        for name, (_, kwargs) in METHODS.items()
    )
    module.__dict__["_ALL_OPTIMIZERS_UNDER_TEST"] = ours
    module.__dict__["_MAIN_OPTIMIZERS_UNDER_TEST"] = ours
    module.__dict__["_get_opt_factory"] = lambda name: METHODS[name][0]
    exec(compile("class ContribTest" + tests, spec.origin, "exec"), module.__dict__)
    return module.__dict__["ContribTest"]


def run(cases):
    result = unittest.TestResult()
    unittest.TestSuite(cases).run(result)
    problems = result.failures + result.errors
    assert not problems, "\n".join(f"{case}\n{text}" for case, text in problems)
    return result.testsRun


def cases(slow):
    found = unittest.defaultTestLoader.loadTestsFromTestCase(suite())
    # `test_optimizers` trains for 30000 steps; the others make two.
    return [x for x in found if bool(re.search(r"test_optimizers\d", x.id())) == slow]


@pytest.mark.slow
def test_contract():
    assert run(cases(slow=False)) >= 10 * len(METHODS)


@pytest.mark.slow
def test_convergence():
    assert run(cases(slow=True)) == 4 * len(METHODS)
