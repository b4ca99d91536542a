"""Points of a curve, and what is no curve."""

import pytest

from w2s_jax.bench.config import GenerateBenchConfig, SearchBenchConfig
from w2s_jax.bench.curves import points
from w2s_jax.errors import InputError


def test_without_a_curve_there_is_one_point():
    options = SearchBenchConfig()
    assert points(options) == {"": options}


def test_points_differ_in_one_size():
    options = GenerateBenchConfig(curve=("max-new-tokens=8,16",), samples=2)
    found = points(options)
    assert found == {
        f"max_new_tokens={count}": GenerateBenchConfig(max_new_tokens=count, samples=2)
        for count in (8, 16)
    }


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        ("layers=1", "the sizes of a curve are batch_size, beam_width, successors, chunk_length,"),
        ("samples=1", "max_new_tokens, wk$"),
        ("batch_size=", "write batch_size=V,V,.."),
        ("batch_size=1,two", "write batch_size=V,V,.."),
        ("wk=4", "write wk=VxV,VxV,.."),
    ],
)
def test_what_is_no_curve_is_refused(curve, told):
    with pytest.raises(InputError, match=told):
        points(SearchBenchConfig(curve=(curve,)))
