"""Adapters among the checkpoints of a search: on which base they are, which is held once."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.cli.test_search import tiny
from tests.models.test_lora import filled
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_adapted, load_config, load_model
from w2s_jax.models.lora import LoraConfig, init_adapter
from w2s_jax.models.peft import save_adapter
from w2s_jax.search.checkpoints import GuideSource, RewardSource, Sources, load, plan

LORA = LoraConfig(rank=2, alpha=4.0)
TOKENS = np.arange(10, dtype=np.int32)[None] + 1


def adapter(folder, base, *, named=None, seed=0):
    """A random adapter on a base's folder, without a tokenizer."""
    config = load_config(base)
    tree = filled(init_adapter(config, LORA, jax.random.key(0)), seed)
    save_adapter(folder, config, LORA, tree, str(base) if named is None else named)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {name: tiny(root / name, seed) for seed, name in enumerate(("policy", "untuned"))}
    found["tuned"] = adapter(root / "tuned", found["untuned"])
    found["elsewhere"] = adapter(root / "elsewhere", found["untuned"], named="/gone/base")
    found["root"] = str(root)
    return found


def sources(folders, **changes):
    guide = GuideSource(folders["tuned"], folders["untuned"])
    return Sources(folders["policy"], (dataclasses.replace(guide, **changes),))


def buffers(model):
    return flatten_dict(model.params)


def test_a_tuned_adapter_and_its_untuned_base_share_every_buffer(folders):
    planned = plan(sources(folders))
    guide = load(planned).models.guides[0]
    tuned, untuned = buffers(guide.tuned), buffers(guide.untuned)
    for path, leaf in untuned.items():
        assert tuned[path] is leaf
        for one, other in zip(jax.tree.leaves(tuned[path]), jax.tree.leaves(leaf), strict=True):
            assert one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()
    assert {path[-1].split("_")[0] for path in tuned.keys() - untuned.keys()} == {"lora"}
    expected = load_adapted(folders["tuned"])(TOKENS)
    np.testing.assert_allclose(guide.tuned(TOKENS), expected, atol=1e-4)
    assert np.abs(guide.untuned(TOKENS) - expected).max() > 0.05
    assert planned.notes()[1] == (
        f"tuned {folders['tuned']} is an adapter on {folders['untuned']}, whose weights are held "
        "once"
    )


def test_a_base_is_known_under_another_name_of_its_folder(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders["untuned"])
    guide = load(plan(sources(folders, untuned=str(tmp_path / "link")))).models.guides[0]
    assert guide.tuned.params["embed"]["embedding"] is guide.untuned.params["embed"]["embedding"]


def test_an_adapter_alone_is_merged(folders):
    only = Sources(folders["tuned"])
    planned = plan(only)
    policy = load(planned).models.policy
    assert not [path for path in buffers(policy) if path[-1].startswith("lora")]
    expected = load_adapted(folders["tuned"], decoding=True)(TOKENS)
    np.testing.assert_allclose(policy(TOKENS), expected, atol=1e-5)
    plain = np.asarray(load_adapted(folders["tuned"])(TOKENS))
    np.testing.assert_allclose(expected, plain, atol=1e-5 * np.abs(plain).max())
    assert planned.notes() == [
        f"policy {folders['tuned']} is an adapter on {folders['untuned']}, "
        "on which nothing else stands"
    ]


def test_two_adapters_share_a_base_that_nothing_else_is(folders, tmp_path):
    other = adapter(tmp_path / "other", folders["untuned"], seed=1)
    guide = load(plan(sources(folders, untuned=other))).models.guides[0]
    tuned, untuned = buffers(guide.tuned), buffers(guide.untuned)
    assert tuned.keys() == untuned.keys()
    for path in tuned:
        assert (tuned[path] is untuned[path]) == (not path[-1].startswith("lora"))
    for model, path in ((guide.tuned, folders["tuned"]), (guide.untuned, other)):
        np.testing.assert_allclose(model(TOKENS), load_adapted(path)(TOKENS), atol=1e-4)


def test_a_guide_may_be_an_adapter_on_the_policy(folders, tmp_path):
    tuned = adapter(tmp_path / "tuned", folders["policy"])
    models = load(plan(sources(folders, tuned=tuned, untuned=folders["policy"]))).models
    embedding = models.policy.params["embed"]["embedding"]
    for model in models.members:
        assert model.params["embed"]["embedding"] is embedding


def test_the_untuned_model_stands_for_a_base_that_is_not_here(folders):
    planned = plan(sources(folders, tuned=folders["elsewhere"]))
    guide = load(planned).models.guides[0]
    np.testing.assert_allclose(
        guide.tuned(TOKENS), load_adapted(folders["tuned"])(TOKENS), atol=1e-4
    )
    assert planned.notes()[1].endswith(
        f"on {folders['untuned']} (it names /gone/base, which is not here), whose weights are "
        "held once"
    )


def test_a_file_of_names_says_where_a_base_is(folders):
    found = Sources(folders["elsewhere"], folders={"/gone/base": folders["untuned"]})
    policy = load(plan(found)).models.policy
    expected = load_adapted(folders["tuned"], decoding=True)(TOKENS)
    np.testing.assert_allclose(policy(TOKENS), expected, atol=1e-5)


def test_a_base_that_is_nowhere_is_refused_before_any_weight_is_read(folders):
    with pytest.raises(InputError, match="elsewhere is an adapter; its base: /gone/base: no such"):
        plan(Sources(folders["elsewhere"]))


def test_an_adapter_on_an_untuned_model_of_another_shape_is_refused(folders, tmp_path):
    other = tiny(tmp_path / "wide", 3, width=24)
    planned = plan(sources(folders, tuned=folders["elsewhere"], untuned=other))
    with pytest.raises(InputError, match="elsewhere: the adapter is for another base"):
        load(planned)


def test_a_tokenizer_of_the_adapters_own_is_preferred(folders, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folders["tuned"], own)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folders['untuned']}/{file}", own)
    (own / "chat_template.jinja").write_text("own {{ messages[0]['content'] }}")
    assert "own" in plan(Sources(str(own))).templates["policy"].tokenizer.chat_template
    assert plan(Sources(folders["tuned"])).templates["policy"].tokenizer.chat_template is None


def test_a_reward_model_may_be_an_adapter(folders, tmp_path):
    from w2s_jax.models.reward import RewardModel
    from w2s_jax.models.save import save_reward_model

    base = load_model(folders["untuned"])
    body = {name: subtree for name, subtree in base.params.items() if name != "head"}
    head = {"kernel": np.ones((16, 1), np.float32)}
    model = RewardModel(base.config, body, head, ("reward",))
    save_reward_model(model, tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folders['untuned']}/{file}", tmp_path / "base")
    path = adapter(tmp_path / "adapter", tmp_path / "base", named="org/judge")
    found = Sources(
        folders["policy"], rewards=(RewardSource(path),),
        folders={"org/judge": str(tmp_path / "base")},
    )  # fmt: skip
    judge = load(plan(found)).scorers[0].model
    assert judge.labels == ("reward",)
    assert np.abs(judge(TOKENS) - model(TOKENS)).max() > 0.01
