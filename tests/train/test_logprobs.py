"""Log-probs of packed rows against each document read alone, whole logits and a softmax."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import VOCAB, tiny_model
from w2s_jax.models.model import Model, abstract_model
from w2s_jax.ops.attention import Rope
from w2s_jax.train.logprobs import scored_tokens, sequence_scores, weighted_logprob

SEGMENTS = np.array(
    [[1] * 12, [1] * 5 + [2] * 4 + [0] * 3, [1] * 3 + [2] * 3 + [3] * 6, [1] * 6 + [0] * 6],
    np.int32,
)
KINDS = {
    "learned": {
        "architecture": "gpt2", "position": "learned", "norm": "layer", "kv_heads": 4,
        "gated_mlp": False, "activation": "gelu_tanh", "tied_embeddings": True, "qkv_bias": True,
        "max_positions": 12, "layers": 1,
    },
    "soft-capped windows": {
        "final_softcap": 4.0, "attention_softcap": 3.0, "sliding_windows": (3, None),
        "logit_divisor": 0.8, "sliding_rope": Rope(theta=50.0), "qkv_clip": 0.5,
    },
}  # fmt: skip
FIVE_ROWS = 5 * VOCAB * 4


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, SEGMENTS.shape).astype(np.int32)
    weights = jnp.asarray(rng.normal(size=SEGMENTS.shape), jnp.float32)
    return tokens, jnp.where(scored_tokens(SEGMENTS), weights, 0.0)


def documents():
    """(row, its places) of every document."""
    for row, segments in enumerate(SEGMENTS):
        for segment in range(1, segments.max() + 1):
            yield row, np.flatnonzero(segments == segment)


def alone(model, tokens):
    """Log-probs [B, X] with every document in a row of its own, from whole logits."""
    found = list(documents())
    rows = np.zeros((len(found), SEGMENTS.shape[1]), np.int32)
    mask = np.zeros(rows.shape, bool)
    for i, (row, places) in enumerate(found):
        rows[i, : len(places)], mask[i, : len(places)] = tokens[row][places], True
    logprobs = jax.nn.log_softmax(model(rows, mask))[:, :-1]
    chosen = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[..., 0]
    out = jnp.zeros(SEGMENTS.shape)
    for i, (row, places) in enumerate(found):
        out = out.at[row, places[1:]].set(chosen[i, : len(places) - 1])
    return out


def assert_trees_close(left, right, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


@pytest.mark.parametrize(("kind", "scan_layers"), list(zip(KINDS, itertools.cycle([False, True]))))
def test_packed_rows_equal_their_documents_with_gradients(kind, scan_layers):
    model = tiny_model(0, scan_layers=scan_layers, sharpness=6.0, **KINDS[kind])
    tokens, weights = batch()

    def packed(model):
        scores = sequence_scores(model, tokens, SEGMENTS, block_bytes=FIVE_ROWS)
        return (weights * scores.logprobs).sum(), scores.logprobs

    def apart(model):
        logprobs = alone(model, tokens)
        return (weights * logprobs).sum(), logprobs

    (_, found), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(model)
    (_, expected), wanted = jax.jit(jax.value_and_grad(apart, has_aux=True))(model)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert_trees_close(gradient, wanted, atol=3e-5)


def test_the_weighted_sum_has_the_same_gradient_whatever_is_recomputed():
    model = tiny_model(1, layers=1)
    tokens, weights = batch()

    def scored(model, remat):
        scores = sequence_scores(model, tokens, SEGMENTS, remat=remat)
        return (weights * scores.logprobs).sum(), scores

    def summed(model):
        return weighted_logprob(
            model, tokens, SEGMENTS, weights, remat="none", block_bytes=FIVE_ROWS
        )

    (total, same), wanted = jax.jit(jax.value_and_grad(summed, has_aux=True))(model)
    for remat in ("full", "dots"):
        slope = jax.jit(jax.value_and_grad(partial(scored, remat=remat), has_aux=True))
        (value, scores), gradient = slope(model)
        assert float(value) == pytest.approx(float(total), rel=1e-5)
        np.testing.assert_allclose(scores.logprobs, same.logprobs, atol=1e-5)
        np.testing.assert_array_equal(scores.correct, same.correct)
        assert_trees_close(gradient, wanted, atol=3e-5)


def test_only_targets_are_scored_and_hits_are_the_likeliest_tokens():
    model = tiny_model(2, layers=1)
    tokens, _ = batch()
    targets = np.zeros(SEGMENTS.shape, bool)
    targets[0, 4:], targets[1, :7] = True, True
    whole = jax.jit(sequence_scores)(model, tokens, SEGMENTS)
    in_blocks = jax.jit(partial(sequence_scores, block_bytes=FIVE_ROWS))
    some = in_blocks(model, tokens, SEGMENTS, targets=targets)
    kept = scored_tokens(SEGMENTS, targets)
    np.testing.assert_allclose(some.logprobs, np.where(kept, whole.logprobs, 0.0), atol=1e-5)
    np.testing.assert_array_equal(some.correct, kept & np.asarray(whole.correct))
    likeliest = np.asarray(model(tokens[:1]))[0, :-1].argmax(-1)
    np.testing.assert_array_equal(whole.correct[0, 1:], likeliest == tokens[0, 1:])


WIDE = {"layers": 1, "vocab_size": 4096, "tied_embeddings": True}
ROWS, LENGTH = 8, 128


@pytest.mark.parametrize("weighted", [False, True])
def test_all_logits_are_never_in_memory(weighted):
    abstract, _ = abstract_model(tiny_model(0, **WIDE).config)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def loss(model, tokens, segments):
        if weighted:
            weights = jnp.ones(tokens.shape)
            return weighted_logprob(model, tokens, segments, weights, block_bytes=2**20)[0]
        return sequence_scores(model, tokens, segments, block_bytes=2**20).logprobs.sum()

    compiled = jax.jit(jax.grad(loss)).lower(abstract, ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < ROWS * LENGTH * 4096 * 4


def test_recomputed_layers_take_less_memory():
    fields = {"layers": 8, "width": 64, "head_width": 16, "mlp_width": 256}
    abstract, _ = abstract_model(tiny_model(0, **fields).config, scan_layers=True)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def used(remat):
        def loss(model, tokens, segments):
            return sequence_scores(model, tokens, segments, remat=remat).logprobs.sum()

        compiled = jax.jit(jax.grad(loss)).lower(abstract, ids, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full, dots, none = used("full"), used("dots"), used("none")
    assert full < dots < none


def test_half_precision_is_close_and_sums_in_float32():
    model = tiny_model(3, layers=1, sharpness=4.0)
    tokens, _ = batch()
    half = Model(model.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))

    def total(model):
        logprobs = sequence_scores(model, tokens, SEGMENTS).logprobs
        return logprobs.sum(), logprobs

    (_, near), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(half)
    assert near.dtype == jnp.float32
    _, wide = jax.jit(total)(model)
    np.testing.assert_allclose(near, wide, atol=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
