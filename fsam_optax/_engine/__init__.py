"""Sums of powers of per-example gradients, for about the price of the gradient."""

from fsam_optax._engine.canonical import mappable as mappable
from fsam_optax._engine.columns import Columns as Columns
from fsam_optax._engine.entries import (
    entries as entries,
    sum_of_products as sum_of_products,
)
from fsam_optax._engine.example_squares import example_squares as example_squares
from fsam_optax._engine.explanation import (
    check_separable as check_separable,
    explain as explain,
    explain_loss as explain_loss,
    explain_squares as explain_squares,
    over_examples as over_examples,
)
from fsam_optax._engine.jaxpr import depends as depends, most_bytes as most_bytes
from fsam_optax._engine.one_row import as_batch_of_one as as_batch_of_one
from fsam_optax._engine.power_sums import (
    loss_power_sums as loss_power_sums,
    power_sums as power_sums,
    share_of as share_of,
    sums_of_loss as sums_of_loss,
    sums_of_powers as sums_of_powers,
    without_explicit_axes as without_explicit_axes,
)
from fsam_optax._engine.report import Explanation as Explanation, Leaf as Leaf
from fsam_optax._engine.sources import DEFAULT_CHUNK_BYTES as DEFAULT_CHUNK_BYTES
from fsam_optax._engine.sums import added_up as added_up, apart as apart
from fsam_optax._engine.waiting import after_point as after_point
