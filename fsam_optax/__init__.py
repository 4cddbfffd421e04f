"""Sharpness-aware minimisation in three geometries, as plain Optax."""

from fsam_optax import variance as variance
from fsam_optax._ball.geometries import (
    adaptive_ellipsoid as adaptive_ellipsoid,
    euclidean_ball as euclidean_ball,
    fisher_ellipsoid as fisher_ellipsoid,
)
from fsam_optax._ball.memory import (
    averaged as averaged,
    AverageState as AverageState,
    friendly as friendly,
)
from fsam_optax._ball.multi_step import (
    multi_step as multi_step,
    MultiStepState as MultiStepState,
)
from fsam_optax._ball.perturbation import (
    perturbation as perturbation,
    PerturbationState as PerturbationState,
)
from fsam_optax._engine import (
    check_separable as check_separable,
    explain_loss as explain_loss,
    loss_power_sums as loss_power_sums,
    power_sums as power_sums,
)
from fsam_optax._fisher.at_hand import (
    given as given,
    squared_gradient as squared_gradient,
)
from fsam_optax._fisher.by_group import by_group as by_group
from fsam_optax._fisher.dataset import (
    dataset_diagonal as dataset_diagonal,
    DatasetState as DatasetState,
)
from fsam_optax._fisher.diagonal import diagonal as diagonal
from fsam_optax._fisher.estimators import (
    fisher_empirical as fisher_empirical,
    fisher_exact as fisher_exact,
    fisher_hutchinson as fisher_hutchinson,
    fisher_i1 as fisher_i1,
)
from fsam_optax._fisher.example_gradients import (
    clipped_gradient as clipped_gradient,
    per_example_norms as per_example_norms,
)
from fsam_optax._fisher.explain import explain as explain
from fsam_optax._fisher.functional import functional_gradient as functional_gradient
from fsam_optax._fisher.gnb import fisher_gnb as fisher_gnb
from fsam_optax._fisher.heads import (
    gaussian_with_variance as gaussian_with_variance,
    heads as heads,
)
from fsam_optax._fisher.i2 import fisher_i2 as fisher_i2
from fsam_optax._fisher.likelihoods import (
    bernoulli as bernoulli,
    categorical as categorical,
    gaussian as gaussian,
    Likelihood as Likelihood,
    MomentBounds as MomentBounds,
    poisson as poisson,
)
from fsam_optax._fisher.negative_log_likelihood import (
    negative_log_likelihood as negative_log_likelihood,
)
from fsam_optax._fisher.refresh_every import refresh_every as refresh_every
from fsam_optax._step.bsam import bsam as bsam, BSAMState as BSAMState
from fsam_optax._step.by_name import (
    asam as asam,
    fisher_sam as fisher_sam,
    friendly_sam as friendly_sam,
    gsam as gsam,
    looksam as looksam,
    msam as msam,
    sam as sam,
    wsam as wsam,
)
from fsam_optax._step.descents import (
    extrapolate as extrapolate,
    reuse as reuse,
    ReuseState as ReuseState,
    surrogate_gap as surrogate_gap,
)
from fsam_optax._step.displaced import (
    displaced as displaced,
    DisplacedState as DisplacedState,
    eval_params as eval_params,
)
from fsam_optax._step.lagged import LaggedState as LaggedState
from fsam_optax._step.measured import metrics as metrics
from fsam_optax._step.metrics import Metrics as Metrics
from fsam_optax._step.sharpness_aware import (
    sharpness_aware as sharpness_aware,
    SharpnessAwareState as SharpnessAwareState,
)
from fsam_optax._step.value_and_grad import (
    value_and_grad as value_and_grad,
    ValueAndGrad as ValueAndGrad,
    ValueAndGradState as ValueAndGradState,
)
from fsam_optax._study.directions import random_direction as random_direction
from fsam_optax._study.second_order import (
    dense_empirical_fisher as dense_empirical_fisher,
    dense_fisher as dense_fisher,
    dense_ggn as dense_ggn,
    scale_by_inverse_dense as scale_by_inverse_dense,
    scale_by_inverse_fisher as scale_by_inverse_fisher,
)
from fsam_optax._study.sharpness import (
    kl_divergence as kl_divergence,
    kl_divergence_quadratic as kl_divergence_quadratic,
    loss_along as loss_along,
    loss_over_plane as loss_over_plane,
    sharpness as sharpness,
)


__all__ = [
    "AverageState",
    "BSAMState",
    "DatasetState",
    "DisplacedState",
    "LaggedState",
    "Likelihood",
    "Metrics",
    "MomentBounds",
    "MultiStepState",
    "PerturbationState",
    "ReuseState",
    "SharpnessAwareState",
    "ValueAndGrad",
    "ValueAndGradState",
    "adaptive_ellipsoid",
    "asam",
    "averaged",
    "bernoulli",
    "bsam",
    "by_group",
    "categorical",
    "check_separable",
    "clipped_gradient",
    "dataset_diagonal",
    "dense_empirical_fisher",
    "dense_fisher",
    "dense_ggn",
    "diagonal",
    "displaced",
    "euclidean_ball",
    "eval_params",
    "explain",
    "explain_loss",
    "extrapolate",
    "fisher_ellipsoid",
    "fisher_empirical",
    "fisher_exact",
    "fisher_gnb",
    "fisher_hutchinson",
    "fisher_i1",
    "fisher_i2",
    "fisher_sam",
    "friendly",
    "friendly_sam",
    "functional_gradient",
    "gaussian",
    "gaussian_with_variance",
    "given",
    "gsam",
    "heads",
    "kl_divergence",
    "kl_divergence_quadratic",
    "looksam",
    "loss_along",
    "loss_over_plane",
    "loss_power_sums",
    "metrics",
    "msam",
    "multi_step",
    "negative_log_likelihood",
    "per_example_norms",
    "perturbation",
    "poisson",
    "power_sums",
    "random_direction",
    "refresh_every",
    "reuse",
    "sam",
    "scale_by_inverse_dense",
    "scale_by_inverse_fisher",
    "sharpness",
    "sharpness_aware",
    "squared_gradient",
    "surrogate_gap",
    "value_and_grad",
    "variance",
    "wsam",
]
__version__ = "0.1.0"
