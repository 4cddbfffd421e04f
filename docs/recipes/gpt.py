"""A small GPT with low-rank adapters (LoRA), and the packed text that it reads."""

import collections
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fsam_optax as fsam


HEADS = 4
EOS = 0  # It also begins the input.
ABSENT = -1  # A label that `categorical` leaves out.
MATRICES = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}


# Text.


def pieces(texts: Sequence[str], size: int) -> list[str]:
    """Returns pieces of words: all characters, and pairs joined in order of frequency.

    Byte-pair encoding (Sennrich, Haddow and Birch, 2016), from the most frequent words.
    """
    counts = collections.Counter(w for text in texts for w in words(text))
    known = [((*word,), n) for word, n in counts.most_common(4000)]
    found = [*sorted({c for word in counts for c in word})]
    while len(found) < size - 1:
        pairs = collections.Counter()
        for word, n in known:
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        pair = pairs.most_common(1)[0][0]
        found.append("".join(pair))
        known = [(joined(word, pair), n) for word, n in known]
    return ["</s>", *found]


def words(text: str) -> list[str]:
    """Returns words with the space before them, and marks, in lower case."""
    return re.findall(r" ?\w+|[^\w\s]", text.lower())


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Returns a word with a pair of its pieces made one."""
    made: list[str] = []
    while word:
        size = 2 if word[:2] == pair else 1
        made.append("".join(word[:size]))
        word = word[size:]
    return tuple(made)


def encode(texts: Sequence[str], known: list[str]) -> list[list[int]]:
    """Returns the numbers of the longest pieces, from the left; the unknown is lost."""
    number = {piece: i for i, piece in enumerate(known)}
    longest = sorted(known[1:], key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest)))
    every = ("".join(words(text)) for text in texts)
    return [[number[p] for p in pattern.findall(text)] for text in every]


def pack(sequences: Sequence[list[int]], length: int) -> Any:
    """Lays sequences into rows, and cuts what is too long: `((tokens, part), labels)`.

    All have shape (rows, length). `part` is which sequence of its row a token is of,
    from 1 on; 0 is padding, whose labels are ABSENT.
    """
    rows: list[list[list[int]]] = [[]]
    for sequence in sequences:
        used = sum(len(s) + 1 for s in rows[-1])
        if rows[-1] and used + len(sequence) >= length:
            rows.append([])
        rows[-1].append(sequence[: length - 1])
    tokens, part, labels = np.zeros((3, len(rows), length), np.int32)
    labels[:] = ABSENT
    for i, row in enumerate(rows):
        start = 0
        for number, sequence in enumerate(row, 1):
            here = i, slice(start, start + len(sequence) + 1)
            tokens[here], labels[here] = [EOS, *sequence], [*sequence, EOS]
            part[here] = number
            start = here[1].stop
    return (tokens, part), labels


# Model.


def initial(key: jax.Array, vocabulary: int, length: int, width: int, depth: int):
    """Returns a network without biases, its output layer not its embedding."""
    keys = iter(jax.random.split(key, 3 + 4 * depth))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    layers = [
        {name: normal(m * width, n * width) for name, (m, n) in MATRICES.items()}
        for _ in range(depth)
    ]
    shapes = {"tokens": (vocabulary, width), "places": (length, width)}
    tables = {k: 0.3 * jax.random.normal(next(keys), s) for k, s in shapes.items()}
    head = normal(width, vocabulary)
    return {"tables": tables, "matrices": {"layers": layers, "head": head}}


def adapter_of(key: jax.Array, net: Any, rank: int) -> Any:
    """Returns a low-rank pair for each matrix, whose product is 0."""

    def pair(key, w):
        a = jax.random.normal(key, (len(w), rank)) * len(w) ** -0.5
        return {"a": a, "b": jnp.zeros((rank, w.shape[1]))}

    leaves, structure = jax.tree.flatten(net["matrices"])
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(map(pair, keys, leaves))


def changes(adapter: Any) -> Any:
    """Returns by how much an adapter changes each matrix."""
    return jax.tree.map(
        lambda pair: pair["a"] @ pair["b"], adapter, is_leaf=lambda x: "a" in x
    )


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def apply(adapter, inputs, net):
    """Returns logits (rows, length, vocabulary) of `(tokens, part)`.

    A token sees those before it of the same sequence.
    """
    (tokens, part), tables = inputs, net["tables"]
    same = part[:, :, None] == part[:, None]
    before = same & jnp.tri(part.shape[1], dtype=bool)[None]
    x = tables["tokens"][tokens] + tables["places"][jnp.sum(before, -1) - 1]
    weights = net["matrices"]
    low = jax.tree.map(lambda w: None, weights) if adapter is None else adapter
    for layer, pairs in zip(weights["layers"], low["layers"], strict=True):
        parts = jnp.split(dense(norm(x), layer["qkv"], pairs["qkv"]), 3, -1)
        heads = [p.reshape(*p.shape[:2], HEADS, -1) for p in parts]
        y = jax.nn.dot_product_attention(*heads, mask=before[:, None])
        x += dense(y.reshape(x.shape), layer["out"], pairs["out"])
        y = jax.nn.gelu(dense(norm(x), layer["up"], pairs["up"]))
        x += dense(y, layer["down"], pairs["down"])
    return dense(norm(x), weights["head"], low["head"])


def dense(x, w, pair):
    """Returns x (w + a b), without forming a b."""
    return x @ w if pair is None else x @ w + (x @ pair["a"]) @ pair["b"]


def of_matrices(matrices, inputs, net):
    return apply(None, inputs, net | {"matrices": matrices})


def of_net(net, inputs):
    return apply(None, inputs, net)


# Functions of an adapter, of the matrices that it changes, and of the whole network.
LOSS, OF_MATRICES, NET = (
    fsam.negative_log_likelihood(fn, fsam.categorical)
    for fn in (apply, of_matrices, of_net)
)
