# pyright: reportMissingImports=false
"""Question: what do the same steps cost in PyTorch?

Each row is divided by the plain row of the same model and mode in the same round, as in
`step_time.py`: what is compared between libraries is overhead, not frameworks. It wants
an environment of its own:

    pip install torch==2.13.0+cpu flax rich .
    pip install --no-deps pytorch_optimizer
    python benchmarks/torch_peers.py

`torch.compile` is used where it works.
"""

import sys
from functools import partial

import cost
import harness
import show
from peer_models import cnn, mlp, resnet, torch


nn = torch.nn


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
    # Fixed BatchNorm statistics.
    "resnet": (lambda: resnet().eval(), (3, 32, 32), 32),
    "transf.": (Transformer, (64,), 32),
    "tiny": (mlp, (784,), 4),
}


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
    return {n: facts["ratio"] for n, facts in cost.ratios(runs, repeats).items()}


def everything(name, repeats):
    """Returns the facts of a model."""
    torch.manual_seed(0)
    make, shape, batch = PROBLEMS[name]
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    if make is Transformer:
        x = torch.randint(1000, (batch, *shape))
    found = {}
    for group, measured in {
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
    for group in ("steps, eager", "steps, compile"):
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
