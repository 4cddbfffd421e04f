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
        gelu = partial(nn.functional.gelu, approximate="tanh")
        options = {"activation": gelu, "batch_first": True, "norm_first": True}
        sizes = width, heads, 4 * width
        block = nn.TransformerEncoderLayer(*sizes, dropout=0.0, **options)
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
GROUPS = {"steps, eager": False, "steps, compile": True}


def steps(make, x, y, repeats, compiled):
    """Returns the cost of SAM steps beside the base step."""
    from pytorch_optimizer import SAM

    loss_fn, sgd = nn.CrossEntropyLoss(), {"lr": 0.01, "momentum": 0.9}

    def forward(model):
        return loss_fn(model(x), y)

    if compiled:
        forward = torch.compile(forward)

    def base(model):
        optimizer = torch.optim.SGD(model.parameters(), **sgd)

        def step():
            optimizer.zero_grad()
            forward(model).backward()
            optimizer.step()

        return step

    def sam(model, **options):
        optimizer = SAM(model.parameters(), torch.optim.SGD, **sgd, **options)

        def step():
            forward(model).backward()
            optimizer.first_step(zero_grad=True)
            forward(model).backward()
            optimizer.second_step(zero_grad=True)

        return step

    def official_asam(model, rho=0.5, eta=0.01):
        """The official ASAM algorithm, for weights and biases."""
        optimizer = torch.optim.SGD(model.parameters(), **sgd)
        named = list(model.named_parameters())

        def step():
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
            optimizer.zero_grad(set_to_none=True)
            forward(model).backward()
            with torch.no_grad():
                for (_, p), e in zip(named, eps, strict=True):
                    p.sub_(e)
            optimizer.step()

        return step

    def ten(step):
        for _ in range(10):
            step()

    runs = {
        "base step": base(make()),
        "pytorch_optimizer SAM": sam(make(), rho=0.05),
        "pytorch_optimizer SAM, adaptive": sam(make(), rho=0.5, adaptive=True),
        "ASAM, the official algorithm": official_asam(make()),
    }
    runs = {name: partial(ten, step) for name, step in runs.items()}
    return {n: facts["ratio"] for n, facts in cost.ratios(runs, repeats).items()}


def everything(name, repeats):
    """Returns the facts of a model."""
    torch.manual_seed(0)
    make, shape, batch = PROBLEMS[name]
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    if make is Transformer:
        x = torch.randint(1000, (batch, *shape))
    found = {}
    for group, compiled in GROUPS.items():
        try:
            found[group] = steps(make, x, y, repeats, compiled)
        except Exception as error:  # No compiler on this machine, for instance.
            text = f"failed: {type(error).__name__}: {str(error)[:200]}"
            found[group] = {"all": text}
    return found


@harness.experiment(
    smoke={"models": ["tiny"], "repeats": 2},
    models={"default": [*PROBLEMS][:-1], "choices": PROBLEMS},
    threads=torch.get_num_threads(),
    repeats=11,
)
def main(run: harness.Run) -> None:
    options = run.options
    torch.set_num_threads(options.threads)
    settings = run.take("threads repeats")
    args = everything, options.repeats
    results = run.each("model", options.models, *args, **settings)
    for group in GROUPS:
        rows = []
        for row in dict.fromkeys(row for r in results.values() for row in r[group]):
            cells = [r[group].get(row, "-") for r in results.values()]
            cells = [f"{c:.2f}" if isinstance(c, float) else c[:6] for c in cells]
            rows.append([row, *cells])
        title = f"PyTorch, {group}: time relative to the first row"
        show.table(title, ["", *results], rows)


if __name__ == "__main__":
    raise SystemExit(main())
