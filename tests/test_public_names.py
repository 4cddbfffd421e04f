"""What `help(fsam_optax)` lists, and how."""

import inspect
import pydoc
import types

import pytest

import fsam_optax
import fsam_optax.variance


# Those of the design that this version has.
NAMES = """
    perturbation euclidean_ball adaptive_ellipsoid fisher_ellipsoid multi_step friendly
    averaged surrogate_gap extrapolate reuse sharpness_aware value_and_grad displaced
    eval_params sam asam fisher_sam gsam wsam looksam friendly_sam msam bsam metrics
    functional_gradient negative_log_likelihood categorical bernoulli poisson gaussian
    squared_gradient given fisher_empirical fisher_i1 fisher_exact fisher_i2 fisher_gnb
    fisher_hutchinson by_group refresh_every diagonal dataset_diagonal explain
    per_example_norms clipped_gradient kl_divergence sharpness
""".split()


def modules():
    nnx = pytest.importorskip("fsam_optax.nnx")
    return fsam_optax, fsam_optax.variance, nnx


def test_all_is_what_is_public():
    public = {
        name
        for name, value in vars(fsam_optax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(fsam_optax.__all__) - {"variance"} == public
    assert set(NAMES) <= public
    assert len(set(fsam_optax.__all__)) == len(fsam_optax.__all__)


@pytest.mark.parametrize("which", range(3))
def test_each_name_is_there_and_documented(which):
    module = modules()[which]
    for name in module.__all__:
        value = getattr(module, name)
        assert inspect.getdoc(value), name
    if which:
        own = {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
            and not name.startswith("_")
        }
        assert own <= set(module.__all__)


@pytest.mark.parametrize("which", range(3))
def test_signatures_name_types_in_short(which):
    module = modules()[which]
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            text = str(inspect.signature(value))
            assert "_src" not in text and "Union[" not in text, f"{name}{text}"


def test_help_lists_the_functions():
    text = pydoc.plain(pydoc.render_doc(fsam_optax))
    for name in NAMES:
        assert f"    {name}" in text or f" {name} = " in text, name
