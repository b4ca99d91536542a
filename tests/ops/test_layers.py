"""Quantised weights: how far they are off, and products with them against NumPy.

Norms against NumPy in float64, their gradients against jax's own of the plain formula.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from w2s_jax.ops.layers import (
    FEW_ROWS,
    OutputMajor,
    QTensor,
    dequantize,
    dot,
    input_major,
    layer_norm,
    output_major,
    quantize_array,
    rms_norm,
    take_rows,
)

# In one program each, not one for every operation.
compiled = jax.jit(quantize_array, static_argnames=("contracted", "bits", "group", "scale_dtype"))
FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
KINDS = [(8, None, "float32"), (8, 4, "float32"), (4, None, "float32"), (4, 4, "bfloat16")]


def whole(tensor: QTensor) -> np.ndarray:
    """The weight by brute force, in float64."""
    values, scales = (np.asarray(x).astype(np.float64) for x in (tensor.values, tensor.scales))
    for axis, (size, parts) in enumerate(zip(values.shape, scales.shape, strict=True)):
        scales = np.repeat(scales, size // parts, axis=axis)
    return values * scales


@given(
    x=arrays.arrays(np.float32, (3, 8, 2), elements=FINITE),
    kind=st.sampled_from(KINDS),
    contracted=st.sampled_from([(-2,), (-3, -2)]),
)
def test_no_entry_is_off_by_more_than_half_its_scale(x, kind, contracted):
    bits, group, scale_dtype = kind
    tensor = quantize_array(x, contracted, bits=bits, group=group, scale_dtype=scale_dtype)
    off = np.abs(whole(tensor) - x)
    unit = whole(QTensor(np.ones(x.shape), tensor.scales, tensor.axis, group, "float32"))
    assert (off <= unit * 0.5 * (1 + 1e-4)).all()
    assert np.abs(np.asarray(tensor.values).astype(int)).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("bits", "group", "scale_dtype"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_and_numpy_round_alike(bits, group, scale_dtype, dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 8, 48)) * np.exp(2 * rng.normal(size=(64, 8, 48)))).astype(dtype)
    x[:, :, 0] = 0
    make = partial(
        quantize_array, contracted=(-3, -2), bits=bits, group=group, scale_dtype=scale_dtype
    )
    here, there = make(x), jax.jit(make)(x)
    assert isinstance(here.values, np.ndarray)
    assert isinstance(here.scales, np.ndarray)
    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.scales, there.scales)
    assert here.dtype == there.dtype == dtype


def test_what_is_not_finite_is_not_hidden():
    x = np.ones((4, 2), np.float32)
    x[1, 0], x[2, 1] = np.nan, np.inf
    for tensor in (quantize_array(x, (-2,)), compiled(x, contracted=(-2,))):
        found = np.asarray(jax.jit(dequantize)(tensor))
        assert not np.isfinite(found).all(axis=0).any()


# equation of x and the weight, contracted axes, arguments of `dot`
PRODUCTS = {
    "in": ("rxd,dhc->rxhc", (2, 3, 16), (16, 4, 8), (-3,), {}),
    "out": ("rxhc,hcd->rxd", (2, 3, 4, 8), (4, 8, 16), (-3, -2), {"contract": 2}),
    "head": ("rd,dv->rv", (5, 16), (16, 12), (-2,), {"dtype": jnp.float32}),
    "tied": ("rd,vd->rv", (5, 16), (12, 16), (-1,), {"transposed": True, "dtype": jnp.float32}),
}


@pytest.mark.parametrize(
    ("name", "bits", "group", "scale_dtype"),
    [(name, *kind) for name, kind in zip(PRODUCTS, KINDS, strict=False)]
    + [("out", 4, 8, "float32"), ("head", *KINDS[-1]), ("tied", 4, 8, "float32")],
)
def test_products_are_those_with_the_whole_weight(name, bits, group, scale_dtype):
    equation, x_shape, shape, contracted, options = PRODUCTS[name]
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=x_shape), rng.normal(size=shape).astype(np.float32)
    x = x.astype(np.float32)

    @jax.jit
    def run(x, weight):
        made = quantize_array(weight, contracted, bits=bits, group=group, scale_dtype=scale_dtype)
        return made, dot(x, made, **options), dot(x, weight, **options), dequantize(made)

    tensor, found, plain, again = run(x, weight)
    expected = np.einsum(equation, x.astype(np.float64), whole(tensor))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(plain, np.einsum(equation, x, weight), atol=2e-5)
    np.testing.assert_allclose(again, whole(tensor), rtol=1e-6)


@pytest.mark.parametrize("kind", [None, (8, None), (4, 4)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_an_output_major_weight_gives_the_same_product(name, kind):
    equation, x_shape, shape, contracted, options = PRODUCTS[name]
    rng = np.random.default_rng(2)
    axes = tuple(axis + len(shape) for axis in contracted)
    # One row, few, and many are products of different forms.
    counts = (1, 7, FEW_ROWS, FEW_ROWS + 1)
    given = [rng.normal(size=(n, *x_shape[-len(axes) :])).astype(np.float32) for n in counts]
    weight = rng.normal(size=shape).astype(np.float32)
    index = np.array([1, 0])

    @jax.jit
    def run(given, weight):
        held = weight
        if kind is not None:
            held = quantize_array(weight, contracted, bits=kind[0], group=kind[1])
        kept = output_major(held, axes)
        found = [dot(x, kept, **options) for x in given]
        taken = take_rows(kept, index) if name == "tied" else None
        return held, found, input_major(kept, axes), taken

    held, found, again, taken = run(given, weight)
    assert jax.tree.structure(again) == jax.tree.structure(held)
    jax.tree.map(np.testing.assert_array_equal, again, held)
    value = weight if kind is None else whole(held)
    for x, one in zip(given, found, strict=True):
        expected = np.einsum(equation.replace("x", ""), x.astype(np.float64), value)
        np.testing.assert_allclose(one, expected, atol=2e-5)
        assert one.dtype == np.float32
    if taken is not None:
        np.testing.assert_allclose(taken, value[index], rtol=1e-6)


def test_few_rows_have_the_weight_on_the_left():
    """Of itself XLA puts the larger side on the right, where CPUs are slower."""
    kept = OutputMajor(jnp.ones((24, 16)), (16, 24))
    for rows, left in ((1, False), (2, True), (FEW_ROWS, True), (FEW_ROWS + 1, False)):
        text = jax.jit(dot).lower(jnp.ones((rows, 16)), kept).compile().as_text()
        assert (f"f32[24,{rows}]{{1,0}} dot(" in text) == left


def test_products_in_bfloat16_keep_its_dtype():
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(16, 12)).astype(jnp.bfloat16)
    x = rng.normal(size=(3, 16)).astype(jnp.bfloat16)
    for bits, group in ((8, None), (4, 8)):
        tensor = compiled(weight, contracted=(-2,), bits=bits, group=group)
        found = jax.jit(dot)(x, tensor)
        assert found.dtype == jnp.bfloat16
        expected = np.asarray(x, np.float64) @ whole(tensor)
        # Two roundings to 8 bits of sums of this size, where the plain product has one.
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2**-6 * 10)


@pytest.mark.parametrize("group", [None, 4])
def test_rows_of_a_table_come_in_its_dtype(group):
    table = np.random.default_rng(3).normal(size=(9, 8)).astype(jnp.bfloat16)
    tensor, index = compiled(table, contracted=(-1,), group=group), np.array([[3, 0], [8, 3]])
    found, plain = jax.jit(lambda *tables: [take_rows(held, index) for held in tables])(
        tensor, table
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), whole(tensor)[index], rtol=2**-8)
    np.testing.assert_array_equal(plain, table[index])


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 4)])
def test_a_gradient_passes_to_the_input(bits, group):
    rng = np.random.default_rng(4)
    weight, x = (rng.normal(size=size).astype(np.float32) for size in ((8, 6), (3, 8)))
    tensor = compiled(weight, contracted=(-2,), bits=bits, group=group)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(dot(x, tensor)))))(x)
    weight = whole(tensor)
    np.testing.assert_allclose(slope, 2 * (x @ weight) @ weight.T, atol=1e-4)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16)])
def test_no_loop_converts_the_weight_ahead_of_itself(bits, group):
    """XLA's CPU compiler moves what does not change out of loops, to where it stays alive."""
    weight = np.random.default_rng(5).normal(size=(48, 48)).astype(np.float32)
    tensor = jax.tree.map(jnp.asarray, quantize_array(weight, (-2,), bits=bits, group=group))

    def run(x, tensor):
        return jax.lax.scan(lambda x, _: (jnp.tanh(dot(x, tensor)), None), x, None, length=5)[0]

    def free(x, tensor):
        step = lambda x, _: (jnp.tanh(x @ tensor.values.astype(x.dtype)), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=5)[0]

    def carried(run):
        text = jax.jit(run).lower(jnp.ones((2, 48)), tensor).compile().as_text()
        loops = [line for line in text.splitlines() if " while(" in line]
        assert loops, "the loop should be one in the program"
        return any("f32[48,48]" in line or "f32[3,16,48]" in line for line in loops)

    assert not carried(run)
    assert carried(free), "the compiler no longer does what `dot` guards against"


def normals(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 5, 8)) * 3 + 1
    return tuple(np.float32(a) for a in (x, rng.normal(size=8), rng.normal(size=8)))


def plain_rms(x, scale, offset):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * (offset + scale)


def plain_layer(x, scale, bias):
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-5) * scale + bias


@partial(jax.jit, static_argnums=0)
def pull(norm, slope, *arguments):
    out, pulled = jax.vjp(norm, *arguments)
    return out, pulled(slope)


def compare(ours, theirs, arguments):
    slope = np.float32(np.random.default_rng(1).normal(size=arguments[0].shape))
    (out, pulled), (wanted, expected) = (pull(norm, slope, *arguments) for norm in (ours, theirs))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for one, other in zip(pulled, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x, scale, _ = normals()
    compare(
        lambda x, s: rms_norm(x, s, epsilon=1e-5, offset=offset),
        lambda x, s: plain_rms(x, s, offset),
        (x, scale),
    )


def test_layer_norm():
    compare(lambda *a: layer_norm(*a, epsilon=1e-5), plain_layer, normals())


def test_half_precision_comes_back_in_its_dtype():
    given = [a.astype(jnp.bfloat16) for a in normals()]
    out, pulled = pull(partial(layer_norm, epsilon=1e-5), given[0], *given)
    assert [a.dtype for a in (out, *pulled)] == [jnp.dtype(jnp.bfloat16)] * 4
