"""The loss that knows its model: its value, its gradient, its Fisher in one pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_function, leaf_shape
from fsam_optax._common.mapped_axes import is_key
from fsam_optax._common.norms import divisor
from fsam_optax._common.rest import without_rest
from fsam_optax._engine import loss_power_sums
from fsam_optax._fisher.labels import Labels, log_likelihood, weigh
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.outputs import (
    aux_axes,
    Call,
    check_outputs,
    count_examples,
    of_batch,
    of_example,
    row_numbers,
)


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
        value, aux = _value(self, params, parts_of(self, batch), args, kwargs)
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

    Weights come with the batch, of examples (N,) or of labels (N, T): 0 hides a label
    whatever it is, NaN included; the inputs must be finite. A batch of weight 0 has
    loss 0. Shapes of labels are checked, never broadcast; see the likelihoods for what
    labels are.

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
            "`apply_fn` must be a function, `apply_fn(params, inputs) -> outputs`, "
            f"got {type(model).__name__}.{hint}"
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
    def of_either(model, *args, **kwargs):
        if isinstance(model, NegativeLogLikelihood):
            return fn(model, *args, **kwargs)
        likelihood = kwargs.pop("likelihood", None)
        if likelihood is None and args:
            likelihood, *args = args
        nll = resolve(fn.__name__, model, likelihood)
        if inputs_only:
            nll = dataclasses.replace(nll, unpack=lambda inputs: (inputs, None))
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
    count_examples(unpacked[0])
    inputs, targets, weights = (*unpacked, None)[:3]
    return inputs, targets, weights


def call_of(nll: NegativeLogLikelihood, args: Any, kwargs: Any) -> Call:
    """Returns the model with the arguments of one call."""
    args = tuple(args) if nll.takes_rest else without_rest(args)
    return Call(nll.apply_fn, nll.has_aux, nll.split_keys, args, dict(kwargs))


def outputs_like(nll: NegativeLogLikelihood, params: Any, inputs: Any, call: Call):
    """Returns shapes and dtypes of the outputs of a batch, after checking them."""
    # The keys need not be split to know the shapes.
    h, _ = jax.eval_shape(call, params, inputs)
    check_outputs(h, nll.likelihood, inputs)
    return h


def _labels(nll, h, parts) -> Labels:
    _, targets, weights = parts
    if not jax.tree.leaves(targets):
        raise TypeError(
            "The loss needs labels, but the targets in `batch` are None: pass "
            "`(inputs, targets)`."
        )
    return weigh(nll.likelihood, h, targets, weights)


def _mean_loss(nll, h, labels: Labels) -> jax.Array:
    log_prob = log_likelihood(nll.likelihood, h, labels.targets, labels.weights)
    return -jnp.sum(log_prob) / divisor(labels.total)


def _value(nll, params, parts, args, kwargs) -> tuple[jax.Array, Any]:
    inputs = parts[0]
    h, aux = of_batch(call_of(nll, args, kwargs), params, inputs)
    check_outputs(h, nll.likelihood, inputs)
    return _mean_loss(nll, h, _labels(nll, h, parts)), aux


def total_weight(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> jax.Array:
    """Returns D, the sum of the weights of the labels of a batch."""
    parts = parts_of(nll, batch)
    h = outputs_like(nll, params, parts[0], call_of(nll, args, kwargs))
    return _labels(nll, h, parts).total


def value_grad_and_fisher(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Any]:
    """Returns `((loss, aux), gradient, empirical Fisher)`, all from one pass.

    Loss, aux and gradient have their ordinary derivatives; the Fisher is a constant.

    Raises:
        ValueError: If a key is given to a loss with `split_keys=False`, which would
            have other masks here than there; or for a statistic over the batch in aux.
    """
    if call_of(nll, args, kwargs).holds_keys and not nll.split_keys:
        raise ValueError(
            "The gradient and the Fisher cannot come from one pass with a PRNG key "
            "among the arguments and `split_keys=False`: examples that are run one by "
            "one would draw other masks than the batch does. Use `split_keys=True`, or "
            "an estimator that makes a pass of its own."
        )
    operands = (parts_of(nll, batch), tuple(args), dict(kwargs))
    arrays, rebuild = _arrays_of(operands)
    kinds: list[Any] = []

    def plain(params, arrays):
        def loss(params):
            value, aux = _value(nll, params, *rebuild(arrays))
            return value, _keys_as_data(aux)

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.custom_jvp
    def one_pass(params, arrays):
        return _one_pass(nll, params, kinds, *rebuild(arrays))

    @one_pass.defjvp
    def _(primals, tangents):
        out = one_pass(*primals)
        _, changes = jax.jvp(plain, primals, tangents)
        return out, (*changes, jax.tree.map(jnp.zeros_like, out[2]))

    (value, aux), grads, fisher = one_pass(params, arrays)
    return (value, _data_as_keys(aux, kinds)), grads, fisher


def _one_pass(nll, params, kinds, parts, args, kwargs):
    """Returns `((loss, aux), gradient, Fisher)`; notes in `kinds` the keys in aux."""
    call = call_of(nll, args, kwargs)
    inputs = parts[0]
    labels = _labels(nll, outputs_like(nll, params, inputs, call), parts)
    axes = aux_axes(call, params, inputs) if nll.has_aux else None
    rows = row_numbers(inputs) if call.one_by_one else None

    def example_loss(params, example) -> Any:
        own, (targets, _, within) = example
        h, aux = of_example(call, params, own, axes)
        log_prob = log_likelihood(nll.likelihood, h, targets, within)
        loss = -jnp.sum(log_prob)
        if not nll.has_aux:
            return loss
        kinds[:] = _kinds_of_keys(aux)
        return loss, _keys_as_data(aux)

    value, sums, *aux = loss_power_sums(
        example_loss,
        params,
        ((inputs, rows), labels.of_examples),
        powers=(1, 2),
        weights=labels.examples,
        has_value=True,
        **({"has_aux": True} if nll.has_aux else {}),
    )
    total = divisor(labels.total)
    grads, squares = (jax.tree.map(lambda x: x / total, tree) for tree in sums)
    grads = jax.tree.map(lambda g, w: g.astype(jnp.asarray(w).dtype), grads, params)
    aux = aux[0] if aux else None
    if nll.has_aux:
        aux = jax.tree.map(lambda own, a: a if own else a[0], axes, aux)
    return (value / total, aux), grads, squares


def _keys_as_data(tree):
    """Returns a tree with the data of typed keys in their place."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _kinds_of_keys(tree):
    """Returns for each leaf the kind of key that it is, None if it is none."""
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_impl(x) if is_key(x) else None for x in leaves]


def _data_as_keys(tree, kinds):
    """Undoes `_keys_as_data`, given the kinds of the keys."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [
            x if kind is None else jax.random.wrap_key_data(x, impl=kind)
            for x, kind in zip(leaves, kinds, strict=True)
        ]
    )


def _arrays_of(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """Returns the arrays of a tree, and what puts them back among its other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]
    arrays = [x for x, here in zip(leaves, is_array, strict=True) if here]

    def rebuild(arrays):
        rest = iter(arrays)
        return structure.unflatten(
            [
                next(rest) if here else x
                for x, here in zip(leaves, is_array, strict=True)
            ]
        )

    return arrays, rebuild


def value_grad_and_pull(
    nll: NegativeLogLikelihood, params: Any, batch: Any, args: Any, kwargs: Any
) -> tuple[tuple[jax.Array, Any], Any, Callable[[Any], tuple[jax.Array, Any]]]:
    """Returns `((loss, aux), gradient, pull)`, where `pull(point) -> (loss, gradient)`.

    `pull` evaluates the loss at another point, and pulls the gradient by the outputs at
    `params` back there: J(point)^T dloss/dh(params).
    """
    parts = parts_of(nll, batch)
    call = call_of(nll, args, kwargs)

    def outputs(params):
        return of_batch(call, params, parts[0])

    h, pull_back, aux = jax.vjp(outputs, params, has_aux=True)
    check_outputs(h, nll.likelihood, parts[0])
    labels = _labels(nll, h, parts)

    def loss_of(h):
        return _mean_loss(nll, h, labels)

    value, cotangent = jax.value_and_grad(loss_of)(h)

    def pull(point):
        there, pull_back, _ = jax.vjp(outputs, point, has_aux=True)
        return loss_of(there), pull_back(_cast(cotangent, there))[0]

    return (value, aux), pull_back(cotangent)[0], pull


def _cast(tree, like):
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def functional_gradient(
    nll: NegativeLogLikelihood, params: Any, batch: Any, *args: Any, **kwargs: Any
) -> Callable[[Any], Any]:
    """Returns the gradient of Functional SAM as a function of the perturbed point.

        grad_fn(v) = J(v)^T dloss/dh(w)               J = dh / dw, h: outputs

    The gradient of the loss by the outputs is that at `params` w, and only the Jacobian
    is perturbed: what is left is the sharpness of the model as a function, without that
    of the loss. At v = w it is the gradient.

    Args:
        nll: The loss, from `negative_log_likelihood`.
        params: Parameters w.
        batch: What the loss takes.
        *args: Further arguments of the model.
        **kwargs: Further keyword arguments of the model.

    Returns:
        `grad_fn(point) -> grads`, to pass to `sharpness_aware(...).update` as
        `grad_fn`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> model = lambda w, x: (x * w)[:, None] ** 2
        >>> nll = negative_log_likelihood(model, gaussian())
        >>> batch = (jnp.array([1.0]), jnp.array([[0.0]]))
        >>> grad_fn = functional_gradient(nll, jnp.array(1.0), batch)
        >>> print(grad_fn(jnp.array(1.0)), grad_fn(jnp.array(3.0)))  # 1 x 2 v
        2.0 6.0

    References:
        Singh, Mobahi, Agarwala, Dauphin, Avoiding spurious sharpness minimization
        broadens applicability of SAM, 2025, https://arxiv.org/abs/2502.02407.
    """
    nll = resolve("functional_gradient", nll)
    _, _, pull = value_grad_and_pull(nll, params, batch, args, kwargs)
    return lambda point: pull(point)[1]
