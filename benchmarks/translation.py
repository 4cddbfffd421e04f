"""Question: does SAM, ASAM or Fisher SAM translate better than Adam?

After the translation experiment of Kwon et al. 2021 (https://arxiv.org/abs/2102.11600),
with captions of images, German to English, in place of IWSLT'14: Multi30k (Elliott et
al. 2016, https://arxiv.org/abs/1605.00459). A small transformer learns from 29,000
pairs of sentences. Every method spends the same number of gradients, so that Adam takes
twice as many steps, and makes five tries, with the first seed: Adam of learning rates,
the others of three radii at the middle one of these and then, with the best radius, of
the rates beside it. The try with the greatest token accuracy on the validation set is
repeated with the other seeds.

Text is in lower case; rare words are unknown to the model, which never says so but
says another word. BLEU compares greedy translations of the test set of 2016, marks put
back to their words, with references in lower case. Its signature is in the results.

    python benchmarks/translation.py --data-dir FOLDER
    python benchmarks/translation.py --smoke              # made-up text, to see it run

The folder holds train, val and test_2016_flickr, each as `.de.gz` and `.en.gz`, one
sentence a line. Finished runs are kept in the results; the same command goes on from
there.
"""

import argparse
import collections
import gzip
import pathlib
import re
import statistics
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import finished, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sacrebleu.metrics.bleu import BLEU

import fsam_optax as fsam


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "translation.json"
FIGURE = HERE / "figures" / "translation.png"
PARTS = {"train": 29_000, "val": 1014, "test_2016_flickr": 1000}
NEEDED = (
    "--data-dir must name a folder with the files "
    + ", ".join(f"{part}.{language}.gz" for part in PARTS for language in ("de", "en"))
    + ": one sentence a line, as in data/task1/raw of the repository multi30k/dataset "
    "on GitHub. --smoke needs no files."
)
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
PAD, EOS, UNKNOWN = range(3)  # EOS also begins the input of the decoder.
SPECIAL = ("<pad>", "</s>", "<unk>")
MIN_COUNT = 3
ROW = 64  # tokens
LONGEST = 32  # tokens of a translation
BATCH = 16  # rows, of about 70 pairs
HEADS = 4
DROPOUT = 0.1
SMOOTHING = 0.1
WARM_UP = 0.1
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
BALLS = {
    "Adam": None,
    "SAM": fsam.euclidean_ball,
    "ASAM": fsam.adaptive_ellipsoid,
    "Fisher SAM": partial(fsam.fisher_ellipsoid, estimator=fsam.squared_gradient()),
}
RADII = {
    # In the middle the choices of Kwon et al., and one of Fisher SAM that raises the
    # loss as much as that of ASAM.
    "SAM": (0.03, 0.1, 0.3),
    "ASAM": (0.06, 0.2, 0.6),
    "Fisher SAM": (0.06, 0.2, 0.6),
}
COLORS = dict(zip(BALLS, ("#000000", "#0072B2", "#D55E00", "#009E73"), strict=True))
STYLES = dict(zip(BALLS, ("-", "--", "-.", ":"), strict=True))


# Text.


class Pairs(NamedTuple):
    """Sentence pairs, several to a row, so that little is computed on padding.

    The decoder sees `inputs`, EOS and the words, and has to say `labels`, the words and
    EOS. All fields have shape (rows, tokens).
    """

    source: np.ndarray
    source_part: np.ndarray  # which pair of the row, from 1 on; 0 is padding
    inputs: np.ndarray
    labels: np.ndarray
    part: np.ndarray


class Corpus(NamedTuple):
    """All text, in numbers, and what is needed to read a translation."""

    train: Pairs
    val: Pairs
    test: np.ndarray  # source sentences, padded
    references: list[str]
    words: list[str]  # of the target, by number
    source_size: int


def read(folder: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
    """Returns the pairs of lines of each part."""
    found = {}
    for part, size in PARTS.items():
        sides = []
        for language in ("de", "en"):
            path = folder / f"{part}.{language}.gz"
            if not path.exists():
                raise SystemExit(f"There is no {path}; {NEEDED}")
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                sides.append([line.strip() for line in file])
            if len(sides[-1]) != size:
                raise SystemExit(f"{path} has {len(sides[-1])} lines, expected {size}")
        found[part] = list(zip(*sides, strict=True))
    return found


def made_up() -> dict[str, list[tuple[str, str]]]:
    """Returns numbers in words, to be put into other words and the opposite order."""
    german = "null eins zwei drei vier fünf sechs sieben acht neun".split()
    english = "zero one two three four five six seven eight nine".split()
    random = np.random.default_rng(0)

    def pair():
        digits = random.integers(0, 10, random.integers(4, 9)).tolist()
        return (
            " ".join(german[d] for d in digits) + ".",
            " ".join(english[d] for d in reversed(digits)) + ".",
        )

    sizes = zip(PARTS, (200, 20, 20), strict=True)
    return {part: [pair() for _ in range(size)] for part, size in sizes}


def tokens(text: str) -> list[str]:
    """Returns words and marks in lower case; a word keeps its hyphens."""
    return WORD.findall(text.lower())


def vocabulary(texts: Sequence[str]) -> list[str]:
    """Returns the special tokens and the words that are not too rare."""
    counts = collections.Counter(word for text in texts for word in tokens(text))
    return [*SPECIAL, *(w for w, count in counts.most_common() if count >= MIN_COUNT)]


def pack(pairs: Sequence[tuple[list[int], list[int]]]) -> Pairs:
    """Lays each pair into the first of the latest rows with room for both sides."""
    rows, room = [], []
    for pair in pairs:
        need = np.array([len(pair[0]), len(pair[1]) + 1])
        latest = range(max(0, len(rows) - 32), len(rows))
        at = next((i for i in latest if np.all(need <= room[i])), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(np.array([ROW, ROW]))
        rows[at].append(pair)
        room[at] -= need
    packed = Pairs(*(np.full((len(rows), ROW), PAD, np.int32) for _ in Pairs._fields))
    for i, row in enumerate(rows):
        start = end = 0
        for number, (source, target) in enumerate(row, 1):
            here = i, slice(start, start + len(source))
            packed.source[here], packed.source_part[here] = source, number
            there = i, slice(end, end + len(target) + 1)
            packed.inputs[there], packed.labels[there] = [EOS, *target], [*target, EOS]
            packed.part[there] = number
            start, end = here[1].stop, there[1].stop
    return packed


def prepare(text: dict[str, list[tuple[str, str]]]) -> Corpus:
    """Turns text into numbers."""
    train, val, test = text.values()
    words = [vocabulary(side) for side in zip(*train, strict=True)]
    numbers = [{word: i for i, word in enumerate(side)} for side in words]

    def encode(text, side):
        # What a row cannot hold is cut off; no sentence of Multi30k is as long.
        known = numbers[side]
        return [known.get(word, UNKNOWN) for word in tokens(text)][: ROW - 1]

    def encoded(pairs):
        return [(encode(source, 0), encode(target, 1)) for source, target in pairs]

    sources = [encode(source, 0) for source, _ in test]
    padded = np.full((len(test), max(map(len, sources))), PAD, np.int32)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = source
    return Corpus(
        train=pack(encoded(train)),
        val=pack(encoded(val)),
        test=padded,
        references=[target for _, target in test],
        words=words[1],
        source_size=len(words[0]),
    )


def in_words(numbers: np.ndarray, words: list[str]) -> str:
    """Returns the text up to the first EOS, marks put next to their words."""
    found = numbers.tolist()
    found = found[: found.index(EOS)] if EOS in found else found
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words[i] for i in found))


# Model.


class Attention(nn.Module):
    """Of the places of x, with several heads, to those of a memory."""

    @nn.compact
    def __call__(self, x, memory, mask):
        width = x.shape[-1]
        query = nn.Dense(width, use_bias=False)(x)
        # One product in place of two is faster.
        key, value = jnp.split(nn.Dense(2 * width, use_bias=False)(memory), 2, -1)
        heads = (y.reshape(*y.shape[:2], HEADS, -1) for y in (query, key, value))
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
    train: bool = False

    @nn.compact
    def __call__(self, tokens, part, memory=None, memory_part=None):
        """Maps tokens (rows, length) to features (rows, length, width).

        A token attends to those of the same part, in the memory as among the tokens.
        """
        normal = nn.initializers.normal(self.width**-0.5)
        table = nn.Embed(self.vocabulary, self.width, embedding_init=normal)
        same = part[:, :, None] == part[:, None]
        before = same & jnp.tri(part.shape[1], dtype=bool)[None]
        # Places are counted from the beginning of the sentence, not of the row.
        x = self.width**0.5 * table(tokens)
        x += sinusoids(jnp.sum(before, -1) - 1, self.width)
        x = nn.Dropout(DROPOUT, deterministic=not self.train)(x)
        masks = [(same if memory is None else before)[:, None]]
        if memory is not None and memory_part is not None:
            masks += [memory, (part[:, :, None] == memory_part[:, None])[:, None]]
        for _ in range(self.depth):
            x = Layer(self.train)(x, *masks)
        return nn.LayerNorm()(x)


def sinusoids(places, width):
    """Returns sines and cosines of places, of wavelengths from 2 pi to 10,000 of it."""
    speeds = 10_000.0 ** -(jnp.arange(width // 2) / (width // 2))
    angles = places[..., None] * speeds[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Model(NamedTuple):
    """Sizes of a transformer; its output layer is the embedding of the target."""

    source_size: int
    target_size: int
    width: int
    depth: int

    def init(self, key, pairs):
        """Returns parameters."""
        keys = jax.random.split(key)
        encoder = Stack(self.source_size, self.width, self.depth)
        decoder = Stack(self.target_size, self.width, self.depth)
        source = pairs.source, pairs.source_part
        memory, encoder_variables = encoder.init_with_output(keys[0], *source)
        decoder_variables = decoder.init(
            keys[1], pairs.inputs, pairs.part, memory, pairs.source_part
        )
        return {
            "encoder": encoder_variables["params"],
            "decoder": decoder_variables["params"],
        }

    def encode(self, params, source, part, key=None):
        """Returns the memory of source sentences; a key switches dropout on."""
        encoder = Stack(self.source_size, self.width, self.depth, key is not None)
        variables = {"params": params["encoder"]}
        return encoder.apply(variables, source, part, rngs=dropout(key, 0))

    def decode(self, params, inputs, part, memory, memory_part, key=None):
        """Returns features of each token, to be multiplied with the output layer."""
        decoder = Stack(self.target_size, self.width, self.depth, key is not None)
        args = inputs, part, memory, memory_part
        variables = {"params": params["decoder"]}
        return decoder.apply(variables, *args, rngs=dropout(key, 1))

    def features(self, params, pairs, key=None):
        """Returns those of all tokens of sentence pairs."""
        memory = self.encode(params, pairs.source, pairs.source_part, key)
        target = pairs.inputs, pairs.part
        return self.decode(params, *target, memory, pairs.source_part, key)


def dropout(key, which):
    """Returns the random keys of encoder or decoder, none in evaluation."""
    return {} if key is None else {"dropout": jax.random.fold_in(key, which)}


def output_layer(params):
    """Returns the embedding of the target, shape (words, width)."""
    return params["decoder"]["Embed_0"]["embedding"]


def smoothed_cross_entropy(params, x, labels):
    """Returns that of features x, in nats, token by token."""
    table = output_layer(params)
    # The mean of the logits, in the smoothed part, is the logit of the mean word: only
    # one sum runs over the whole vocabulary, where most of the time goes.
    mean = jnp.mean(table, 0)[None, None]
    expected = (1 - SMOOTHING) * table[labels] + SMOOTHING * mean
    return jax.nn.logsumexp(x @ table.T, axis=-1) - jnp.sum(x * expected, -1)


# Training.


def training(method, model, corpus, options):
    """Returns `start(params, rho, rate)` and jitted `advance(carry, key, rho, rate)`.

    A call of `advance` is one of `options.rounds`; the carry begins with parameters.
    """
    per_step = 1 if method == "Adam" else 2
    every = options.gradients // (options.rounds * per_step)
    pairs = jax.tree.map(jnp.asarray, corpus.train)

    def loss_fn(params, batch, key):
        x = model.features(params, batch, key)
        losses = smoothed_cross_entropy(params, x, batch.labels)
        used = batch.part > 0
        return jnp.sum(losses * used) / jnp.sum(used)

    def of(rho, rate):
        steps = options.rounds * every
        schedule = optax.warmup_cosine_decay_schedule(0, 1, int(WARM_UP * steps), steps)
        optimizer = optax.adamw(
            lambda count: rate * schedule(count), b2=0.98, weight_decay=1e-4
        )
        if method == "Adam":
            plain = jax.value_and_grad(loss_fn)

            def no_perturbation(params, state, *args):
                return *plain(params, *args), state

            return optimizer, lambda params: (), no_perturbation
        oracle = fsam.value_and_grad(loss_fn, BALLS[method](rho), metrics=False)
        return optimizer, oracle.init, oracle

    def start(params, rho, rate):
        optimizer, oracle_init, _ = of(rho, rate)
        return params, oracle_init(params), optimizer.init(params)

    def advance(carry, key, rho, rate):
        optimizer, _, oracle = of(rho, rate)

        def step(carry, key):
            params, state, opt_state = carry
            rows_key, dropout_key = jax.random.split(key)
            rows = jax.random.randint(rows_key, (options.batch,), 0, len(pairs.part))
            batch = jax.tree.map(lambda leaf: leaf[rows], pairs)
            _, grads, state = oracle(params, state, batch, dropout_key)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), None

        return jax.lax.scan(step, carry, jax.random.split(key, every))[0]

    return start, jax.jit(advance)


def common(model, corpus):
    """Returns what all methods share, jitted: `init`, `score` and `translate`.

    `init(key)` returns parameters; `score(params)` cross-entropy, not smoothed, and
    accuracy of the tokens of the validation set; `translate(params)` the test set.
    """
    val = jax.tree.map(jnp.asarray, corpus.val)
    sources = jnp.asarray(corpus.test)

    def init(key):
        return model.init(key, jax.tree.map(lambda leaf: leaf[:1], val))

    def score(params):
        def sums(row):
            row = jax.tree.map(lambda leaf: leaf[None], row)
            logits = model.features(params, row) @ output_layer(params).T
            logit = jnp.take_along_axis(logits, row.labels[..., None], -1)[..., 0]
            losses = jax.nn.logsumexp(logits, axis=-1) - logit
            right = logit == jnp.max(logits, -1)  # Faster than argmax.
            used = row.part > 0
            return jnp.stack([jnp.sum(v * used) for v in (losses, right, 1.0)])

        total = jnp.sum(jax.lax.map(sums, val, batch_size=32), 0)
        return total[:2] / total[2]

    def translate(params):
        never = jnp.array([PAD, UNKNOWN])
        part = jnp.ones((1, LONGEST), jnp.int32)

        def one(source):
            source_part = (source != PAD).astype(jnp.int32)[None]
            memory = model.encode(params, source[None], source_part)

            def say(inputs, place):
                x = model.decode(params, inputs, part, memory, source_part)[0, place]
                word = jnp.argmax((output_layer(params) @ x).at[never].set(-jnp.inf))
                # The last word has no place among the inputs, where it is left out.
                return inputs.at[0, place + 1].set(word, mode="drop"), word

            begin = jnp.full((1, LONGEST), PAD).at[0, 0].set(EOS)
            return jax.lax.scan(say, begin, jnp.arange(LONGEST))[1]

        return jax.lax.map(one, sources, batch_size=100)

    return jax.jit(init), jax.jit(score), jax.jit(translate)


def run(compiled, corpus, rounds, seed, rho, rate, advance_bar):
    """Trains one network; returns what there is to know of it."""
    (start, advance), (init, score, translate) = compiled
    keys = jax.random.split(jax.random.key(seed), rounds + 1)
    carry = start(init(keys[0]), rho, rate)
    scores = []
    for key in keys[1:]:
        carry = advance(carry, key, rho, rate)
        scores.append(np.asarray(score(carry[0]), float))
        advance_bar()
    outputs = [in_words(row, corpus.words) for row in np.asarray(translate(carry[0]))]
    bleu = BLEU(lowercase=True)
    test = bleu.corpus_score(outputs, [corpus.references])
    losses, accuracies = np.round(np.transpose(scores), 4).tolist()
    return {
        "validation loss": losses,
        "validation accuracy": accuracies,
        "test BLEU": round(test.score, 2),
        "signature": str(bleu.get_signature()),
        "a translation": outputs[0],
    }


# The experiment.


def name_of(method, rho, rate, seed):
    return f"{method}, rho {rho:g}, rate {rate:g}, seed {seed}"


def tries(method, results):
    """Yields pairs of radius and learning rate; goes on by the results of the first."""
    if method == "Adam":
        yield from ((0.0, rate) for rate in RATES)
        return
    _, slower, middle, faster, _ = RATES
    pairs = [(rho, middle) for rho in RADII[method]]
    yield from pairs
    rho, _ = best(method, pairs, results)
    yield from ((rho, rate) for rate in (slower, faster))


def best(method, pairs, results):
    """Returns the pair with the greatest accuracy."""

    def accuracy(pair):
        rho, rate = pair
        return results[name_of(method, rho, rate, 0)]["validation accuracy"][-1]

    return max(pairs, key=accuracy)


def chosen(method, results):
    """Returns the pair with the greatest accuracy of all tries."""
    return best(method, tries(method, results), results)


def runs_of(method, results, options):
    """Returns the runs of the chosen pair, one for each seed."""
    rho, rate = chosen(method, results)
    names = (name_of(method, rho, rate, seed) for seed in range(options.seeds))
    return [results[name] for name in names]


def print_tables(results, options, console):
    """Prints BLEU, and what the tries found."""
    table = Table(title=f"{options.gradients} gradients a run, {options.seeds} seeds")
    table.add_column("method")
    for title in (
        *("rho", "learning rate", "validation loss", "validation accuracy, %"),
        "test BLEU",
    ):
        table.add_column(title, justify="right")
    for method in options.methods:
        rho, rate = chosen(method, results)
        runs = runs_of(method, results, options)
        columns = (
            ([r["validation loss"][-1] for r in runs], 3),
            ([100 * r["validation accuracy"][-1] for r in runs], 1),
            ([r["test BLEU"] for r in runs], 1),
        )
        cells = (
            f"{statistics.mean(values):.{digits}f} ± "
            f"{statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"
            for values, digits in columns
        )
        table.add_row(method, f"{rho:g}", f"{rate:g}", *cells)
    console.print(table)
    console.print("Mean ± standard deviation.")
    table = Table(title="Tries: validation accuracy of the first seed, %")
    table.add_column("method")
    table.add_column("rho, learning rate: accuracy")
    for method in options.methods:
        found = (
            (pair, results[name_of(method, *pair, 0)]["validation accuracy"][-1])
            for pair in tries(method, results)
        )
        table.add_row(
            method,
            "   ".join(f"{rho:g}, {rate:g}: {100 * a:.1f}" for (rho, rate), a in found),
        )
    console.print(table)


def draw(results, options, path):
    """Draws the validation loss along training, and the BLEU of every run."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.5, 1))
    rounds = options.rounds
    x = options.gradients / rounds * np.arange(1, rounds + 1)
    lasts = []
    for at, method in enumerate(options.methods):
        runs = runs_of(method, results, options)
        color, style = COLORS[method], STYLES[method]
        losses = np.array([r["validation loss"] for r in runs])
        left.plot(x, losses.mean(0), color=color, ls=style, label=method)
        low, high = losses.min(0), losses.max(0)
        left.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        lasts.append(losses[:, rounds // 4 :])
        bleu = np.array([r["test BLEU"] for r in runs])
        right.plot(np.full(len(bleu), at), bleu, "o", color=color, alpha=0.7, ms=5)
        right.hlines(bleu.mean(), at - 0.25, at + 0.25, color=color)
    # The first quarter, alike for all methods, would flatten the rest.
    low, high = np.nanmin(lasts), np.nanmax(lasts)
    margin = 0.05 * (high - low) or 0.1
    left.set_ylim(low - margin, high + margin)
    left.set_xlabel("gradients")
    left.set_ylabel("validation loss, nats per token")
    left.set_title("mean and range over the seeds", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    right.set_xticks(range(len(options.methods)), options.methods)
    right.set_xlim(-0.5, len(options.methods) - 0.5)
    right.set_ylabel("test BLEU")
    right.set_title("each seed, and their mean", fontsize=10)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--methods", nargs="+", choices=BALLS, default=list(BALLS))
    parser.add_argument("--gradients", type=int, default=1800, help="of one run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="looks at validation")
    parser.add_argument(
        "--batch", type=int, default=BATCH, help=f"rows of {ROW} tokens"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    parser.add_argument("--smoke", action="store_true", help="seconds, to see it run")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.gradients, options.rounds, options.seeds = 4, 2, 2
        options.batch, options.width, options.depth = 2, 8, 1
    elif options.data_dir is None:
        parser.error(NEEDED)
    if options.gradients <= 0 or options.gradients % (2 * options.rounds):
        parser.error(f"--gradients must be a multiple of {2 * options.rounds}")
    about = {
        name: getattr(options, name)
        for name in ("smoke", "gradients", "rounds", "batch", "width", "depth")
    }
    done = finished(options.out, about)
    corpus = prepare(made_up() if options.smoke else read(options.data_dir))
    words = len(corpus.words)
    model = Model(corpus.source_size, words, options.width, options.depth)
    shared = common(model, corpus)
    with Progress(transient=True) as progress:
        runs = len(options.methods) * (len(RATES) + options.seeds - 1)
        task = progress.add_task("", total=runs * options.rounds)
        advance_bar = partial(progress.advance, task)

        def ensure(method, compiled, pair, seed):
            rho, rate = pair
            name = name_of(method, rho, rate, seed)
            progress.update(task, description=name)
            if name in done:
                progress.advance(task, options.rounds)
                return
            done[name] = run(
                compiled, corpus, options.rounds, seed, rho, rate, advance_bar
            )
            save(options.out, name, done[name], **about)

        for method in options.methods:
            compiled = training(method, model, corpus, options), shared
            for pair in tries(method, done):
                ensure(method, compiled, pair, 0)
            for seed in range(1, options.seeds):
                ensure(method, compiled, chosen(method, done), seed)
    print_tables(done, options, Console(width=110))
    draw(done, options, options.figure)


if __name__ == "__main__":
    main()
