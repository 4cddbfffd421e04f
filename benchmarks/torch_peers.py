# pyright: reportMissingImports=false
"""Question: what do the same steps and Fisher diagonals cost in PyTorch?

Each row is divided by the plain row of the same model and mode in the same round, as in
`step_time.py` and `fisher_cost.py`: what is compared between libraries is overhead, not
frameworks. It wants an environment of its own:

    pip install torch==2.13.0 numpy packaging rich
    pip install --no-deps backpack-for-pytorch unfoldNd einops pytorch_optimizer
    python benchmarks/torch_peers.py

`torch.compile` is used for the steps where it works. BackPACK: diagonals by the
extensions SumGradSquared (empirical), DiagGGNMC (one drawn label) and DiagGGNExact.
"""

import statistics
import sys
import time
from functools import partial

import harness
import show
import torch
from torch import nn


def mlp():
    first, second = nn.Linear(784, 512), nn.Linear(512, 512)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(512, 10))


def cnn():
    layers = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def normalized(before, features, size, stride=1):
    convolution = nn.Conv2d(
        before, features, size, stride, padding=size // 2, bias=False
    )
    return [convolution, nn.BatchNorm2d(features)]


class Block(nn.Module):
    """Two convolutions and a shortcut, as in `models.ResNet`."""

    def __init__(self, before, features, stride):
        super().__init__()
        first = normalized(before, features, 3, stride)
        second = normalized(features, features, 3)
        self.path = nn.Sequential(*first, nn.ReLU(), *second)
        self.relu = nn.ReLU()
        short = normalized(before, features, 1, stride) if stride > 1 else []
        self.shortcut = nn.Sequential(*short)

    def forward(self, x):
        return self.relu(self.path(x) + self.shortcut(x))


def resnet():
    stem = [*normalized(3, 16, 3), nn.ReLU()]
    blocks, before = [], 16
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            blocks.append(Block(before, 16 * 2**stage, stride))
            before = 16 * 2**stage
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    # Fixed BatchNorm statistics.
    return nn.Sequential(*stem, *blocks, *head).eval()


class Transformer(nn.Module):
    """Two pre-norm encoder blocks over tokens, and a linear layer on their mean."""

    def __init__(self, length=64, width=128, heads=4, vocabulary=1000):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation=partial(nn.functional.gelu, approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens):
        x = self.blocks(self.embedding(tokens) + self.positions)
        return self.head(self.norm(x).mean(1))


PROBLEMS = {
    "mlp": (mlp, (784,), 128),
    "mlp-512": (mlp, (784,), 512),
    "cnn": (cnn, (3, 32, 32), 128),
    "resnet": (resnet, (3, 32, 32), 32),
    "transf.": (Transformer, (64,), 32),
    "tiny": (mlp, (784,), 4),
}


def ratios(runs, repeats):
    """Returns the median time of each run relative to the first in the same round."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    pairs = {name: zip(record, first, strict=True) for name, record in times.items()}
    return {n: statistics.median(t / b for t, b in of) for n, of in pairs.items()}


def diagonals(make, x, y, repeats):
    """Returns the cost of BackPACK's diagonals beside a gradient."""
    from backpack import backpack, extend, extensions

    plain, model = make(), extend(make(), use_converter=make is resnet).eval()
    loss_fn = nn.CrossEntropyLoss()
    extended_loss = extend(nn.CrossEntropyLoss())

    def gradient():
        plain.zero_grad()
        loss_fn(plain(x), y).backward()

    def with_extension(extension):
        def run():
            model.zero_grad()
            with backpack(extension):
                extended_loss(model(x), y).backward()

        return run

    runs, failed = {"gradient": gradient}, {}
    for name, extension in {
        "gradient and empirical (SumGradSquared)": extensions.SumGradSquared(),
        "gradient and one drawn label (DiagGGNMC)": extensions.DiagGGNMC(),
        "gradient and exact (DiagGGNExact)": extensions.DiagGGNExact(),
    }.items():
        run = with_extension(extension)
        try:
            run()
            for parameter, value in model.named_parameters():
                # Layers that it does not know are left out with a warning.
                if not hasattr(value, extension.savefield):
                    raise NotImplementedError(f"no diagonal of {parameter}")
        except Exception as error:
            failed[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        else:
            runs[name] = run
    return {**ratios(runs, repeats), **failed}


def steps(make, x, y, repeats, compiled):
    """Returns the cost of SAM steps beside the base step."""
    from pytorch_optimizer import SAM

    loss_fn = nn.CrossEntropyLoss()

    def forward(model):
        return loss_fn(model(x), y)

    if compiled:
        forward = torch.compile(forward)

    def base():
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def run():
            for _ in range(10):
                optimizer.zero_grad()
                forward(model).backward()
                optimizer.step()

        return run

    def sam(**options):
        model = make()
        optimizer = SAM(
            model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9, **options
        )

        def run():
            for _ in range(10):
                forward(model).backward()
                optimizer.first_step(zero_grad=True)
                forward(model).backward()
                optimizer.second_step(zero_grad=True)

        return run

    def official_asam(rho=0.5, eta=0.01):
        """The official ASAM algorithm, for weights and biases."""
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        named = list(model.named_parameters())

        def run():
            for _ in range(10):
                optimizer.zero_grad()
                forward(model).backward()
                with torch.no_grad():
                    scaled, norms = [], []
                    for name, p in named:
                        t = p.abs().add_(eta) if "weight" in name else None
                        tg = p.grad if t is None else p.grad * t
                        norms.append(tg.norm())
                        scaled.append(tg if t is None else tg * t)
                    scale = rho / (torch.stack(norms).norm() + 1e-16)
                    eps = [s.mul_(scale) for s in scaled]
                    for (_, p), e in zip(named, eps, strict=True):
                        p.add_(e)
                forward_again(model)
                with torch.no_grad():
                    for (_, p), e in zip(named, eps, strict=True):
                        p.sub_(e)
                optimizer.step()

        def forward_again(model):
            optimizer.zero_grad(set_to_none=True)
            forward(model).backward()

        return run

    runs = {
        "base step": base(),
        "pytorch_optimizer SAM": sam(rho=0.05),
        "pytorch_optimizer SAM, adaptive": sam(rho=0.5, adaptive=True),
        "ASAM, the official algorithm": official_asam(),
    }
    return ratios(runs, repeats)


def everything(name, repeats):
    """Returns the facts of a model."""
    torch.manual_seed(0)
    make, shape, batch = PROBLEMS[name]
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    if make is Transformer:
        x = torch.randint(1000, (batch, *shape))
    found = {}
    for group, measured in {
        "diagonals": partial(diagonals, make, x, y, repeats),
        "steps, eager": partial(steps, make, x, y, repeats, False),
        "steps, compile": partial(steps, make, x, y, repeats, True),
    }.items():
        try:
            found[group] = measured()
        except Exception as error:  # No compiler on this machine, for instance.
            text = f"failed: {type(error).__name__}: {str(error)[:200]}"
            found[group] = {"all": text}
    return found


def experiment(run: harness.Run) -> None:
    """Measures what the results do not hold, and prints the table."""
    options = run.options
    torch.set_num_threads(options.threads)
    settings = run.take("threads repeats")
    results = {
        name: run.cell(everything, name, options.repeats, model=name, **settings)
        for name in options.models
    }
    for group in ("diagonals", "steps, eager", "steps, compile"):
        rows = []
        for row in dict.fromkeys(row for r in results.values() for row in r[group]):
            cells = [r[group].get(row, "-") for r in results.values()]
            cells = [f"{c:.2f}" if isinstance(c, float) else c[:6] for c in cells]
            rows.append([row, *cells])
        title = f"PyTorch, {group}: time relative to the first row"
        show.table(title, ["", *results], rows)


main = harness.script(
    *(__doc__, experiment),
    smoke={"models": ["tiny"], "repeats": 2},
    models={"default": [*PROBLEMS][:-1], "choices": PROBLEMS},
    threads=torch.get_num_threads(),
    repeats=11,
)


if __name__ == "__main__":
    sys.exit(main())
