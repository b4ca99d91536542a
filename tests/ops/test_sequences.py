"""Kernels of whole sequences: Pallas' interpreted, cuDNN's mathematics, and what is lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.ops import sequences
from w2s_jax.ops.sequences import Reach, attend_sequence, blocks_of, cudnn, splash

LENGTH = 256
SCALE = 0.3


def arrays(length=LENGTH, heads=2, kv_heads=1, width=16, rows=(1, 2), dtype=jnp.float32):
    rng = np.random.default_rng(length + heads)
    shapes = [(*rows, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def sees(reach, rows, length):
    """The rule again, token by token: [P, A, X, X]."""
    window = reach.windows[0 if reach.chosen is None else int(reach.chosen)]
    seen = np.zeros((*rows, length, length), bool)
    for row in np.ndindex(*rows):
        for query in range(length):
            first = 0 if window is None else max(0, query - window + 1)
            seen[row][query, first : query + 1] = True
        for held, same in ((reach.segments, np.equal), (reach.text, np.logical_and)):
            if held is not None:
                seen[row] &= same.outer(np.asarray(held)[row], np.asarray(held)[row])
    return seen


def plain(query, keys, values, seen, softcap):
    """Softmax attention in float64 as one reads it, and all zeros where nothing is seen."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.zeros_like(query)
    share = query.shape[3] // keys.shape[3]
    for row in np.ndindex(*query.shape[:2]):
        for head in range(query.shape[3]):
            scores = SCALE * query[row][:, head] @ keys[row][:, head // share].T
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max()) * seen[row]
            total = np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            out[row][:, head] = weights / total @ values[row][:, head // share]
    return out


def naive(query, keys, values, seen, softcap):
    share = query.shape[3] // keys.shape[3]
    keys, values = (jnp.repeat(x, share, axis=3) for x in (keys, values))
    scores = SCALE * jnp.einsum("paxhc,payhc->pahxy", query, keys)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, :, None], scores, -1e9)
    return jnp.einsum("pahxy,payhc->paxhc", jax.nn.softmax(scores), values)


def check(kernel, given, reach, softcap=None, tolerance=1e-3):
    """Values as in NumPy's float64 and gradients as of `naive`, where there is text."""
    query, keys, values, slope = given
    rows, length = query.shape[:2], query.shape[2]
    text = np.ones((*rows, length), bool) if reach.text is None else np.asarray(reach.text)
    slope = np.where(text[..., None, None], slope, np.zeros_like(slope))
    seen = sees(reach, rows, length)

    @jax.jit
    def found(query, keys, values, slope):
        out, pull = jax.vjp(lambda *three: kernel(*three, reach), query, keys, values)
        return out, pull(slope.astype(out.dtype))

    @jax.jit
    def expected(query, keys, values, slope):
        return jax.vjp(lambda *three: naive(*three, seen, softcap), query, keys, values)[1](slope)

    out, pulled = found(query, keys, values, slope)
    wanted = plain(query, keys, values, seen, softcap)
    np.testing.assert_allclose(np.asarray(out)[text], wanted[text], atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(pulled, expected(query, keys, values, slope), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def padded(*counts, length=LENGTH):
    """Text [1, A, X]: so many tokens of padding on the left, or (negative) on the right."""
    index = np.arange(length)
    return np.array([[index >= n if n >= 0 else index < length + n for n in counts]])


PACKED = [np.repeat([1, 2, 3, 0], [100, 90, 50, 16]), [1] * 130 + [2] * 126]
PACKED = np.array(PACKED, np.int32)[None]
CAPPED = "grouped, soft-cap, a window of more than there is"
CASES = {
    CAPPED: (
        {"heads": 4, "kv_heads": 2},
        Reach((4096,)),
        2.0,
    ),
    "one of two windows, padding": (
        {},
        Reach((30, None), np.int32(0), text=padded(70, -130)),
        None,
    ),
    "packed documents": ({}, Reach((90,), segments=PACKED), None),
    "a length that no block divides": (
        {"length": 200},
        Reach(text=padded(9, -3, length=200)),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_attention_interpreted(case):
    shapes, reach, softcap = CASES[case]

    def kernel(*given):
        return splash(*given, scale=SCALE, softcap=softcap, interpret=True)

    check(kernel, arrays(**shapes), reach, softcap)


@pytest.mark.parametrize("case", ["one of two windows, padding"])
def test_the_mathematics_of_cudnn(case):
    shapes, reach, _ = CASES[case]

    def kernel(*given):
        return cudnn(*given, scale=SCALE, implementation="xla")

    check(kernel, arrays(**shapes), reach)


@pytest.mark.parametrize("case", [CAPPED, "packed documents"])
def test_without_a_kernel(case, monkeypatch):
    """In chunks of queries, the last one shorter."""
    monkeypatch.setattr(sequences, "CHUNK", 100)
    shapes, reach, softcap = CASES[case]

    def kernel(*given):
        return attend_sequence(*given, scale=SCALE, softcap=softcap)

    check(kernel, arrays(**shapes), reach, softcap)
    assert "tpu_custom_call" not in lowered(kernel, reach, "cpu", **shapes)


def lowered(attend, reach, platform, **shapes):
    """The text of a training step's attention, rematerialised in a scan over two layers."""
    *given, _ = arrays(**shapes)

    def step(*given):
        def layer(query, _):
            out = attend(query, *given[1:], reach)
            return query + out.astype(query.dtype), None

        query, _ = jax.lax.scan(jax.checkpoint(layer), given[0], None, length=2)
        return jnp.square(query).sum()

    step = jax.jit(jax.grad(step, argnums=(0, 1, 2)))
    return step.trace(*given).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", ["one of two windows, padding", "packed documents"])
def test_a_program_for_tpus_has_the_kernel_and_no_scores(case):
    shapes, reach, softcap = CASES[case]

    def attend(*given):
        return attend_sequence(*given, scale=SCALE, softcap=softcap)

    text = lowered(attend, reach, "tpu", **shapes)
    # Forward once in the pass and once in its gradient, whose other parts are two kernels.
    assert text.count("tpu_custom_call") >= 4 * len(reach.windows)
    length = shapes.get("length", LENGTH)
    assert f"{length}x{length}x" not in text
    assert f"{length}x{length}x" in lowered(attend, reach, "cpu", **shapes)


def test_short_sequences_have_no_kernel():
    given = arrays(length=sequences.SHORTEST - 1)[:3]
    assert not sequences.kernels(*given, Reach(), SCALE)
    assert set(sequences.kernels(*arrays()[:3], Reach(), SCALE)) == {"tpu"}


@pytest.mark.parametrize(
    ("taken", "shapes", "reach", "softcap"),
    [
        (True, {"dtype": jnp.bfloat16}, Reach((50,), text=padded(70, -130)), None),
        (True, {"dtype": jnp.bfloat16, "heads": 4, "kv_heads": 2}, Reach(), None),
        (False, {"dtype": jnp.bfloat16}, Reach(segments=PACKED), None),
        (False, {"dtype": jnp.bfloat16}, Reach(), 2.0),
        (False, {"dtype": jnp.bfloat16, "width": 12}, Reach(), None),
        (False, {}, Reach(), None),
    ],
)
def test_cudnn_takes_what_it_knows(taken, shapes, reach, softcap, monkeypatch):
    """Lowered as where there is a device, which jax asks for while it traces."""
    inner = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inner, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(sequences, "_has_cudnn_attention", lambda: True)

    def attend(*given):
        return attend_sequence(*given, scale=SCALE, softcap=softcap)

    text = lowered(attend, reach, "cuda", **shapes)
    assert (text.count("fmha") > 0) == taken
    assert (f"{LENGTH}x{LENGTH}x" in text) != taken
    assert "tpu_custom_call" not in text


def test_blocks_fill_up_little():
    for length in (128, 129, 200, 256, 300, 512, 1000, 1024, 4096, 5000, 32768):
        block, missing = blocks_of(length)
        assert (length + missing) % block == 0
        assert missing < 128 or 8 * missing <= length
    assert blocks_of(4096) == (512, 0)


SHARED = """
import jax, jax.numpy as jnp, numpy as np
from tests.ops.test_sequences import PACKED, SCALE, arrays, check
from w2s_jax.ops.sequences import Reach, splash, cudnn
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.ops.sharding import DEFAULT_RULES, Placement

def kernel(*given):
    return splash(*given, scale=SCALE, interpret=True)

# Rows over data, and over tensor: query heads with key heads of their own, then with shared ones.
for kv_heads, rows in ((2, (2, 1)), (1, (1, 2))):
    place = Placement(make_mesh("data=2,tensor=4"), DEFAULT_RULES)
    segments = PACKED.reshape(*rows, -1)
    given = arrays(heads=8, kv_heads=kv_heads, rows=rows)
    check(kernel, given, Reach(segments=segments, placement=place))
    print(rows, kv_heads)
    out = jax.jit(lambda *x: kernel(*x, Reach(placement=place)))(*given[:3])
    at = out.sharding.shard_shape(out.shape)
    assert at[0] == 1 and at[3] == 2, at
"""


def test_each_device_has_its_rows_and_heads(run_python):
    assert run_python(SHARED, devices=8).count("\n") == 2
