"""The loss that knows its model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_function, leaf_shape
from fsam_optax._common.rest import without_rest
from fsam_optax._fisher.labels import Labels, log_likelihood, weigh
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.outputs import Call, check_outputs, count_examples, of_batch


@dataclasses.dataclass(frozen=True)
class NegativeLogLikelihood:
    """A loss that knows its model and its likelihood; see `negative_log_likelihood`.

    Attributes:
        apply_fn: The model, `apply_fn(params, inputs, *args, **kwargs)` on a whole
            batch.
        likelihood: Distribution of the labels given its outputs.
        unpack: Returns `(inputs, targets)` or `(inputs, targets, weights)` of a batch;
            None if the batch is that.
        has_aux: Whether `apply_fn` returns `(outputs, aux)`.
        split_keys: Whether each example folds its row into the keys it is given.
    """

    apply_fn: Callable[..., Any]
    likelihood: Likelihood
    unpack: Callable[[Any], Any] | None = None
    has_aux: bool = False
    split_keys: bool = True
    takes_rest: ClassVar[bool] = False  # The rest of a module is not for `apply_fn`.

    def __call__(self, params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of a batch, or `(loss, aux)`."""
        value, aux = value_of(self, params, parts_of(self, batch), args, kwargs)
        return (value, aux) if self.has_aux else value


def negative_log_likelihood(
    apply_fn: Callable[..., Any],
    likelihood: Likelihood,
    *,
    unpack: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    split_keys: bool = True,
) -> NegativeLogLikelihood:
    """Returns the mean of `-log p(y | h)` over the labels, a loss that knows its model.

        loss = 1/D sum_nt w_nt (-log p(y_nt | h_nt))            D = sum_nt w_nt

    over examples n and, where the model emits several labels for each, positions t.
    D is the one divisor of the loss, its gradient and every Fisher of it:

        F = 1/D sum_n a_n E[(sum_t m_nt s_nt)^2]        a_n = max_t w_nt, m = w / a

    with s_nt the gradient of log p(y_nt | h_nt) by the parameters. So a data set, or
    unequal parts of it weighed by their D, give what one batch of all gives, and the
    exact F is the diagonal of the Gauss-Newton matrix of the loss. What wants sums
    (elastic weight consolidation, Laplace) multiplies by D.

    Weights come with the batch, of examples (N,) or of labels (N, T), and are >= 0,
    which is not checked (they may be traced): 0 hides a label whatever it is, NaN
    included; the inputs must be finite. A batch of weight 0 has loss 0. Shapes of
    labels are checked, never broadcast; see the likelihoods for what labels are.

    PRNG keys among the arguments (typed, legacy, in dicts such as
    `rngs={"dropout": key}`) are folded with the row of each example, which then runs
    by itself: so every pass, that of the loss and those of estimators, draws the same
    masks. `split_keys=False` passes keys whole, for models that mix examples or name
    shardings.

    The value and gradient have their ordinary derivatives, also where the Fisher comes
    from the same pass (`value_and_grad(..., empirical_fisher=True)`); the Fisher
    counts as a constant.

    Args:
        apply_fn: The model, `apply_fn(params, inputs, *args, **kwargs) -> outputs` on a
            whole batch, of shape (N, C) or (N, T, C). For a Fisher it must not mix
            examples, as BatchNorm in training mode does.
        likelihood: Distribution of the labels given the outputs, such as `categorical`.
        unpack: Maps a batch, any pytree, to `(inputs, targets)` or `(inputs, targets,
            weights)`. None if the batch is one of these.
        has_aux: Whether `apply_fn` returns `(outputs, aux)`. Where examples are run
            one by one (keys, a Fisher from the same pass), every leaf of aux must have
            their leading axis, or be the same for all.
        split_keys: Whether each example folds its row into the keys.

    Returns:
        A function `loss(params, batch, *args, **kwargs) -> scalar`, or `(scalar, aux)`,
        in nats per label. Estimators, `explain`, `kl_divergence` and others take it in
        the place of `(apply_fn, likelihood)`.

    Raises:
        TypeError: If apply_fn is no function or likelihood no `Likelihood`; in a call,
            if the batch cannot be unpacked, or labels have a dtype that the likelihood
            does not take.
        ValueError: In a call, if labels, weights or outputs have another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import bernoulli
        >>> def unpack(batch):
        ...     return batch["x"], batch["y"], batch["mask"]
        >>> loss = negative_log_likelihood(lambda w, x: x @ w, bernoulli, unpack=unpack)
        >>> batch = {
        ...     "x": jnp.array([[1.0, 2.0], [0.0, 2.0], [0.0, 0.0]]),
        ...     "y": jnp.array([[1.0], [0.0], [jnp.nan]]),
        ...     "mask": jnp.array([1, 1, 0]),
        ... }
        >>> print(loss(jnp.zeros((2, 1)), batch))  # log 2
        0.6931472
    """
    nll = resolve("negative_log_likelihood", apply_fn, likelihood)
    if unpack is not None:
        check_function("unpack", unpack)
    return dataclasses.replace(
        nll, unpack=unpack, has_aux=has_aux, split_keys=split_keys
    )


def resolve(caller: str, model: Any, likelihood: Any = None) -> NegativeLogLikelihood:
    """Returns the loss that `(model, likelihood)` is short for, or `model` itself.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(model, NegativeLogLikelihood):
        if likelihood is not None:
            raise TypeError(
                f"`{caller}` takes a `negative_log_likelihood` or `(apply_fn, "
                "likelihood)`, not both: the loss has its likelihood."
            )
        return model
    if isinstance(model, Likelihood):
        raise TypeError(
            f"`{caller}` takes `(apply_fn, likelihood)` in this order, but got a "
            "Likelihood in the place of `apply_fn`."
        )
    if not callable(model) or (hasattr(model, "apply") and hasattr(model, "init")):
        hint = " Pass its `.apply`." if hasattr(model, "apply") else ""
        raise TypeError(
            f"`{caller}` needs a model: a `negative_log_likelihood` (nll), or an "
            "`apply_fn`, which must be a function, `apply_fn(params, inputs) -> "
            f"outputs`; got {type(model).__name__}.{hint}"
        )
    if isinstance(likelihood, Likelihood):
        return NegativeLogLikelihood(model, likelihood)
    hint = ""
    if likelihood is None:
        hint = " Or pass a `negative_log_likelihood` alone, which has its own."
    elif callable(likelihood):
        name = getattr(likelihood, "__name__", "likelihood")
        hint = f" A function that returns one must be called: `{name}()`."
    elif isinstance(likelihood, str):
        hint = f" Pass the object, `fsam_optax.{likelihood}`, not its name."
    raise TypeError(
        "`likelihood` must be a Likelihood, such as `categorical` or `gaussian()`, got "
        f"{likelihood!r}.{hint}"
    )


def takes_model(
    fn: Callable[..., Any], inputs_only: bool = False
) -> Callable[..., Any]:
    """Lets a function of a loss take `(apply_fn, likelihood)` in its place.

    The batch is then `(inputs, targets)` or, for what reads no labels, the inputs.
    """

    @functools.wraps(fn)
    def of_either(*args, **kwargs):
        nll, *args = (
            args if args else (kwargs.pop("nll", kwargs.pop("apply_fn", None)),)
        )
        if not isinstance(nll, NegativeLogLikelihood):
            likelihood = kwargs.pop("likelihood", None)
            if likelihood is None and args:
                likelihood, *args = args
            nll = resolve(fn.__name__, nll, likelihood)
            if inputs_only:
                nll = dataclasses.replace(nll, unpack=lambda inputs: (inputs, None))
                if "inputs" in kwargs:
                    kwargs["batch"] = kwargs.pop("inputs")
        return fn(nll, *args, **kwargs)

    return of_either


def parts_of(nll: NegativeLogLikelihood, batch: Any) -> tuple[Any, Any, Any]:
    """Returns inputs, targets and weights of a batch; the last two may be None."""
    unpacked = batch if nll.unpack is None else nll.unpack(batch)
    if not isinstance(unpacked, tuple | list) or len(unpacked) not in (2, 3):
        kind = type(unpacked).__name__
        if leaf_shape(unpacked) is not None:
            kind = f"an array of shape {leaf_shape(unpacked)}"
        if isinstance(unpacked, Mapping):
            names = [repr(name) for name in unpacked]
            kind = f"a dict with {', '.join(names)}"
            x, y, *_ = [*names, "'inputs'", "'targets'"]
            kind += (
                ". Say where they are: `negative_log_likelihood(..., unpack=lambda "
                f"batch: (batch[{x}], batch[{y}]))`"
            )
        what = "`batch`" if nll.unpack is None else "What `unpack` returns"
        raise TypeError(
            f"{what} must be a pair, `(inputs, targets)`, or `(inputs, targets, "
            f"weights)`, got {kind}."
        )
    names = ("inputs", "targets", "weights")
    for name, part in zip(names, unpacked, strict=False):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            if leaf_shape(leaf) is None:
                raise TypeError(
                    f"Leaf {jax.tree_util.keystr(path) or 'at the root'} of the {name} "
                    f"in `batch` is {leaf!r}, not an array."
                )
            if isinstance(part, list) and leaf_shape(leaf) == ():
                raise TypeError(
                    f"Leaf {jax.tree_util.keystr(path)} of the {name} in `batch` is "
                    "a number, not an array: give a list of numbers as "
                    "`jnp.asarray(...)`."
                )
    count_examples(unpacked[0])
    inputs, targets, weights = (*unpacked, None)[:3]
    return inputs, targets, weights


def call_of(nll: NegativeLogLikelihood, args: Any, kwargs: Any) -> Call:
    """Returns the model with the arguments of one call."""
    args = tuple(args) if nll.takes_rest else without_rest(args)
    return Call(nll.apply_fn, nll.has_aux, nll.split_keys, args, dict(kwargs))


def outputs_like(
    nll: NegativeLogLikelihood, params: Any, inputs: Any, call: Call
) -> Any:
    """Returns shapes and dtypes of the outputs of a batch, after checking them."""
    return traced_outputs(nll, params, inputs, call)[0]


def traced_outputs(
    nll: NegativeLogLikelihood, params: Any, inputs: Any, call: Call
) -> tuple[Any, Any]:
    """Returns what `outputs_like` does, and the jaxpr of the outputs of a batch."""
    # The keys need not be split to know the shapes.
    trace = jax.make_jaxpr(lambda p, x: call(p, x)[0], return_shape=True)
    closed, h = trace(params, inputs)
    check_outputs(h, nll.likelihood, inputs)
    return h, closed.jaxpr


def labels_of(nll: NegativeLogLikelihood, h: Any, parts: Any) -> Labels:
    """Returns the labels of a batch with their weights; raises if there are none."""
    _, targets, weights = parts
    if not jax.tree.leaves(targets):
        raise TypeError(
            "The loss needs labels, but the targets in `batch` are None: pass "
            "`(inputs, targets)`."
        )
    return weigh(nll.likelihood, h, targets, weights)


def mean_loss(nll: NegativeLogLikelihood, h: Any, labels: Labels) -> jax.Array:
    """Returns the loss of outputs."""
    log_prob = log_likelihood(nll.likelihood, h, labels.targets, labels.weights)
    return -jnp.sum(log_prob) / labels.divisor


def value_of(
    nll: NegativeLogLikelihood, params: Any, parts: Any, args: Any, kwargs: Any
) -> tuple[jax.Array, Any]:
    """Returns `(loss, aux)` of a batch in parts; aux is None if there is none."""
    inputs = parts[0]
    h, aux = of_batch(call_of(nll, args, kwargs), params, inputs)
    check_outputs(h, nll.likelihood, inputs)
    return mean_loss(nll, h, labels_of(nll, h, parts)), aux


def total_weight(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> jax.Array:
    """Returns D, the sum of the weights of the labels of a batch."""
    parts = parts_of(nll, batch)
    h = outputs_like(nll, params, parts[0], call_of(nll, args, kwargs))
    return labels_of(nll, h, parts).total
