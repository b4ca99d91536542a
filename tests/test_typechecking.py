"""Tests run with the shapes of annotations checked, of functions, aliases and dataclasses alike."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from w2s_jax.cli.main import main
from w2s_jax.ops.layers import rms_norm
from w2s_jax.train import losses
from w2s_jax.train.losses import Logprobs


def test_other_shapes_than_the_annotated_are_refused():
    with pytest.raises(TypeCheckError, match="rms_norm"):
        rms_norm(jnp.ones((2, 4)), jnp.ones((2, 4)), epsilon=1e-6)


def test_functions_by_an_alias_are_checked_and_those_without_arrays_are_as_they_were():
    aliased = [
        made
        for made in vars(losses).values()
        if inspect.isfunction(made) and Logprobs in getattr(made, "__annotations__", {}).values()
    ]
    assert aliased
    assert all(hasattr(made, "__wrapped__") for made in aliased)
    assert not hasattr(main, "__wrapped__")


def test_dataclasses_are_checked_where_code_makes_them_and_not_where_jax_rebuilds_them():
    pair = losses.PairLogprobs(*[jnp.zeros(2)] * 4)
    with pytest.raises(TypeCheckError):
        losses.PairLogprobs(*[jnp.zeros((2, 2))] * 4)
    assert jax.tree.map(lambda x: x.shape, pair).policy_chosen == (2,)
