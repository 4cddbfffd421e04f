"""Reads a compiled program: what its devices exchange and multiply, loops included.

XLA's own cost analysis counts the body of a loop once, whatever its length.
"""

import collections
import math
import re


COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all"),
    *("collective-permute", "reduce-scatter"),
)
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)
CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)


def count(text: str) -> dict[str, float]:
    """Counts what one device does in a run of the program `compiled.as_text()`.

    Returns the bytes that come out of the collectives of each kind, and "products", the
    multiplications and additions of its matrix products and convolutions.
    """
    pattern = r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    computations = {name: dict(NAMED.findall(body)) for _, name, body in found}
    counts: dict[str, collections.Counter] = {}

    def total(name):
        if name not in counts:
            counts[name] = collections.Counter()
            lines = computations.get(name, {})
            shapes = {of: ARRAY.match(line) for of, line in lines.items()}
            for line in lines.values():
                counts[name].update(_own(line, shapes))
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                called = CALLED.findall(line)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                    called += [x.strip(" %") for x in branches[1].split(",")]
                for kind, number in (x for c in called for x in total(c).items()):
                    counts[name][kind] += number * int(trips[1] if trips else 1)
        return counts[name]

    return dict(total(next(name for entry, name, _ in found if entry)))


def _dimensions(listed):
    return [int(n) for n in listed.split(",") if n]


def _bytes(kind, listed):
    width = BYTES.get(kind) or int(re.sub(r"\D", "", kind)[:2] or 8) / 8
    return math.prod(_dimensions(listed)) * width


def _own(line, shapes):
    """Returns what one instruction exchanges or multiplies."""
    found = re.match(r"(\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)", line)
    result, name, operands = found.groups() if found else ("", "", "")
    if name.removesuffix("-start") in COLLECTIVES:
        arrays = ARRAY.findall(result)
        if name == "all-gather-start":  # Its result holds the operands too.
            arrays = arrays[len(arrays) // 2 :]
        return {name.removesuffix("-start"): sum(_bytes(*x) for x in arrays)}
    if name not in ("dot", "convolution"):
        return {}
    operands = re.findall(r"%([\w.-]+)", operands)
    left, right = (_dimensions(shapes[x][2]) for x in operands)
    if name == "dot":
        contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        inner = math.prod(left[d] for dims in contracted for d in _dimensions(dims))
    else:
        (kernel,) = re.findall(r"dim_labels=\w+_(\w+)->", line)
        inner = math.prod(n for n, d in zip(right, kernel, strict=True) if d != "o")
    return {"products": 2 * math.prod(_dimensions(ARRAY.findall(result)[0][1])) * inner}
