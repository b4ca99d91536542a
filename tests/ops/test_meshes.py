"""Mesh specs, meshes over several slices, and the meshes that a message names instead."""

import math
import re
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.ops import sharding
from w2s_jax.ops.sharding import (
    device_grid,
    mesh_shape,
    mesh_shapes,
    nearest_meshes,
    slice_count,
    spec_of,
)


@pytest.mark.parametrize(
    ("spec", "devices", "shape"),
    [
        ("data=2,fsdp=2,tensor=2", 8, (2, 2, 2)),
        ("tensor=4, data=2", 8, (2, 1, 4)),
        ("fsdp=-1", 8, (1, 8, 1)),
        ("data=-1,tensor=2", 8, (4, 1, 2)),
        ("data=-1,tensor=8", 8, (1, 1, 8)),
        ("", 1, (1, 1, 1)),
        ("dcn_data=2,fsdp=-1", 8, (2, 4, 1)),
        ("dcn_fsdp=2,fsdp=2,dcn_data=2", 8, (2, 4, 1)),
    ],
)
def test_mesh_shape(spec, devices, shape):
    assert mesh_shape(spec, devices) == shape


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_an_open_axis_takes_what_the_others_leave(data, fsdp, tensor):
    spec = f"fsdp={fsdp},data=-1,tensor={tensor}"
    assert mesh_shape(spec, data * fsdp * tensor) == (data, fsdp, tensor)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=3", "multiply to 3, which must equal the 8 devices"),
        ("data=2", "multiply to 2, which must equal the 8 devices"),
        ("data=-1,tensor=3", "multiply to 3, which must divide the 8 devices"),
        ("data=-1,fsdp=-1", "data and fsdp are -1; only one"),
        ("model=8", "axis 'model' is not one of data, fsdp, tensor (and dcn_data"),
        ("dcn_data=-1", "dcn_data is -1; give it the number of slices"),
        ("data=2,data=4", "axis 'data' is named twice"),
        ("data=0", "data is '0'; it must be 1 or above, or -1"),
        ("data=-2", "data is '-2'"),
        ("data=two", "data is 'two'"),
        ("data", "data is ''"),
    ],
)
def test_wrong_mesh_specs(spec, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        mesh_shape(spec, 8)
    assert repr(spec) in str(error.value)


def chip(index, at, platform="tpu"):
    return Mock(spec=jax.Device, id=index, slice_index=at, platform=platform)


@pytest.fixture
def chips(monkeypatch):
    """Two slices of four chips, given in a mixed order; no machine is asked how they are wired."""
    monkeypatch.setattr(sharding, "_within", lambda shape, part: np.array(part).reshape(shape))
    return [chip(i, i % 2) for i in range(8)]


def test_slices_are_the_major_part_of_their_axis(chips):
    placed = device_grid("dcn_data=2,data=2,tensor=2", chips)
    assert placed.shape == (4, 1, 2)
    slices = np.vectorize(lambda one: one.slice_index)(placed)
    assert (slices[:2] == 0).all()
    assert (slices[2:] == 1).all()
    both = np.vectorize(lambda one: one.slice_index)(device_grid("dcn_fsdp=2,fsdp=4", chips))
    assert both[0, :, 0].tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("spec", ["data=8", "dcn_data=4,data=2"])
def test_the_dcn_axes_are_the_slices(chips, spec):
    with pytest.raises(InputError, match="devices are of 2; write dcn_data=2"):
        device_grid(spec, chips)


def test_virtual_devices_are_cut_into_runs(monkeypatch, chips):
    virtual = [chip(i, 0, "cpu") for i in range(8)]
    placed = device_grid("dcn_data=2,fsdp=4", virtual)
    assert [[one.id for one in row.ravel()] for row in placed] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(st.integers(1, 48))
def test_every_shape_of_so_many_devices_once(devices):
    found = list(mesh_shapes(devices))
    assert len(found) == len(set(found))
    assert all(math.prod(shape) == devices for shape in found)
    assert (devices, 1, 1) in found
    for shape in found:
        assert mesh_shape(spec_of(shape), devices) == shape


def test_the_nearest_meshes_come_first():
    found = nearest_meshes((2, 2, 4), lambda shape: shape[2] <= 2)
    assert found[0] in ("data=4,fsdp=2,tensor=2", "data=2,fsdp=4,tensor=2")
    assert len(found) == 3
    assert nearest_meshes((1, 1, 2), lambda shape: False) == []


def test_slices_of_a_spec():
    specs = ("", "data=2", "dcn_data=2,fsdp=4", "dcn_fsdp = 3, dcn_data=2")
    assert [slice_count(spec) for spec in specs] == [1, 1, 2, 6]
