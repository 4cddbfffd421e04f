"""The primitives that the engine knows by name, and which are no entry of a table.

The tables, one for each thing that can be done with a primitive, are `moves.MOVES` and
`moves.BOXES` (powers pass), `linear.LINEAR` (products stay products), `rules.RULES`
(how sums of powers are formed), `tails.EVALUATED`, `normal.NORMAL` and
`carries.STACKED` (how programs are written) and `work.COUNTS` (operations). A primitive
is named there or here.
"""

from typing import Any

import jax.numpy as jnp


CALLS = ("jit", "pjit", "closed_call", "core_call", "xla_call")
REMATERIALISED = ("checkpoint", "remat", "remat2")
BARRIER = "optimization_barrier"
LOOP = "scan"
BRANCHES = "cond"
PLATFORM = "platform_index"  # Known when the program is lowered, not before.
IN_KERNELS = ("mosaic",)  # Platforms of what runs inside a kernel of Pallas.
SCATTER = "scatter-add"
TRANSPOSITION = "transpose"
NEGATION = "neg"
DIVISION = "div"
DIFFERENCE = "sub"
SCALING = ("mul", DIVISION, NEGATION)
UPDATE = "dynamic_update_slice"
CONSTRAINT = "sharding_constraint"
PRODUCT = "dot_general"
CONVOLUTION = "conv_general_dilated"
VARY = "pvary"  # Of types alone, under `jax.shard_map`.
SOLVE = "custom_linear_solve"
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
SUMS = ("add_any", "add")
# Of operands of one shape, or numbers.
ELEMENTWISE = (
    *SUMS,
    "abs",
    "acos",
    "acosh",
    "and",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "cbrt",
    "ceil",
    "clamp",
    "conj",
    "convert_element_type",
    "copy",
    "copy_p",
    "cos",
    "cosh",
    "digamma",
    "div",
    "eq",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "ge",
    "gt",
    "imag",
    "integer_pow",
    "is_finite",
    "le",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "nextafter",
    "not",
    "one_minus_square",
    "or",
    "pow",
    "real",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "sub",
    "tan",
    "tanh",
    "xor",
    VARY,
)
KEEPS_ZEROS = ("broadcast_in_dim", "convert_element_type", "copy", VARY)
# What the gradient of a weight ends in, by what it is called in reports.
CONTRACTIONS = {
    "dot_general": "shared dense",
    "conv_general_dilated": "convolution",
    "scatter-add": "embedding",
    "ragged_dot_general": "ragged dense",
}
# Linear in an operand, with something of another shape as output.
ENTERED_BY = ("dot_general", "conv_general_dilated", "gather")
# Linear operations on one operand that move entries about, or scale each by itself.
# Barriers may have several operands, see `is_move`.
LINEAR_MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "neg",
    BARRIER,
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "transpose",
)


def is_move(eqn: Any) -> bool:
    """Tells whether an equation is one of `LINEAR_MOVES`, of one operand.

    Not if that is rounded to whole numbers on the way.
    """
    return (
        name_of(eqn) in LINEAR_MOVES
        and len(eqn.invars) == 1
        and all(map(holds_numbers, (*eqn.invars, *eqn.outvars)))
    )


def holds_numbers(v: Any) -> bool:
    """Tells whether a variable is no index, no mask and no whole number."""
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def name_of(eqn: Any) -> str:
    """Returns the name of the primitive of an equation, none for no equation."""
    return "" if eqn is None else eqn.primitive.name
