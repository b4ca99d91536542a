"""`w2s search` with adapters in place of checkpoints."""

import os

import pytest

from tests.cli.test_search import search, tiny
from tests.search.test_adapters import adapter
from w2s_jax.cli.convert import Convert
from w2s_jax.search.checkpoints import weights_stamp
from w2s_jax.text.rows import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {"untuned": tiny(root / "untuned", 1)}
    for seed, role in enumerate(("", "tuned-")):
        one, merged = str(root / f"{role}adapter"), str(root / f"{role}merged")
        found[f"{role}adapter"] = adapter(one, found["untuned"], seed=seed)
        Convert(one, merged).run()
        found[f"{role}merged"] = merged
    return found


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "A film"}, {"prompt": "We"}])
    return tmp_path / "in.jsonl"


def test_a_search_says_the_same_with_adapters_and_with_them_merged(
    folders, prompts, tmp_path, capsys
):
    """Both of the policy and of the tuned model, on the untuned one."""
    found = []
    for kind in ("adapter", "merged"):
        roles = {"policy": folders[kind], "untuned": folders["untuned"]}
        roles["tuned"] = folders[f"tuned-{kind}"]
        flags = [word for name, folder in roles.items() for word in (f"--{name}", folder)]
        assert search(flags, prompts, tmp_path / f"{kind}.jsonl", "--method", "eft") == 0
        found.append(read_jsonl(tmp_path / f"{kind}.jsonl"))
    told = capsys.readouterr().out
    for role, name in (("policy", "adapter"), ("tuned", "tuned-adapter")):
        assert f"{role} {folders[name]} is an adapter on {folders['untuned']}" in told
    for one, other in zip(*found, strict=True):
        assert one["response"] == other["response"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        assert one["score"] != 0


def test_the_stamp_of_an_adapter_tells_of_its_base_too(folders, tmp_path):
    base = tiny(tmp_path / "base", 1)
    place = tmp_path / "adapter"
    adapter(place, base)
    before = weights_stamp(place)
    assert weights_stamp(place) == before
    os.utime(f"{base}/model.safetensors", (1, 1))
    assert weights_stamp(place) != before
