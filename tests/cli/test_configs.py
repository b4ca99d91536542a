"""Every config of a published experiment, on tiny checkpoints under the names it gives."""

import json

import pytest
import yaml

from tests.cli.test_search import tiny
from w2s_jax.cli.main import configs_folder, main, parse
from w2s_jax.text.rows import read_jsonl, write_jsonl

KINDS = ("instruction_following", "sentiment", "summarization")
CONFIGS = sorted(
    f"{kind}/{path.stem}" for kind in KINDS for path in (configs_folder() / kind).glob("*.yaml")
)
LOCAL = [name for name in CONFIGS if "black-box" not in name]
# Names of one vocabulary; tokenizers differ from family to family.
TEXTS = {
    "llama-2": "the film of a sea",
    "llama-3": "quite other words were here",
    "mistral": "wind blows over many hills",
    "gpt2": "jump, said one fox",
}
FAMILIES = {
    "llama-2": ("Llama-2", "tulu"),
    "llama-3": ("Llama-3",),
    "mistral": ("zephyr", "mistral", "Starling", "openchat"),
    "gpt2": ("gpt2",),
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def family_of(name):
    return next(
        family
        for family, parts in FAMILIES.items()
        if any(part.lower() in name.lower() for part in parts)
    )


def values_of(name):
    return yaml.safe_load((configs_folder() / f"{name}.yaml").read_text())


def names_of(values):
    given = [values.get("policy"), *values.get("tuned", ()), *values.get("untuned", ())]
    return [name for name in given if name is not None]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A file of names: two checkpoints of each family stand for all of its names."""
    root = tmp_path_factory.mktemp("models")
    places = {}
    for place, family in enumerate(FAMILIES):
        for seed in range(2):
            folder = root / f"{family}-{seed}"
            tiny(folder, 2 * place + seed, text=TEXTS[family], max_positions=4096)
            options = json.loads((folder / "tokenizer_config.json").read_text())
            options |= {"chat_template": CHAT}
            (folder / "tokenizer_config.json").write_text(json.dumps(options))
            places[family, seed] = folder
    known = sorted({name for config in CONFIGS for name in names_of(values_of(config))})
    mapping = {
        name: str(places[family_of(name), int("tuned" not in name and i % 2)])
        for i, name in enumerate(known)
    }
    (root / "names.yaml").write_text(yaml.safe_dump(mapping))
    return root / "names.yaml"


def kind_of(name):
    """What a run depends on: the task, and whether policy and guide share a vocabulary."""
    values = values_of(name)
    return name.split("/")[0], family_of(values["policy"]) == family_of(values["tuned"][0])


def test_the_published_settings_are_there():
    for guide in ("zephyr", "starling", "tulu"):
        for policy in ("llama-2-7b-chat", "llama-2-13b-chat", "llama-2-70b-chat"):
            assert f"instruction_following/{guide}_{policy}" in CONFIGS
        for policy in ("llama-3-8b-instruct", "llama-3-70b-instruct", "black-box"):
            assert f"instruction_following/{guide}_{policy}" in CONFIGS
    for task in ("sentiment", "summarization"):
        for policy in ("gpt2-large", "gpt2-xl", "llama-2-7b", "llama-3-8b"):
            assert f"{task}/{policy}" in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_holds_the_published_values(name):
    files = ["--prompts=in.jsonl", "--output=out.jsonl"]
    remote = ["--endpoint=http://127.0.0.1:1/v1", "--endpoint-model=m"]
    command = parse(["search", "--config", name, *files, *(remote * (name not in LOCAL))])
    config = command.search_config()
    sizes = (config.beam_width, config.successors, config.chunk_length, config.max_new_tokens)
    expected = (4, 4, 5, 50)
    if name.startswith("instruction"):
        expected = (2, 2, 30, 2048) if name in LOCAL else (2, 2, 100, 2048)
    assert sizes == expected
    assert config.sampling.temperature == 0.7
    assert not config.reference_quirks
    sources = command.sources_of_all()
    assert len(sources.guides) == 1
    for checkpoint in sources.checkpoints.values():
        assert family_of(checkpoint)
    if name.startswith("instruction"):
        assert sources.guides[0].tuned_template == name.split("/")[1].split("_")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", {kind_of(name): name for name in LOCAL}.values())
def test_a_config_runs_from_end_to_end(names, tmp_path, capsys, name):
    is_chat = name.startswith("instruction")
    field = "instruction" if is_chat else "prompt"
    write_jsonl(tmp_path / "in.jsonl", [{field: "the film {and} the sea"}])
    flags = ["--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    flags += ["--config", name, "--models-map", str(names), "--max-new-tokens", "32"]
    assert main(["search", *flags]) == 0
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert len(row["hypotheses"]) == (2 if is_chat else 4)
    values = values_of(name)
    same = family_of(values["policy"]) == family_of(values["tuned"][0])
    told = "scores tokens on the device" if same else "scores texts"
    assert told in capsys.readouterr().out
