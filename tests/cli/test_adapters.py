"""`w2s search` with adapters in place of checkpoints."""

import os

import pytest

from tests.cli.test_search import search, tiny
from tests.search.test_adapters import adapter
from w2s_jax.cli.convert import Convert
from w2s_jax.cli.flags import weights_stamp
from w2s_jax.text.rows import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {name: tiny(root / name, seed) for seed, name in enumerate(("policy", "untuned"))}
    found["adapter"] = adapter(root / "adapter", found["untuned"])
    Convert(found["adapter"], str(root / "merged")).run()
    return found | {"merged": str(root / "merged")}


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "A film"}, {"prompt": "We"}])
    return tmp_path / "in.jsonl"


@pytest.mark.parametrize(("role", "method"), [("tuned", "cbs"), ("policy", "eft")])
def test_a_search_says_the_same_with_an_adapter_and_with_it_merged(
    folders, prompts, tmp_path, capsys, role, method
):
    found = []
    for place in ("adapter", "merged"):
        roles = {name: folders[name] for name in ("policy", "untuned")}
        roles |= {"tuned": folders["merged"], role: folders[place]}
        flags = [word for name, folder in roles.items() for word in (f"--{name}", folder)]
        assert search(flags, prompts, tmp_path / f"{place}.jsonl", "--method", method) == 0
        found.append(read_jsonl(tmp_path / f"{place}.jsonl"))
    told = capsys.readouterr()
    assert f"{role} {folders['adapter']} is an adapter on {folders['untuned']}" in (
        told.out + told.err
    )
    for one, other in zip(*found, strict=True):
        assert one["response"] == other["response"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)


def test_the_stamp_of_an_adapter_tells_of_its_base_too(folders, tmp_path):
    base = tiny(tmp_path / "base", 1)
    place = tmp_path / "adapter"
    adapter(place, base)
    before = weights_stamp(place)
    assert weights_stamp(place) == before
    os.utime(f"{base}/model.safetensors", (1, 1))
    assert weights_stamp(place) != before
