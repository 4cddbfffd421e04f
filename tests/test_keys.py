"""PRNG keys in arguments: which leaves are keys, and what is folded into them."""

import jax
import jax.numpy as jnp
import numpy as np

from fsam_optax._common.keys import fold_keys, has_keys, is_prng_key


def test_every_kind_of_key_is_folded_and_nothing_else():
    tree = {
        "typed": jax.random.key(0),
        "several": jax.random.split(jax.random.key(1), (2, 3)),
        "legacy": jax.random.PRNGKey(2),
        "legacy ones": jax.random.split(jax.random.PRNGKey(3), 3),
        "counts": jnp.arange(2),
        "mask": np.ones(2, np.uint8),
        "triples": np.zeros((2, 3), np.uint32),
        "flag": True,
        "function": print,
    }
    folded = fold_keys(tree, 7)
    assert folded["typed"] == jax.random.fold_in(tree["typed"], 7)
    for i, j in np.ndindex(2, 3):
        expected = jax.random.fold_in(tree["several"][i, j], 7)
        assert folded["several"][i, j] == expected
    np.testing.assert_array_equal(
        folded["legacy"], jax.random.fold_in(tree["legacy"], 7)
    )
    for i, key in enumerate(tree["legacy ones"]):
        np.testing.assert_array_equal(
            folded["legacy ones"][i], jax.random.fold_in(key, 7)
        )
    for name in ("counts", "mask", "triples", "flag", "function"):
        assert folded[name] is tree[name]
    assert has_keys(tree) and not has_keys({"counts": tree["counts"]})


def test_a_traced_index_folds_as_a_number_does():
    key = jax.random.key(0)
    folded = jax.jit(jax.vmap(fold_keys, (None, 0)))(key, jnp.arange(4))
    assert all(folded[i] == fold_keys(key, i) for i in range(4))


def test_a_legacy_key_has_the_length_that_the_generator_says():
    with jax.default_prng_impl("rbg"):
        assert is_prng_key(jax.random.PRNGKey(0))
        assert not is_prng_key(np.zeros(2, np.uint32))
