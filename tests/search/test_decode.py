"""Reading by parts – prefix, last tokens, token steps, chunks – against one full forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import VOCAB, tiny_model
from w2s_jax.models.cache import commit_chunk
from w2s_jax.ops import attention, tpu
from w2s_jax.ops.attention import Rope
from w2s_jax.ops.tpu import parts_kernel, parts_sizes
from w2s_jax.search.decode import (
    prefill,
    read_chunk,
    read_stems,
    read_step,
    start_cache,
    start_chunk,
)

KINDS = {
    "sliding windows, parallel, stacked": {
        "sliding_windows": (3, None),
        "sliding_rope": Rope(theta=100.0),
        "parallel_residual": True,
        "rotary_width": 2,
        "query_key_norm": "width",
        "scan_layers": True,
    },
    "learned positions": {
        "layers": 1,
        "position": "learned",
        "position_offset": 2,
        "embed_width": 10,
        "norm": "layer",
        "norm_placement": "residual",
        "gated_mlp": False,
        "tied_embeddings": True,
    },
}
CAPS = {"attention_softcap": 5.0, "final_softcap": 4.0, "norm_placement": "sandwich"}
KINDS["windows, soft-caps"] = {
    "sliding_windows": (3, None),
    "rope_layers": (True, False),
    "residual_multiplier": 0.7,
    "logit_divisor": 1.3,
    **CAPS,
}
KINDS["windows, soft-caps, stacked"] = KINDS["windows, soft-caps"] | {"scan_layers": True}
# Each kind of layer and each way to attend meets another: ways to attend know nothing of a kind but
# its windows, soft-caps and stacking.
CASES = [
    ("learned positions", ""),
    ("windows, soft-caps", "in blocks"),
    ("sliding windows, parallel, stacked", "in turns"),
    ("windows, soft-caps, stacked", "by the kernel"),
]
SLOTS, WIDTH, COUNT, LENGTH = 2, 2, 2, 3
ROWS = WIDTH * COUNT
LONGEST = 12
# Programs: their operations one by one would each be compiled.
put_prompt, stems = jax.jit(prefill), jax.jit(read_stems)
commit = jax.jit(commit_chunk, static_argnames="count")


def full_logprobs(model, prompts, responses):
    """[P, R, n]: the log-prob of each token of responses [P, R, n]; one program for all lengths."""
    slots, rows, length = responses.shape
    tokens = np.zeros((slots, rows, LONGEST), np.int32)
    for slot, prompt in enumerate(prompts):
        tokens[slot, :, : len(prompt)] = prompt
        tokens[slot, :, len(prompt) : len(prompt) + length] = responses[slot]
    logits = np.asarray(model(tokens.reshape(-1, LONGEST))).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logprobs = logprobs.reshape(slots, rows, LONGEST, -1)
    places = [len(prompt) - 1 + np.arange(length) for prompt in prompts]
    behind = np.stack([logprobs[slot][:, places[slot]] for slot in range(slots)])
    return np.take_along_axis(behind, responses[..., None], -1)[..., 0]


def as_on_tpus(*arrays, default, tpu=None):
    return (tpu or default)(*arrays)


def asked_and_taken(asked, *arrays, takes=parts_kernel.takes):
    asked.append(takes(*arrays))
    return asked[-1]


@pytest.mark.parametrize(("kind", "parts"), CASES)
def test_reading_by_parts_equals_one_full_pass(kind, parts, monkeypatch):
    """Two chunks with a reorder between them, ragged prompts, token by token and teacher-forced.

    Keys may be attended to in blocks and slots in turns, as those of large models are, and on some
    chips all parts by a kernel.
    """
    asked = []
    if parts == "by the kernel":
        taken = partial(asked_and_taken, asked)
        monkeypatch.setattr(tpu, "has_kernel", lambda *_: True)
        monkeypatch.setattr(parts_kernel, "LANES", 4)
        monkeypatch.setattr(parts_sizes, "LANES", 4)
        monkeypatch.setattr(parts_kernel, "takes", taken)
        monkeypatch.setattr(parts_kernel, "attend", partial(parts_kernel.attend, interpret=True))
    if parts == "in blocks":
        for name in ("LANES", "BLOCK_KEYS", "BLOCK_BYTES", "TPU_BLOCK_BYTES"):
            monkeypatch.setattr(attention, name, 2 if name == "BLOCK_KEYS" else 1)
    if parts == "in turns":
        monkeypatch.setattr(attention, "TPU_TURN_BYTES", 1)
        monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpus)
    model = tiny_model(0, sharpness=6.0, **KINDS[kind])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (5, 2)]
    chunks = rng.integers(0, VOCAB, (2, SLOTS, ROWS, LENGTH)).astype(np.int32)
    # Chunk 0's kept rows: both of one hypothesis in slot 0, crossed over in slot 1.
    rows = np.asarray([[1, 0], [3, 1]], np.int32)
    parents = rows // COUNT

    def start():
        cache = start_cache(
            model, slots=SLOTS, hypotheses=WIDTH, prefix_capacity=6, committed_capacity=2 * LENGTH
        )
        for slot, prompt in enumerate(prompts):
            padded = np.asarray(prompt + [0] * (6 - len(prompt)), np.int32)
            cache = put_prompt(model, cache, slot, padded, len(prompt))
        return cache

    def by_steps(cache, last, tokens):
        logits, cache = read_stems(model, cache, last)
        first = jnp.repeat(logits, COUNT, axis=1)

        def step(chunk, place):
            logits, chunk = read_step(model, cache, chunk, tokens[:, :, place], place)
            return chunk, logits

        chunk = start_chunk(model, SLOTS, ROWS, LENGTH - 1)
        chunk, others = jax.lax.scan(step, chunk, jnp.arange(LENGTH - 1, dtype=jnp.int32))
        logprobs = jax.nn.log_softmax(jnp.stack([first, *others], axis=2))
        return jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0], cache, chunk

    def by_chunk(cache, last, tokens):
        return read_chunk(model, cache, last, tokens)

    empty = start()
    last = np.asarray([[prompt[-1]] * WIDTH for prompt in prompts], np.int32)
    kept = np.take_along_axis(chunks[0], rows[..., None], axis=1)
    whole = np.concatenate([np.repeat(kept, COUNT, axis=1), chunks[1]], axis=2)
    expected = full_logprobs(model, prompts, whole)[..., LENGTH:]
    first_expected = full_logprobs(model, prompts, chunks[0])
    for read in (by_steps, by_chunk):
        read = jax.jit(read)
        seen, cache, chunk = read(empty, last, chunks[0])
        np.testing.assert_allclose(seen, first_expected, atol=1e-4)
        cache = commit(cache, chunk, parents=parents, rows=rows, count=LENGTH - 1)
        seen, cache, chunk = read(cache, kept[..., -1], chunks[1])
        np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert bool(asked) == (parts == "by the kernel")
    assert all(asked)


def small_cache(model):
    return start_cache(model, slots=2, hypotheses=1, prefix_capacity=4, committed_capacity=3)


def test_a_refilled_slot_forgets_and_its_neighbours_do_not():
    model = tiny_model(0, layers=1)
    cache = small_cache(model)
    first, second = np.asarray([5, 6, 7, 8]), np.asarray([9, 4, 0, 0])
    for slot in (0, 1):
        cache = put_prompt(model, cache, slot, first, 4)
    _, cache = stems(model, cache, np.asarray([[8], [8]]))
    cache = put_prompt(model, cache, 0, second, 2)
    assert cache.prefix_length.tolist() == [1, 3]
    assert cache.committed_length.tolist() == [[0], [1]]
    # A NaN that is only masked would still be one in a sum.
    assert [bool(np.any(keys)) for keys in np.asarray(cache.committed[0].keys)] == [False, True]
    logits, _ = stems(model, cache, np.asarray([[4], [11]]))
    whole = model(np.asarray([[9, 4, 0, 0, 0], [5, 6, 7, 8, 11]]))
    np.testing.assert_allclose(logits[0, 0], whole[0, 1], atol=1e-4)
    np.testing.assert_allclose(logits[1, 0], whole[1, -1], atol=1e-4)


def test_what_passes_the_capacity_is_dropped():
    model = tiny_model(0, layers=1)
    cache = small_cache(model)
    cache = put_prompt(model, cache, 0, np.asarray([4, 5, 0, 0]), 2)
    for token in (5, 6, 7):
        before = cache.committed[0].keys
        _, cache = stems(model, cache, np.asarray([[token], [token]]))
        assert np.any(np.asarray(before) != np.asarray(cache.committed[0].keys))
    _, more = stems(model, cache, np.asarray([[8], [8]]))
    np.testing.assert_array_equal(more.committed[0].keys, cache.committed[0].keys)


def test_devices_of_a_mesh_read_their_own_slots_and_heads(run_python):
    """In blocks a device's own scores count: as many a device, in as many blocks.

    The kernel is called on each device's share, for every way to read.
    """
    run_python(BLOCKS + KERNEL, devices=8)


@pytest.mark.slow
def test_the_kernel_on_a_mesh_reads_as_the_plain_way_does(run_python):
    run_python(BLOCKS + KERNEL + PLAIN, devices=8)


BLOCKS = """
import jax, jax.numpy as jnp, re
from tests.tiny import tiny_model
from w2s_jax.search.decode import read_stems, start_cache
from w2s_jax.models.model import shard_model
from w2s_jax.ops import attention
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import SEARCH_RULES
attention.LANES, attention.BLOCK_KEYS = 1, 1
model = tiny_model(0, heads=4, kv_heads=2, vocab_size=24, layers=1)

def blocks(model, slots):
    cache = start_cache(
        model, slots=slots, hypotheses=1, prefix_capacity=24, committed_capacity=24
    )
    last = jnp.ones((slots, 1), int)
    text = str(jax.make_jaxpr(lambda cache, last: read_stems(model, cache, last))(cache, last))
    return re.findall(r"length=(\\d+)", text)

# One slot and two heads: 8 bytes a key.
attention.BLOCK_BYTES = attention.TPU_BLOCK_BYTES = 8 * 6
alone = blocks(tiny_model(0, heads=2, kv_heads=2, layers=1), 1)
assert alone and set(alone) == {"4"}, alone
placed = shard_model(model, make_mesh("data=4,tensor=2", jax.devices()), SEARCH_RULES)
assert blocks(placed, 4) == alone, blocks(placed, 4)
assert set(blocks(model, 4)) != set(alone)
"""


KERNEL = """
import numpy as np
from functools import partial
from w2s_jax.search.decode import read_chunk, read_step, start_chunk
from w2s_jax.ops import tpu
from w2s_jax.ops.tpu import parts_kernel, parts_sizes
parts_kernel.LANES = parts_sizes.LANES = 4
parts_kernel.attend = partial(parts_kernel.attend, interpret=True)

def read(model, last, tokens):
    sizes = {"slots": 4, "hypotheses": 2, "prefix_capacity": 6, "committed_capacity": 6}
    cache = start_cache(model, **sizes, dtype=jnp.int8)
    logits, cache = read_stems(model, cache, last)
    chunk = start_chunk(model, 4, 4, 2, jnp.int8)
    step, chunk = read_step(model, cache, chunk, tokens[:, :, 0], jnp.int32(0))
    seen, _, _ = read_chunk(model, cache, last, tokens)
    return logits, step, seen

rng = np.random.default_rng(0)
last, tokens = rng.integers(0, 24, (4, 2)), rng.integers(0, 24, (4, 4, 3))
mesh = make_mesh("data=2,fsdp=2,tensor=2", jax.devices())
# The bytes of a block stay as small as they were made: the kernel knows nothing of them.
placed = shard_model(model, mesh, SEARCH_RULES)
tpu.has_kernel = lambda *_: True
traced = jax.jit(partial(read, placed)).trace(last, tokens)
text = str(traced.jaxpr)
assert text.count("pallas_call[") == text.count("shard_map[") == 3, text
"""

PLAIN = """
tpu.has_kernel = lambda *_: False
wanted = jax.jit(lambda *arrays: read(placed, *arrays))(last, tokens)
for found, one in zip(traced.lower().compile()(last, tokens), wanted, strict=True):
    np.testing.assert_allclose(found, one, atol=2e-4)
"""
