"""Reads a compiled program: what its devices exchange and multiply, loops included.

XLA's own cost analysis counts the body of a loop once, whatever its length.
"""

import collections
import math
import re


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)


def count(text: str) -> dict[str, float]:
    """Counts what one device does in a run of the program.

    Args:
        text: `compiled.as_text()`.

    Returns:
        The bytes that come out of the collectives of each kind, and "products", the
        multiplications and additions of its matrix products and convolutions.
    """
    computations, entry = {}, None
    lines = []
    for line in text.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := LINE.match(line):
            lines.append((found[1], found[2]))
    counts: dict[str, collections.Counter] = {}

    def total(name):
        if name not in counts:
            counts[name] = collections.Counter()
            shapes = {
                of: (found.groups() if (found := ARRAY.match(rest)) else ("", ""))
                for of, rest in computations.get(name, ())
            }
            for _, rest in computations.get(name, ()):
                counts[name].update(_own(rest, shapes))
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
                called = CALLED.findall(rest)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
                    called += [x.strip(" %") for x in branches[1].split(",")]
                for other in called:
                    for kind, number in total(other).items():
                        counts[name][kind] += number * int(trips[1] if trips else 1)
        return counts[name]

    return dict(total(entry))


def _dimensions(listed):
    return [int(n) for n in listed.split(",") if n]


def _bytes(kind, listed):
    width = BYTES.get(kind) or int(re.sub(r"\D", "", kind)[:2] or 8) / 8
    return math.prod(_dimensions(listed)) * width


def _own(rest, shapes):
    """Returns what one instruction exchanges or multiplies."""
    found = re.match(r"(\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)", rest)
    if found is None:
        return {}
    result, name, operands = found.groups()
    operands = re.findall(r"%([\w.-]+)", operands)
    if name.removesuffix("-start") in COLLECTIVES:
        arrays = ARRAY.findall(result)
        if name == "all-gather-start":  # Its result holds the operands too.
            arrays = arrays[len(arrays) // 2 :]
        return {name.removesuffix("-start"): sum(_bytes(*x) for x in arrays)}
    if name not in ("dot", "convolution"):
        return {}
    out = math.prod(_dimensions(ARRAY.findall(result)[0][1]))
    left, right = (_dimensions(shapes[x][1]) for x in operands)
    if name == "dot":
        contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        inner = math.prod(left[d] for dims in contracted for d in _dimensions(dims))
    else:
        (kernel,) = re.findall(r"dim_labels=\w+_(\w+)->", rest)
        inner = math.prod(n for n, d in zip(right, kernel, strict=True) if d != "o")
    return {"products": 2 * out * inner}
