"""Do the tests notice? Mutants are errors made on purpose, which some test must find.

    python tests/mutants.py                   # all of them
    python tests/mutants.py --only norms      # those whose file or text match
    python tests/mutants.py --every 5         # each fifth
    python tests/mutants.py --check           # only: does every old text still occur?

A mutant is one text of the package put in the place of another. It is made in a copy of
the package, on which the short tests that concern it run (never those marked `slow`)
until the first that fails, which must pass without the mutant. One that survives
is an error that the tests would let pass: write the test. Where an old text does not
occur exactly once, nothing runs and the script fails: give the mutant the new text.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fsam_optax"
SECONDS = 1200  # For the tests of one mutant.


class Mutant(NamedTuple):
    """One error: in `file`, `new` stands where `old` did."""

    file: str
    old: str
    new: str
    tests: str


def _mutants(file, tests, *changes):
    return [
        Mutant(file, old, new, " ".join([*more, tests])) for old, new, *more in changes
    ]


MUTANTS = [
    # The formula.
    *_mutants(
        "_ball/perturbation.py",
        "perturbation faults geometries",
        ("exponent = 1 / (ord - 1)", "exponent = ord - 1"),
        ("dual_ord = 1 / (1 - 1 / ord)", "dual_ord = ord"),
        ("(t * direction(x, unit, exponent))", "direction(x, unit, exponent)"),
        ("products = [t * g for t, g in zip(ts, gs, strict=True)]", "products = gs"),
        ("finite & (n > 0) for n in known", "finite for n in known"),
        ("finite & (n > 0) for n in known", "n > 0 for n in known"),
        ("[radius * factor for factor in factors]", "factors"),
        ("found, state.skipped, optax.safe", "~found, state.skipped, optax.safe"),
        ("jnp.where(found, new, old)", "new"),
        ("optax.safe_increment(state.count)", "state.count + 1"),
        ("radius = radius_at(rho, state.count)", "radius = radius_at(rho, 0)"),
        ("rho=jnp.array(radius, jnp.float32)", "rho=state.rho"),
    ),
    *_mutants(
        "_ball/operators.py",
        "geometries perturbation faults",
        ("magnitude(path, w) + eta if use", "magnitude(path, w) if use"),
        ("lambda is_bias: not is_bias", "lambda is_bias: is_bias"),
        (
            "for i, axis in enumerate(inside) if i not",
            "for i, axis in enumerate(inside) if i",
        ),
        ("metric = 1 + (eta * unit) * positive", "metric = 1 + eta * positive"),
        ("metric = unit * positive + damping", "metric = unit * (positive + damping)"),
        ("root = 1 / jnp.sqrt(metric)", "root = 1 / metric"),
        ("known & (f >= 0), f, 0)", "known, f, 0)"),
        ("shard_axes) / float(size)", "shard_axes)"),
    ),
    *_mutants(
        "_common/norms.py",
        "derivatives faults precision perturbation",
        (
            "return jnp.result_type(jnp.float32, *others)",
            "return jnp.result_type(*others)",
        ),
        ("[u * root(x, ord) for u, x in zip(", "[root(x, ord) for u, x in zip("),
        ("[_yardstick(x) for x in sums(", "[one for x in sums(", "cost"),
        ("return jnp.sign(x) * size**exponent", "return size**exponent"),
        ("powers >= info.tiny / info.eps**2", "powers >= 0"),
        ("jnp.where(squares < 1, 1 / near, near)", "near"),
        ("jax.lax.psum(part, axes) if axes else part", "part", "devices"),
        (
            "return unit * root(jnp.sum((x / unit) ** 2",
            "return root(jnp.sum((x / unit) ** 2",
        ),
        (
            "d = direction(x, Reciprocal.of(length), q - 1)",
            "d = direction(x, Reciprocal.of(length), 1)",
        ),
    ),
    *_mutants(
        "_common/pairs.py",
        "faults precision sharpness_aware",
        ("return x_norm, jnp.where(finite, cosine, jnp.nan)", "return x_norm, cosine"),
        ("x.astype(dtype) - y.astype(dtype)", "x.astype(dtype)"),
        ("[unit * root(x) for x in squares]", "[root(x) for x in squares]"),
    ),
    *_mutants(
        "_common/displacement.py",
        "step sharpness_aware value_and_grad faults",
        ("(w.astype(widen(w, e)) + e)", "(w.astype(widen(w, e)) - e)"),
        ("(w.astype(widen(w, e)) + e)", "(w + e.astype(w.dtype))"),
    ),
    # The step.
    *_mutants(
        "_step/step.py",
        "step sharpness_aware value_and_grad faults",
        ("value, h = gradient(point)", "value, h = gradient(params)"),
        ("descent = keep_unless(found, descent, memory.descent)", ""),
        ("step % every == 0", "step % every == 1"),
        (
            "return isinstance(every, numbers.Integral) and int(every) == 1",
            "return True",
        ),
        ('"clean_grads": grads, "eps": eps}', '"clean_grads": h, "eps": eps}'),
        (
            "return Stride(d, memory, jnp.array(False), metrics, None)",
            "return Stride(d, memory, jnp.array(True), metrics, None)",
            "merging",
        ),
        ("return cast_like(d, grads), after", "return d, after"),
    ),
    *_mutants(
        "_step/parts.py",
        "value_and_grad step devices merging",
        ("0, 0, part.weight * part.value)", "0, 0, part.value)"),
        ("jnp.where(part.weight == 0, 0, ", "jnp.where(part.weight > 0, 0, "),
        ("jnp.where(part.found & (part.weight > 0), part.weight, 0)", "part.weight"),
        (
            'args, kwargs = fold_keys((data.args, data.kwargs), numbers["replica"])',
            "args, kwargs = data.args, data.kwargs",
        ),
        (
            "_spread(x, rows).reshape(rows, parts, *x.shape[1:]), 1, 0)",
            "_spread(x, rows).reshape(parts, rows, *x.shape[1:]), 0, 0)",
        ),
    ),
    *_mutants(
        "_step/oracle.py",
        "value_and_grad step sharpness",
        (
            "jnp.asarray(stride.value, wide) - jnp.asarray(clean.value, wide)",
            "jnp.asarray(stride.value, wide)",
        ),
        ("optax.safe_increment(state.step)", "state.step + 1", "faults"),
    ),
    *_mutants(
        "_step/passes.py",
        "negative_log_likelihood",
        ("return total_weight(loss_fn, params, *data)", "pass"),
    ),
    *_mutants(
        "_step/lagged.py",
        "displaced family",
        (
            "point = displaced(state.displacement)",
            "point = params",
        ),
        (
            "merge((ascent.eps, ascent.state), oracle.axis_name)",
            "ascent.eps, ascent.state",
            "merging",
        ),
    ),
    *_mutants(
        "_common/mapped_axes.py",
        "devices merging value_and_grad",
        (
            "jax.lax.axis_index(axis_name) * (count or 1) + replica",
            "jax.lax.axis_index(axis_name) + replica",
        ),
        (
            "mean = jax.lax.psum(share.astype(wide) * x.astype(wide), axes) / number",
            "mean = jax.lax.psum(x.astype(wide), axes) / number",
        ),
        ("x = jnp.where(share == 0, jnp.zeros_like(x), x)", ""),
        ("return x + weight.astype(x.dtype) * y", "return x + y"),
        (
            "jnp.where(total == 0, old, (x / number).astype(old.dtype))",
            "(x / number).astype(old.dtype)",
        ),
    ),
    *_mutants(
        "_common/keys.py",
        "keys value_and_grad",
        ("return fold_in(x, index)", "return fold_in(x, 0)"),
    ),
    # Before, beside and instead of the ball.
    *_mutants(
        "_ball/guard.py",
        "step perturbation golden_family",
        ("keep_unless(usable, after, state), finite", "after, finite"),
        ("jnp.where(finite, e, 0) if is_real(e) else e", "e"),
    ),
    *_mutants(
        "_ball/memory.py",
        "descents",
        ("jnp.where(started, g - sigma * m, g)", "jnp.where(started, g - m, g)"),
        ("started, decay * m + (1 - decay) * g, g)", "started, decay * m + g, g)"),
    ),
    *_mutants(
        "_ball/multi_step.py",
        "descents",
        ("jax.tree.map(_add, eps, next_.eps)", "next_.eps"),
        ("grads = grad_fn(displaced(eps))", "grads = grad_fn(params)"),
        ('last, first.state, "count"', 'last, last, "count"'),
    ),
    *_mutants(
        "_step/descents.py",
        "descents golden_family",
        ("h - alpha * (g - c * h)", "h - alpha * (g - h)"),
        ("start = jnp.where(near_clean, 0.0, 1.0)", "start = 0.0"),
        ("c = component(_real(updates), _real(clean_grads), shard_axes)", "c = 1.0"),
        ("jnp.where(length > noise, direction(v, unit, 1), 0)", "v"),
        ("jnp.where(jnp.isfinite(length), new, old)", "new"),
    ),
    *_mutants(
        "_step/displaced.py",
        "displaced",
        (
            "return update.astype(dtype), held - next_w",
            "return update.astype(dtype), eps",
        ),
        ("(p.astype(d.dtype) - d)", "(p.astype(d.dtype) + d)"),
        ("jnp.asarray(eps, wide) - d", "jnp.asarray(eps, wide)"),
    ),
    *_mutants(
        "_step/bsam.py",
        "family",
        ("w + z / jnp.sqrt(num_data * s)", "w + z / (num_data * s)"),
        ("w + radius * h / s", "w + radius * h"),
        ("jnp.sqrt(s) * jnp.abs(h)", "s * jnp.abs(h)"),
    ),
    # The likelihoods and the labels.
    *_mutants(
        "_common/norms.py",
        "negative_log_likelihood",
        ("if x.dtype.itemsize < 4 else x", "if False else x"),
    ),
    *_mutants(
        "_fisher/likelihoods.py",
        "likelihoods fisher variance",
        (
            "score = jax.nn.one_hot(y, h.shape[-1], dtype=h.dtype) - jax.nn.softmax(h)",
            "score = jax.nn.one_hot(y, h.shape[-1], dtype=h.dtype) - jax.nn.sigmoid(h)",
        ),
        ("return s * v - p * jnp.sum(s * v, axis=-1, keepdims=True)", "return s * v"),
        ("first = -jnp.sum(", "first = jnp.sum("),
        ("return jnp.where(y < 0, 0, log_p).squeeze(-1)", "return log_p.squeeze(-1)"),
        (
            "return variance, variance * (1 - 6 * variance)",
            "return variance, variance * (1 + 6 * variance)",
        ),
        (
            "variance = jax.nn.sigmoid(h) * jax.nn.sigmoid(-h)",
            "variance = jax.nn.sigmoid(h)",
        ),
        ("(u - jnp.sum(p * u, axis=-1, keepdims=True)) ** 4", "u**4"),
        ("+ 3 * second_moment**2", "+ second_moment**2"),
        (
            "largest = jnp.minimum(jnp.max(p, axis=-1), trace)",
            "largest = jnp.max(p, axis=-1) * trace",
        ),
        (
            "y - jnp.sum(y, axis=-1, keepdims=True) * jax.nn.softmax(h)",
            "y - jax.nn.softmax(h)",
        ),
    ),
    *_mutants(
        "_fisher/labels.py",
        "negative_log_likelihood fisher likelihoods second_order",
        (
            "a = jnp.max(w, axis=tuple(range(1, w.ndim)))",
            "a = jnp.min(w, axis=tuple(range(1, w.ndim)))",
        ),
        ("within=w / expand(divisor(a), w)", "within=w"),
        ("total=jnp.sum(w),", "total=jnp.sum(a),"),
        ("return jnp.where(m == 0, 0, m * x)", "return m * x"),
        ("jnp.where(here[..., None], c, 0)", "c"),
        ("return jnp.where(self.total == 0, 1, self.total)", "return self.total"),
    ),
    *_mutants(
        "_fisher/negative_log_likelihood.py",
        "negative_log_likelihood fused",
        (
            "return -jnp.sum(log_prob) / labels.divisor",
            "return -jnp.mean(log_prob)",
        ),
    ),
    *_mutants(
        "_fisher/functional.py",
        "step negative_log_likelihood",
        (
            "pull_back(_cast(cotangent, there))[0]",
            "pull_back(jax.grad(loss_of)(there))[0]",
        ),
    ),
    *_mutants(
        "_fisher/one_pass.py",
        "negative_log_likelihood fused",
        (" / labels.divisor,", ","),
        ("weights=labels.examples / labels.divisor,", "weights=None,"),
    ),
    # The estimators.
    *_mutants(
        "_fisher/estimators.py",
        "fisher variance",
        ("        draws=num_samples,\n", ""),
        ("fourth / multiple - (second / multiple) ** 2", "fourth / multiple"),
        ("h, keys[i], present", "h, keys[0], present"),
    ),
    *_mutants(
        "_fisher/gnb.py",
        "fisher",
        (
            "roots = jnp.sqrt(problem.labels.examples)",
            "roots = problem.labels.examples",
        ),
        ("jnp.maximum(2 * s2**2 - s4, 0)", "jnp.maximum(2 * s2**2, 0)"),
    ),
    *_mutants(
        "_fisher/estimation.py",
        "fisher devices negative_log_likelihood",
        ("draw = jax.random.fold_in(draw, replica)", "pass"),
        ("key=jax.random.key_data(following),", "key=state.key,"),
        (
            "total = draws * problem.labels.divisor",
            "total = draws * len(problem.labels.examples)",
        ),
        ("            return w if is_masked(v) else v\n", "            return w\n"),
        (
            "return jax.lax.stop_gradient(jax.tree.map(leaf,",
            "return (jax.tree.map(leaf,",
        ),
        (
            "draws_per_example * weight**2 / divisor(jnp.sum(w * w))",
            "draws_per_example * w.size",
        ),
    ),
    *_mutants(
        "_fisher/dataset.py",
        "dataset",
        ('check_like("state", state, ', 'check_like("state", jax.eval_shape(start), '),
        (
            "lambda old, new: old + share.astype(old.dtype) * (new - old)",
            "lambda old, new: old + (new - old) / (state.batches + 1)",
        ),
        ("q * (1 - q) * apart**2", "0"),
        (
            "return x if sharding is None else jax.device_put(x, sharding)",
            "return x",
            "fisher_devices",
        ),
    ),
    *_mutants(
        "_fisher/i2.py",
        "fisher variance",
        ("return total / len(xs)", "return total"),
        (
            "min(max(budget // (2 * most_bytes(entry, 0)), 1), 64)",
            "64",
            "engine_memory",
        ),
    ),
    *_mutants(
        "_fisher/refresh_every.py",
        "fisher merging",
        ("age=(state.age + 1) % k", "age=state.age + 1"),
        ("lambda: vary_like(kept, alike)", "lambda: kept"),
    ),
    *_mutants(
        "_fisher/at_hand.py",
        "fisher geometries",
        ("return g * g", "return jnp.abs(g)"),
    ),
    # The engine.
    *_mutants(
        "_engine/canonical.py",
        "engine_memory",
        (
            "lax.transpose(kernel, (*taps, rows, features))",
            "lax.transpose(kernel, (*reversed(taps), rows, features))",
        ),
        ("    if numbers == last:", "    if numbers.lhs_spec:"),
    ),
    *_mutants(
        "_engine/sums.py",
        "engine engine_patterns",
        (
            "return x if p == 1 else power(lax.mul(x, x), p // 2)",
            "return x if p == 1 else lax.mul(x, x)",
        ),
        (
            "weight = lax.reduce_sum(weight, same)",
            "weight = lax.reduce_max(weight, same)",
        ),
        (
            "return added(found, *rows_at(axes, operands, many * number, rest))",
            "return found",
        ),
        (
            "return add(before, *values), rows(i + 1)",
            "return add(before, *values), own",
        ),
        (
            "return scaled(a, has[0], scale), scaled(g, has[1], 1 / scale)",
            "return scaled(a, has[0], scale), scaled(g, has[1], scale)",
        ),
    ),
    *_mutants(
        "_engine/carries.py",
        "engine_patterns",
        (
            "return later if reverse else later[::-1], upto[-1]",
            "return later, upto[-1]",
        ),
        ("total = (total * whole).astype(total.dtype)", "pass"),
        ("-1.0 if name == DIFFERENCE else 1.0)", "1.0)"),
        ("n / s if name == DIVISION else n * s", "n * s"),
    ),
    *_mutants(
        "_engine/sources.py",
        "engine_memory",
        ("self.examples * self.residuals // 16", "0"),
        ("if forms or not products.isdisjoint(varying):", "if forms:"),
        ("name == BRANCHES or (name in CONTRACTIONS", "(name in CONTRACTIONS"),
        ("(x in formed or is_product(body, x))", "x in formed and False"),
    ),
    *_mutants(
        "_engine/sums.py",
        "engine_devices",
        (
            "if weight.ndim == 0 or len(weight) % share:",
            "if True:",
        ),
        ("short is not None and alone", "short is not None", "engine_placements"),
    ),
    *_mutants(
        "_engine/short.py",
        "engine",
        ("positions * len(powers) <= MOST", "positions <= MOST"),
    ),
    *_mutants(
        "_engine/rows.py",
        "engine_memory",
        ("None if _are_few(lookups) else steps)\n    work", "None)\n    work"),
    ),
    *_mutants(
        "_engine/squares.py",
        "example_gradients",
        ("return k * jnp.maximum(jnp.sum(a * b), 0)", "return k * jnp.sum(a * b)"),
        ("return k * jnp.sum(x * x) if", "return jnp.sum(x * x) if"),
    ),
    *_mutants(
        "_engine/places.py",
        "engine_patches",
        ("(known == 0) | (known == 1)", "known >= 0"),
        ("if len(np.unique(source)) < len(source)", "if False"),
        ("(between == 0) & (place >= 0)", "(place >= 0)"),
        ("(place >= 0) & (place <", "(place <"),
        ("features // (after[1] // groups) * (before[1] // groups)", "0"),
        ('place + along(tap * params["rhs_dilation"][d], 0)', "place + along(tap, 0)"),
    ),
    *_mutants(
        "_engine/counts.py",
        "example_gradients",
        ("totals[i][j] = totals[i][j] + jnp.sum(y)", "totals[i][j] = jnp.sum(y)"),
    ),
    *_mutants(
        "_fisher/example_gradients.py",
        "example_gradients",
        ("jnp.abs(a) * jnp.sqrt(s)", "jnp.sqrt(s)"),
        ("long = norms > max_norm", "long = norms >= 0"),
    ),
    *_mutants(
        "_engine/rows.py",
        "engine engine_patterns",
        ("x = jnp.clip(x, 0, n - 1)", "x = x + 0"),
        ("flat = flat * n + x if k else x", "flat = flat + x if k else x"),
        (
            "first, index, places), index)",
            "first, index, places), index) * 0 + index",
        ),
        ("start = lax.cummax(jnp.where(new, places, 0))", "start = places"),
        ("one = gathered(last, flat)", "one = lax.iota(jnp.int32, len(flat))"),
        ("jnp.where(alike, places[:, None], n)", "places[:, None] + 0 * alike"),
        ("sent = jnp.where(stays, len(rows), one)", "sent = one"),
    ),
    *_mutants(
        "_engine/indexed.py",
        "engine_patterns example_gradients",
        ("order = order[targets[order] < out]", "targets = targets % out"),
        ("y = np.full(shape, rest, np.int32)", "y = np.zeros(shape, np.int32)"),
        ("scale = scales + np.arange(at.size)", "scale = np.arange(at.size)"),
        ("begin + (b * n + t) * m + x", "begin + b * n * m + x"),
        ("product * z[0][:, None] if z else product", "product"),
        ("return np.transpose(found, np.argsort(order))", "return found.reshape(rows)"),
        ("[: weight.size] for y in found", "[-weight.size :] for y in found"),
        (
            "ks = [k if k.ndim == 0 else k[:, None] for k in ks]",
            "ks = [1.0 for _ in ks]",
        ),
    ),
    *_mutants(
        "_engine/mirrored.py",
        "engine_patterns",
        ("left = sign**p * above", "left = above"),
        ("sign * x[start:, start:stop]", "x[start:, start:stop]"),
        ("turned ^= name_of(e) == TRANSPOSITION", "turned = True"),
        ("sign *= -1.0 if name_of(e) == NEGATION else 1.0", "pass"),
    ),
    *_mutants(
        "_engine/pairs.py",
        "engine engine_patterns",
        ("(y if i == j else 2 * y)", "y"),
        ("y = y if masks[k] is None else y * masks[k]", "pass"),
        ("kept = jnp.max(y) >= LEFT * parts", "kept = True"),
        (
            "y = sign * jnp.swapaxes(found[k], -2, -1)",
            "y = jnp.swapaxes(found[k], -2, -1)",
        ),
        (
            "apart = orthogonal(products[:n], mirrors) if alike else products[:n]",
            "apart = products[:n]",
        ),
    ),
    *_mutants(
        "_engine/scales.py",
        "engine_patterns",
        ("*((jnp.divide, s) for", "*((jnp.multiply, s) for"),
        ("start = len(batch[k]) + (len(free[0]) if k else 0)", "start = len(batch[k])"),
    ),
    *_mutants(
        "_engine/ends.py",
        "engine_patterns",
        ("v in added and before.varies(v)", "False"),
    ),
    *_mutants(
        "_engine/grouping.py",
        "engine engine_patterns",
        ("scaled(y, math.prod(factors), p)", "scaled(y, math.prod(factors), 1)"),
    ),
    *_mutants(
        "_engine/linear.py",
        "engine_patterns",
        ("or not is_injective(self.flow, eqn)", ""),
        ("            if m != n:  # Of rows", "            if False:  # Of rows"),
    ),
    *_mutants(
        "_engine/multiples.py",
        "engine_patterns",
        ("number = -number", "continue"),
        ("number / by if name_of(e) == DIVISION else number * by", "number * by"),
        ("if all(v in way for way in ways)", "if True"),
        ("1 / MODERATE < low and high < MODERATE", "True"),
        ("low * np.min(sizes), high * np.max(sizes)", "np.min(sizes), np.max(sizes)"),
    ),
    *_mutants(
        "_engine/moves.py",
        "engine engine_patterns engine_complex",
        ("return -s if p % 2 else s", "return s"),
        (
            "y = scaled(s, others[0].astype(s.dtype), p)",
            "y = s * others[0].astype(s.dtype)",
        ),
        (
            "        s = s / others[0].astype(s.dtype)",
            "        return s / others[0].astype(s.dtype)",
        ),
        (
            "if whole and sum(box[axis][1] - box[axis][0] for box in boxes) == n:",
            "if whole:",
        ),
        ("a[1] <= b[0] or b[1] <= a[0]", "True"),
        ("math.gcd(a[2], b[2]) == 0", "max(a[2], b[2]) == 0"),
        (
            'return i == 0 and (not fills or eqn.params["fill_value"] == 0)',
            "return i == 0",
        ),
        ("return i == 2 and is_injective(flow, eqn)", "return i == 2"),
        ("scaled(s, multiples.multiple(flow, ways, env, s.dtype), p)", "s"),
        ("return i == 0 and flow.is_zero(eqn.invars[1])", "return i == 0"),
        ("return i > 0 and all(map(flow.is_zero, others))", "return i > 0"),
    ),
    *_mutants(
        "_engine/columns.py",
        "engine engine_patterns fisher",
        (
            "jnp.where(index < count, weight, jnp.zeros_like(weight))",
            "weight + 0 * index",
            "engine_memory",
        ),
    ),
    *_mutants(
        "_engine/columns.py",
        "engine_devices",
        ("if share is None or number >= cotangents.number:", "if True:"),
    ),
    *_mutants(
        "_fisher/i2.py",
        "engine_devices",
        ("share = share_of(examples, problem.params)", "share = len(scores)"),
    ),
    *_mutants(
        "_engine/example.py",
        "engine_placements",
        ("if is_free(linear) and not", "if not"),
    ),
    *_mutants(
        "_engine/one_row.py",
        "engine_placements",
        ("    if any(map(_names_positions, one)):", "    if False:"),
        (
            "for d, (n, m) in enumerate(sizes) if n != m}",
            "for d, _ in enumerate(sizes)}",
        ),
    ),
    *_mutants(
        "_engine/normal.py",
        "engine",
        (
            "lax.slice_in_dim(x, start, start := start + n, axis=axis)",
            "lax.slice_in_dim(x, 0, start := n, axis=axis)",
        ),
        ("range(1, 2 * x.ndim, 2)", "range(0, 2 * x.ndim, 2)"),
    ),
    *_mutants(
        "_engine/thin.py",
        "engine",
        ('"permutation"] if d in places]', '"permutation"] if d in places][::-1]'),
        ("if 1 not in self.shape:", "if 2 not in self.shape:"),
        ("return Value(shape, thin=x)", "return full(lax.reshape(x, shape))"),
    ),
    *_mutants(
        "_engine/folding.py",
        "precision",
        ("    solved = _solved(self, env, dtype)", "    solved = None"),
    ),
    *_mutants(
        "_engine/collecting.py",
        "engine_patterns",
        ("own = term.scale, (", "own = 1.0, ("),
    ),
    *_mutants(
        "_engine/products.py",
        "engine_patterns",
        ("(IMAGINARY, IMAGINARY, -1)", "(IMAGINARY, IMAGINARY, 1)"),
    ),
    *_mutants(
        "_engine/entries.py",
        "fisher",
        ("return squares(v + u) - squares(v - u)", "return squares(v + u)"),
    ),
    *_mutants(
        "_engine/plan.py",
        "example_gradients",
        ("uniform=what.uniform and key not in several", "uniform=what.uniform"),
        ("best.work / 2", "best.work * 1e3"),
    ),
    *_mutants(
        "_engine/power_sums.py",
        "engine fused",
        ("jnp.sum(losses if weights is None else weights * losses)", "jnp.sum(losses)"),
    ),
    *_mutants(
        "_engine/explanation.py",
        "engine",
        ("if not error <= tolerance * scale:", "if error > scale:"),
    ),
    *_mutants(
        "_engine/explanation.py",
        "negative_log_likelihood",
        ("if not any(outputs):", "if not outputs:"),
        (
            "return reduces(jax.make_jaxpr(apply_fn)(params, more).jaxpr, number + 1)",
            "return True",
        ),
    ),
    # What studies.
    *_mutants(
        "_study/sharpness.py",
        "sharpness",
        (
            "size = jnp.where(rises, jnp.minimum(2 * size, 1), size / 2)",
            "size = size / 2",
        ),
        (
            "return _mean_over_labels(sum(squares[1:], squares[0]), labels) / 2",
            "return _mean_over_labels(sum(squares[1:], squares[0]), labels)",
        ),
    ),
    *_mutants(
        "_study/second_order.py",
        "second_order",
        (
            "f = jnp.maximum(jnp.asarray(f, widen(f)), 0) + damping",
            "f = jnp.asarray(f, widen(f)) + damping",
        ),
        ("values = jnp.maximum(values, 0) + damping", "values = values + damping"),
    ),
    *_mutants(
        "_study/forms.py",
        "variance",
        ("+ 2 * jnp.sum(second) ** 2", "+ jnp.sum(second) ** 2"),
    ),
    *_mutants(
        "variance.py",
        "variance",
        (
            "return (sum_of_fourth(fourth_moment(h, u) - second**2, second),)",
            "return (sum_of_fourth(fourth_moment(h, u), second),)",
        ),
    ),
]


def stale(root=ROOT):
    """Returns a sentence for each mutant that cannot be made."""
    found = []
    for m in MUTANTS:
        path = root / "fsam_optax" / m.file
        number = path.read_text().count(m.old) if path.is_file() else 0
        if number != 1:
            found.append(f"{m.file}: {m.old!r} occurs {number} times, not once.")
        found += [
            f"{m.file}: there is no tests/test_{name}.py."
            for name in m.tests.split()
            if not (root / "tests" / f"test_{name}.py").is_file()
        ]
    return list(dict.fromkeys(found))


def _copy(folder):
    """Copies what the tests need, without what was compiled or measured."""
    for name in ("fsam_optax", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "figures", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def _run(folder, tests):
    """Returns the exit status of pytest, and what it printed."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--no-header"]
    cache = str(pathlib.Path(tempfile.gettempdir()) / "fsam_optax_mutants")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", *options, *tests],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 1, "It ran too long."
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest could not run:\n{done.stdout}")
    return done.returncode, done.stdout


def _failed(printed):
    """Returns the tests that failed, without their parameters."""
    found = re.findall(
        r"^(?:FAILED|ERROR) (tests/\w+\.py(?:::\w+)?)", printed, re.MULTILINE
    )
    return list(dict.fromkeys(found))


def _try(mutant, unchanged):
    """Returns whether the mutant is killed, and by what."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shutil.copytree(unchanged, folder, dirs_exist_ok=True)
        path = folder / "fsam_optax" / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        files = dict.fromkeys(f"tests/test_{name}.py" for name in mutant.tests.split())
        status, printed = _run(folder, ["-x", *files])
    return status != 0, _failed(printed)


def main():
    """Runs what the command line asks for, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="make no mutant")
    parser.add_argument("--only", default="", help="pattern of the file or the text")
    parser.add_argument("--every", type=int, default=1, help="take each n-th mutant")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    if problems := stale():
        print(*problems, sep="\n")
        return 2
    chosen = [m for m in MUTANTS if re.search(options.only, f"{m.file} {m.old}")]
    chosen = chosen[:: options.every]
    if options.check or not chosen:
        print(f"{len(MUTANTS)} mutants, of which {len(chosen)} were asked for.")
        return 0 if options.check else 2
    start = time.monotonic()
    survivors = 0
    with (
        tempfile.TemporaryDirectory() as name,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        unchanged = pathlib.Path(name)
        _copy(unchanged)
        results = pool.map(lambda m: _try(m, unchanged), chosen)
        killers = []
        for m, (killed, by) in zip(chosen, results, strict=True):
            survivors += not killed
            killers += by
            word = "killed  " if killed else "SURVIVED"
            print(word, m.file, repr(m.old), *by, flush=True)
        # What fails without a mutant too has killed none.
        void = _failed(_run(unchanged, dict.fromkeys(killers))[1]) if killers else []
        if void:
            print("These fail without a mutant too:", *void, sep="\n")
    seconds = time.monotonic() - start
    print(f"{len(chosen)} mutants, {survivors} survived; {seconds:.0f} s.")
    return 1 if survivors or void else 0


if __name__ == "__main__":
    sys.exit(main())
