"""Question: does SAM, ASAM or Fisher SAM translate better than Adam?

After Kwon et al. 2021 (https://arxiv.org/abs/2102.11600), with captions of images,
German to English, in place of IWSLT'14: Multi30k (Elliott et al. 2016,
https://arxiv.org/abs/1605.00459). Every method spends the same number of gradients, so
that Adam takes twice as many steps, and makes five tries, with the first seed: Adam of
learning rates, the others of three radii at the middle one of these and then, with the
best radius, of the rates beside it. The try with the greatest token accuracy on the
validation set is repeated with the other seeds.

    python benchmarks/translation.py --data-dir FOLDER

The folder holds train, val and test_2016_flickr, each as `.de.gz` and `.en.gz`, one
sentence a line. Smoke mode makes up its text.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import captions
import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import show
from sacrebleu.metrics.bleu import BLEU


PAD, EOS, UNKNOWN = range(3)  # EOS also begins the input of the decoder.
ROW, LONGEST = 64, 32  # tokens of a row, and of a translation
DROPOUT, SMOOTHING = 0.1, 0.1
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
# In the middle the choices of Kwon et al., and one of Fisher SAM that raises the loss
# as much as that of ASAM.
RADII = {"ASAM": (0.06, 0.2, 0.6), "relative": (0.06, 0.2, 0.6)}
RADII |= {"absolute": (0.005, 0.015, 0.05), "MSAM": (0.2, 0.6, 1.8)}
HALF = "base, half the gradients"
# The loss, of smoothed labels, is no likelihood: there is no empirical F.
METHODS = [*(name for name in methods.METHODS if "empirical" not in name), HALF]


class Pairs(NamedTuple):
    """Sentence pairs, several to a row, so that little is computed on padding.

    The decoder sees `inputs`, EOS and the words, and has to say `labels`, the words and
    EOS. Parts count the pairs of a row from 1 on; 0 is padding.
    """

    source: Any
    source_part: Any
    inputs: Any
    part: Any
    labels: Any


def words_of(text: str) -> list[str]:
    """Returns words and marks in lower case; a word keeps its hyphens."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text.lower())


def pack(pairs: Iterable[Any]) -> Pairs:
    """Lays each pair into the first of the latest rows with room for both sides."""
    rows = Pairs([], [], [], [], [])

    for source, target in pairs:
        latest = range(max(0, len(rows.part) - 32), len(rows.part))
        free = (i for i in latest if len(rows.source[i]) + len(source) <= ROW)
        free = (i for i in free if len(rows.part[i]) + len(target) < ROW)
        at = next(free, len(rows.part))
        if at == len(rows.part):
            for field in rows:
                field.append([])
        part = [max(rows.part[at], default=0) + 1]
        rows.source[at] += source
        rows.source_part[at] += part * len(source)
        rows.inputs[at] += [EOS, *target]
        rows.part[at] += part * (len(target) + 1)
        rows.labels[at] += [*target, EOS]
    return Pairs(*(padded(field, ROW) for field in rows))


def padded(rows, length):
    return np.array([row + [PAD] * (length - len(row)) for row in rows], np.int32)


def prepare(text: dict[str, list[tuple[str, str]]]) -> tuple[Any, ...]:
    """Returns packed training and validation pairs, test sources, references, words."""
    train, val, test = text.values()
    words = []
    for side in zip(*train, strict=True):
        counts = collections.Counter(w for text in side for w in words_of(text))
        known = (word for word, count in counts.most_common() if count >= 3)
        words.append(["<pad>", "</s>", "<unk>", *known])
    numbers = [{word: i for i, word in enumerate(side)} for side in words]

    def encode(pair):
        # What a row cannot hold is cut off; no sentence of Multi30k is as long.
        sides = zip(map(words_of, pair), numbers, strict=True)
        return [[known.get(w, UNKNOWN) for w in ws][: ROW - 1] for ws, known in sides]

    sources, references = [encode(pair)[0] for pair in test], [pair[1] for pair in test]
    sources = padded(sources, max(map(len, sources)))
    return pack(map(encode, train)), pack(map(encode, val)), sources, references, words


def in_words(numbers: np.ndarray, words: list[str]) -> str:
    """Returns the text up to the first EOS, marks put next to their words."""
    found = itertools.takewhile(lambda number: number != EOS, numbers.tolist())
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words[i] for i in found))


class Attention(nn.Module):
    """Of the places of x, with four heads, to those of a memory."""

    @nn.compact
    def __call__(self, x, memory, mask):
        width = x.shape[-1]
        query = nn.Dense(width, use_bias=False)(x)
        # One product in place of two is faster.
        key, value = jnp.split(nn.Dense(2 * width, use_bias=False)(memory), 2, -1)
        heads = (y.reshape(*y.shape[:2], 4, -1) for y in (query, key, value))
        y = jax.nn.dot_product_attention(*heads, mask=mask)
        return nn.Dense(width)(y.reshape(x.shape))


class Layer(nn.Module):
    """Pre-norm attention, to a memory too if there is one, and two dense layers."""

    train: bool

    @nn.compact
    def __call__(self, x, mask, memory=None, memory_mask=None):
        def dropped(y):
            return nn.Dropout(DROPOUT, deterministic=not self.train)(y)

        y = nn.LayerNorm()(x)
        x += dropped(Attention()(y, y, mask))
        if memory is not None:
            x += dropped(Attention()(nn.LayerNorm()(x), memory, memory_mask))
        y = nn.relu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + dropped(nn.Dense(x.shape[-1])(y))


class Stack(nn.Module):
    """Layers on embedded tokens: an encoder, or with a memory a causal decoder."""

    vocabulary: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, tokens, part, memory=None, memory_part=None, train=False):
        """Maps tokens (rows, length) to features, the decoder to logits of the words.

        A token attends to those of the same part, in the memory as among the tokens.
        """
        normal = nn.initializers.normal(self.width**-0.5)
        table = nn.Embed(self.vocabulary, self.width, embedding_init=normal)
        same = part[:, :, None] == part[:, None]
        before = same & jnp.tri(part.shape[1], dtype=bool)[None]
        # Places are counted from the beginning of the sentence, not of the row.
        speeds = 10_000.0 ** -(jnp.arange(self.width // 2) / (self.width // 2))
        angles = (jnp.sum(before, -1) - 1)[..., None] * speeds[None, None]
        places = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x = self.width**0.5 * table(tokens) + places
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        if memory is None or memory_part is None:
            masks = [same[:, None]]
        else:
            across = part[:, :, None] == memory_part[:, None]
            masks = [before[:, None], memory, across[:, None]]
        for _ in range(self.depth):
            x = Layer(train)(x, *masks)
        x = nn.LayerNorm()(x)
        # The output layer is the embedding.
        return x if memory is None else table.attend(x)


class Transformer(nn.Module):
    """An encoder and a decoder, of so many words."""

    words: tuple[int, ...]
    width: int
    depth: int

    def setup(self):
        stacks = (Stack(words, self.width, self.depth) for words in self.words)
        self.encoder, self.decoder = stacks

    def __call__(self, source, source_part, inputs, part, train=False):
        memory = self.encoder(source, source_part, train=train)
        return self.decoder(inputs, part, memory, source_part, train)


def score(model, params, pairs, key=None):
    """Returns means over tokens: cross-entropy, smoothed and plain, and accuracy."""
    rngs = {} if key is None else {"dropout": key}
    logits = model.apply(params, *pairs[:4], key is not None, rngs=rngs)
    logit = jnp.take_along_axis(logits, pairs.labels[..., None], -1)[..., 0]
    total, used = jax.nn.logsumexp(logits, axis=-1), pairs.part > 0
    smoothed = (1 - SMOOTHING) * logit + SMOOTHING * jnp.mean(logits, -1)
    found = total - smoothed, total - logit, logit == jnp.max(logits, -1)
    return [jnp.sum(values * used) / jnp.sum(used) for values in found]


def translate(model, params, sources):
    """Returns greedy translations (sentences, LONGEST); each pass settles one word."""

    def one(source):
        part, never = (source != PAD).astype(int), jnp.array([PAD, UNKNOWN])

        def say(inputs, _):
            args = source[None], part[None], inputs[None], jnp.ones((1, LONGEST), int)
            logits = model.apply(params, *args)[0].at[:, never].set(-jnp.inf)
            words = jnp.argmax(logits, -1)
            return jnp.roll(words, 1).at[0].set(EOS), words

        begin = jnp.full(LONGEST, EOS)
        return jax.lax.scan(say, begin, length=LONGEST)[1][-1]

    return jax.lax.map(one, sources, batch_size=100)


def training(method, gradients, corpus, options):
    """Returns jitted `train(rho, rate, seed)`: validation score, and translations."""
    steps = gradients // methods.METHODS[method].passes
    pairs, val, sources = jax.tree.map(jnp.asarray, corpus[:3])
    sizes = tuple(map(len, corpus[-1]))
    model = Transformer(sizes, options.width, options.depth)

    schedule = optax.warmup_cosine_decay_schedule(0, 1, steps // 10, steps)

    def loss(*args):
        return score(model, *args)[0]

    @jax.jit
    def train(rho, rate, seed):
        optimizer = optax.adamw(
            lambda t: rate * schedule(t), b2=0.98, weight_decay=1e-4
        )
        stepper = methods.stepper(method, loss, optimizer, rho)

        def step(carry, key):
            rows_key, dropout_key = jax.random.split(key)
            rows = jax.random.randint(rows_key, (options.batch,), 0, len(pairs.part))
            batch = jax.tree.map(lambda leaf: leaf[rows], pairs)
            return tuple(stepper.step(*carry, batch, dropout_key)[1:]), None

        keys = jax.random.split(jax.random.key(seed), steps + 1)
        params = model.init(keys[0], *(leaf[:1] for leaf in val[:4]))
        carry = params, stepper.init(params)
        params = stepper.weights(*jax.lax.scan(step, carry, keys[1:])[0])
        return score(model, params, val), translate(model, params, sources)

    return train


def tries(name, attempt):
    """Makes five tries with the first seed, and returns the best."""

    def accuracies(points):
        return [attempt(**point)["validation accuracy"] for point in points]

    points = [{"rho": 0.0, "rate": rate} for rate in RATES]
    if name not in ("base", HALF):
        radii = RADII.get(name.split(", ")[-1], (0.03, 0.1, 0.3))
        points = [{"rho": rho, "rate": RATES[2]} for rho in radii]
        rho = methods.choose(points, accuracies(points))["rho"]
        points += [{"rho": rho, "rate": rate} for rate in (RATES[1], RATES[3])]
    return methods.choose(points, accuracies(points))


def report(results, options):
    """Prints what the best try of each method is worth."""

    def chosen(axis):
        return lambda _, f: f"{f[0][axis]:g}{'*' * (axis in ' '.join(f[0]['edges']))}"

    def values(what, *form):
        return lambda _, found: show.cell([run[what] for run in found[1]], *form)

    columns = {
        "method": lambda name, _: name.replace("base", "Adam"),
        "rho": chosen("rho"),
        "learning\nrate": chosen("rate"),
        "validation\nloss": values("validation loss", ".3f"),
        "token\naccuracy, %": values("validation accuracy", ".1f", 100),
        "test\nBLEU": values("test BLEU"),
    }
    title = f"{options.gradients} gradients a run, {options.seeds} seeds"
    caption = "Mean ± standard error. * at an edge of the tries."
    show.report(title, results, columns, caption, first=22)


def draw(results, path):
    """Draws the BLEU of every run."""
    title = "Captions, German to English: a second gradient is better spent on a step"
    fig, axes = show.figure(1, 1, title, figsize=(10, 4.4))
    for at, (name, (_, runs)) in enumerate(results.items()):
        show.dots(axes[0][0], at, [run["test BLEU"] for run in runs], name)
    names = [name.replace("base", "Adam").replace(", ", ",\n") for name in results]
    axes[0][0].set_xticks(range(len(names)), names)
    axes[0][0].set_title("Test BLEU")
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"gradients": 8, "seeds": 2, "batch": 2, "width": 8, "depth": 1},
        "methods": ["base", "Fisher SAM, squared, relative", HALF],
    },
    data_dir=pathlib.Path("data/multi30k"),
    methods={"default": METHODS, "choices": METHODS},
    gradients={"default": 1800, "help": "of one run, an even number"},
    seeds=3,
    batch={"default": 16, "help": f"rows of {ROW} tokens"},
    width=64,
    depth=2,
)
def main(run: harness.Run) -> None:
    options, results, bleu = run.options, {}, BLEU(lowercase=True)
    read = (
        captions.made_up if options.smoke else partial(captions.read, options.data_dir)
    )
    corpus = cache(lambda: prepare(read()))

    @cache
    def compiled(method, gradients):
        return training(method, gradients, corpus(), options)

    def attempt(name, rho, rate, seed=0):
        method = "base" if name == HALF else name
        gradients = options.gradients // (2 if name == HALF else 1)

        def compute():
            (_, loss, right), outputs = compiled(method, gradients)(rho, rate, seed)
            *_, references, (_, words) = corpus()
            texts = [in_words(row, words) for row in np.asarray(outputs)]
            found = {"validation loss": loss, "validation accuracy": right}
            found["test BLEU"] = bleu.corpus_score(texts, [references]).score
            return found | {"signature": str(bleu.get_signature())}

        point = {"rho": rho, "rate": rate, "seed": seed, "gradients": gradients}
        key = run.take("batch width depth")
        return run.cell(compute, method=method, **point, **key)

    for name in options.methods:
        best = tries(name, partial(attempt, name))
        point = {"rho": best["rho"], "rate": best["rate"]}
        runs = [attempt(name, **point, seed=seed) for seed in range(options.seeds)]
        results[name] = best, runs
    report(results, options)
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())
