"""Sharpness-aware minimisation in three geometries, as plain Optax."""

from importlib.metadata import version as _version

from fsam_optax._aliases import (
    asam as asam,
    fisher_sam as fisher_sam,
    sam as sam,
)
from fsam_optax._ascent import Metrics as Metrics
from fsam_optax._estimators import (
    given as given,
    squared_gradient as squared_gradient,
)
from fsam_optax._geometries import (
    adaptive_ellipsoid as adaptive_ellipsoid,
    euclidean_ball as euclidean_ball,
    fisher_ellipsoid as fisher_ellipsoid,
)
from fsam_optax._perturbation import (
    perturbation as perturbation,
    PerturbationState as PerturbationState,
)
from fsam_optax._sharpness_aware import (
    sharpness_aware as sharpness_aware,
    SharpnessAwareState as SharpnessAwareState,
)
from fsam_optax._value_and_grad import (
    value_and_grad as value_and_grad,
    ValueAndGrad as ValueAndGrad,
    ValueAndGradState as ValueAndGradState,
)


__version__ = _version("fsam_optax")
