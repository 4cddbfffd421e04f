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

The folder holds train, val and test_2016_flickr, each as `.de.gz` and `.en.gz`, one
sentence a line. Smoke mode makes up its text.
"""

import collections
import pathlib
import re
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import show
from captions import made_up, read
from sacrebleu.metrics.bleu import BLEU


WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
PAD, EOS, UNKNOWN = range(3)  # EOS also begins the input of the decoder.
MIN_COUNT = 3  # of a word that is known
ROW, LONGEST = 64, 32  # tokens of a row, and of a translation
HEADS = 4
DROPOUT, SMOOTHING, WARM_UP = 0.1, 0.1, 0.1
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
# In the middle the choices of Kwon et al., and one of Fisher SAM that raises the loss
# as much as that of ASAM.
RADII = {"ASAM": (0.06, 0.2, 0.6), "relative": (0.06, 0.2, 0.6)}
RADII |= {"absolute": (0.005, 0.015, 0.05), "MSAM": (0.2, 0.6, 1.8)}
# The loss is no likelihood: its labels are smoothed, without an array of words a token.
NAMES = [name for name in methods.METHODS if "empirical" not in name]


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


def tokens(text: str) -> list[str]:
    """Returns words and marks in lower case; a word keeps its hyphens."""
    return WORD.findall(text.lower())


def vocabulary(texts: Sequence[str]) -> list[str]:
    """Returns the special tokens and the words that are not too rare."""
    counts = collections.Counter(word for text in texts for word in tokens(text))
    known = (word for word, count in counts.most_common() if count >= MIN_COUNT)
    return ["<pad>", "</s>", "<unk>", *known]


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

    def packed(pairs):
        return pack(
            [(encode(source, 0), encode(target, 1)) for source, target in pairs]
        )

    sources = [encode(source, 0) for source, _ in test]
    padded = np.full((len(test), max(map(len, sources))), PAD, np.int32)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = source
    references = [target for _, target in test]
    made = packed(train), packed(val)
    return Corpus(*made, padded, references, words[1], len(words[0]))


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
    """Sizes of a transformer; its output layer is the embedding of the target.

    A key, where there is one, switches dropout on.
    """

    source_size: int
    target_size: int
    width: int
    depth: int

    def stacks(self, train=False):
        """Returns encoder and decoder."""
        sizes = self.source_size, self.target_size
        return [Stack(size, self.width, self.depth, train) for size in sizes]

    def init(self, key, pairs):
        """Returns parameters."""
        keys, (encoder, decoder) = jax.random.split(key), self.stacks()
        source, target = pairs[:2], (pairs.inputs, pairs.part)
        memory, variables = encoder.init_with_output(keys[0], *source)
        decoded = decoder.init(keys[1], *target, memory, pairs.source_part)
        return {"encoder": variables["params"], "decoder": decoded["params"]}

    def encode(self, params, source, part, key=None):
        """Returns the memory of source sentences."""
        encoder, _ = self.stacks(key is not None)
        variables = {"params": params["encoder"]}
        return encoder.apply(variables, source, part, rngs=dropout(key, 0))

    def decode(self, params, inputs, part, memory, memory_part, key=None):
        """Returns features of each token, to be multiplied with the output layer."""
        _, decoder = self.stacks(key is not None)
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
    """Returns jitted `start(params, rho, rate)`, `advance(...)` and `weights(...)`.

    A call of `advance(carry, key, rho, rate)` is one of `options.rounds`.
    """
    every = options.gradients // (options.rounds * methods.METHODS[method].passes)
    steps = options.rounds * every
    pairs = jax.tree.map(jnp.asarray, corpus.train)

    def loss_fn(params, batch, key):
        x = model.features(params, batch, key)
        losses = smoothed_cross_entropy(params, x, batch.labels)
        used = batch.part > 0
        return jnp.sum(losses * used) / jnp.sum(used)

    def stepper(rho, rate):
        schedule = optax.warmup_cosine_decay_schedule(0, 1, int(WARM_UP * steps), steps)
        optimizer = optax.adamw(
            lambda count: rate * schedule(count), b2=0.98, weight_decay=1e-4
        )
        return methods.stepper(method, loss_fn, optimizer, rho)

    def advance(carry, key, rho, rate):
        def step(carry, key):
            rows_key, dropout_key = jax.random.split(key)
            rows = jax.random.randint(rows_key, (options.batch,), 0, len(pairs.part))
            batch = jax.tree.map(lambda leaf: leaf[rows], pairs)
            _, *carry = stepper(rho, rate).step(*carry, batch, dropout_key)
            return tuple(carry), None

        return jax.lax.scan(step, carry, jax.random.split(key, every))[0]

    return (
        jax.jit(lambda params, rho, rate: (params, stepper(rho, rate).init(params))),
        jax.jit(advance),
        jax.jit(lambda carry, rho, rate: stepper(rho, rate).weights(*carry)),
    )


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


def trained(compiled, shared, corpus, rounds, rho, rate, seed):
    """Trains one network; returns what there is to know of it."""
    (start, advance, weights), (init, score, translate) = compiled, shared
    keys = jax.random.split(jax.random.key(seed), rounds + 1)
    carry = start(init(keys[0]), rho, rate)
    scores = []
    for key in keys[1:]:
        carry = advance(carry, key, rho, rate)
        scores.append(np.asarray(score(weights(carry, rho, rate)), float))
    outputs = np.asarray(translate(weights(carry, rho, rate)))
    texts = [in_words(row, corpus.words) for row in outputs]
    bleu = BLEU(lowercase=True)
    test = bleu.corpus_score(texts, [corpus.references])
    losses, accuracies = np.round(np.transpose(scores), 4).tolist()
    return {
        "validation loss": losses,
        "validation accuracy": accuracies,
        "test BLEU": round(test.score, 2),
        "signature": str(bleu.get_signature()),
        "a translation": texts[0],
    }


# The experiment.


def tries(method, attempt):
    """Makes five tries with the first seed; returns the best, and all of them."""

    def accuracies(points):
        return [attempt(**point)["validation accuracy"][-1] for point in points]

    if method == "base":
        points = [{"rho": 0.0, "rate": rate} for rate in RATES]
        found = accuracies(points)
    else:
        radii = RADII.get(method.split(", ")[-1], (0.03, 0.1, 0.3))
        points = [{"rho": rho, "rate": RATES[2]} for rho in radii]
        found = accuracies(points)
        rho = methods.choose(points, found)["rho"]
        more = [{"rho": rho, "rate": rate} for rate in (RATES[1], RATES[3])]
        points, found = points + more, found + accuracies(more)
    return methods.choose(points, found), list(zip(points, found, strict=True))


def print_tables(results, options):
    """Prints BLEU, and what the tries found."""
    rows, every = [], []
    for title, (best, tried, runs) in results.items():
        last = [(r["validation loss"][-1], r["validation accuracy"][-1]) for r in runs]
        losses, accuracies = zip(*last, strict=True)
        cells = show.cell(losses, ".3f"), show.cell(accuracies, ".1f", 100)
        cells += (show.cell([run["test BLEU"] for run in runs]),)
        rows.append([title, f"{best['rho']:g}", f"{best['rate']:g}", *cells])
        for point, found in tried:
            cells = f"{point['rho']:g}", f"{point['rate']:g}", f"{found:.1%}"
            every.append([title, *cells])
    headings = ["method", "rho", "learning\nrate", "validation\nloss"]
    headings += ["token\naccuracy, %", "test\nBLEU"]
    title = f"{options.gradients} gradients a run, {options.seeds} seeds"
    show.table(title, headings, rows, "Mean ± standard error.", first=22)
    headings = ["method", "rho", "learning rate", "accuracy"]
    show.table("Tries: validation accuracy of the first seed", headings, every)


def draw(results, options, path):
    """Draws the validation loss along training, and the BLEU of every run."""
    headline = "Captions, German to English: a second gradient is better spent on a "
    fig, axes = show.figure(1, 2, f"{headline}step", figsize=(10, 4.4))
    left, right = axes[0]
    x = options.gradients / options.rounds * np.arange(1, options.rounds + 1)
    losses = []
    for at, (title, (_, _, runs)) in enumerate(results.items()):
        losses.append(np.array([run["validation loss"] for run in runs]))
        look = show.look("base" if title == "Adam" else title)
        left.plot(x, losses[-1].mean(0), label=title, **look, ms=3)
        bleu = [run["test BLEU"] for run in runs]
        show.dots(right, at, bleu, "base" if title == "Adam" else title)
    show.later(left, losses)
    left.set_xlabel("gradients")
    left.set_title("Validation loss, nats per token, mean of the seeds")
    left.legend(fontsize=8)
    names = [title.replace("Fisher SAM, squared, ", "F-SAM\n") for title in results]
    names = [name.replace("Friendly ", "Friendly\n") for name in names]
    right.set_xticks(range(len(results)), names)
    right.set_title("Test BLEU")
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"gradients": 4, "rounds": 2, "seeds": 2, "batch": 2, "width": 8, "depth": 1},
        "methods": ["base", "Fisher SAM, squared, relative"],
    },
    data_dir=pathlib.Path("data/multi30k"),
    methods={
        "default": ["base", "SAM", "ASAM", "Fisher SAM, squared, relative"],
        "choices": NAMES,
    },
    gradients={"default": 1800, "help": "of one run"},
    seeds=3,
    rounds={"default": 10, "help": "looks at validation"},
    batch={"default": 16, "help": f"rows of {ROW} tokens"},
    width=64,
    depth=2,
)
def main(run: harness.Run) -> None:
    options, results = run.options, {}
    if options.gradients % (2 * options.rounds):
        raise SystemExit(f"--gradients must be a multiple of {2 * options.rounds}")

    @cache
    def shared():
        corpus = prepare(made_up() if options.smoke else read(options.data_dir))
        sizes = corpus.source_size, len(corpus.words), options.width, options.depth
        return corpus, Model(*sizes), common(Model(*sizes), corpus)

    @cache
    def compiled(method):
        corpus, model, _ = shared()
        return training(method, model, corpus, options)

    def attempt(method, **point):
        def compute():
            corpus, _, functions = shared()
            made = compiled(method), functions, corpus, options.rounds
            return trained(*made, **point)

        settings = run.take("gradients rounds batch width depth")
        return run.cell(compute, method=method, **point, **settings)

    for method in options.methods:
        best, tried = tries(method, partial(attempt, method, seed=0))
        point = {"rho": best["rho"], "rate": best["rate"]}
        runs = [attempt(method, seed=s, **point) for s in range(options.seeds)]
        results["Adam" if method == "base" else method] = best, tried, runs
    print_tables(results, options)
    draw(results, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())
