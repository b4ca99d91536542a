import socket
from dataclasses import replace

import httpx
import pytest

from tests.cli.serving import served
from tests.serve.tiny_server import checkpoints_at, served_at, tiny, tokenizer_at
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.models.save import save_model
from w2s_jax.search.scorers import TextLogRatio, TextModel
from w2s_jax.serve import ServeConfig
from w2s_jax.serve.run import chat_notes
from w2s_jax.text.chat import Template


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return checkpoints_at(tmp_path_factory.mktemp("checkpoints"))


def refused(capsys, checkpoints, *flags, roles=("policy", "tuned", "untuned")) -> str:
    models = [word for role in roles for word in (f"--{role}", checkpoints[role])]
    status = main(["serve", *models, "--port", "0", *flags])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w", "0"], "w is 0; it must be at least 1"),
        (["--slots", "0"], "slots is 0"),
        (["--queue", "-1"], "queue is -1"),
        (["--most-rows", "0"], "rows is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "2"], "top_p is 2"),
        (["--max-new-tokens", "0"], "max_tokens is 0"),
        (["--template-args", "quick"], "--template-args: 'quick' is not JSON"),
        (["--template-args", "[1]"], "no JSON object such as"),
        (["--port", "70000"], "--port is 70000; it must lie in 0 .. 65535"),
        (["--grace", "-1"], "--grace is -1"),
        (["--grace", "nan"], "--grace is nan"),
        (["--warm-up", "-5"], "--warm-up is -5"),
        (["--warm-up", "400"], "see also --warm-up"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--policy-template", "zephir"], "zephyr"),
        (["--guide-template", "nothing"], "no template 'nothing'"),
        (["--mesh", "data=3"], "multiply to 3"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_flags_out_of_range(capsys, checkpoints, flags, message):
    assert message in refused(capsys, checkpoints, *flags)


def test_half_a_guide_and_methods_without_one(capsys, checkpoints):
    assert "a guide is one of each" in refused(capsys, checkpoints, roles=("policy", "tuned"))
    assert "--policy DIR" in refused(capsys, checkpoints, roles=("tuned", "untuned"))
    flags = ["--method", "cbs", "--reward-model", "a", "--reward-weight", "1"]
    error = refused(capsys, checkpoints, *flags, "--reward-weight", "2", roles=("policy",))
    assert "2 --reward-weight for 1 --reward-model" in error
    error = refused(capsys, checkpoints, "--method", "eft", roles=("policy",))
    assert "--method eft needs --tuned and --untuned" in error


def test_checkpoints_that_are_not_there(capsys, checkpoints, tmp_path):
    for role in checkpoints:
        missing = checkpoints | {role: str(tmp_path / "nowhere")}
        assert "nowhere" in refused(capsys, missing)


def test_a_port_in_use(capsys, checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refused(capsys, checkpoints, "--port", port)
    assert f"--port {port}" in error


@pytest.mark.parametrize("key", ["", " ", "tab\tinside", "schlüssel", " sesame"])
def test_keys_that_no_header_can_carry_are_not_shown(capsys, checkpoints, monkeypatch, key):
    monkeypatch.setenv("W2S_API_KEY", key)
    error = refused(capsys, checkpoints)
    assert "W2S_API_KEY" in error
    assert not key.strip() or key.strip() not in error.replace("W2S_API_KEY", "")


def test_defaults_follow_the_guide(checkpoints, monkeypatch):
    monkeypatch.delenv("W2S_API_KEY", raising=False)
    assert ServeConfig(policy="x/name").usual_method == "sample"
    guided = ServeConfig(policy="x/name", tuned=("a",), untuned=("b",))
    assert (guided.usual_method, guided.name, guided.key()) == ("cbs", "name", None)
    monkeypatch.setenv("OTHER", "abc")
    assert ServeConfig(policy="x", api_key_env="OTHER").key() == "abc"
    with pytest.raises(InputError, match="beta"):
        ServeConfig(policy="x", beta=-1.0).check()


def test_a_missing_chat_template_is_told(tmp_path):
    def where(name, jinja):
        return Template(tokenizer_at(tmp_path), "auto", jinja, name)

    guide = TextLogRatio(
        TextModel(tiny(0), where("--guide-template", None)),
        TextModel(tiny(1), where("--tuned", "x")),
    )
    guided = replace(served_at(tmp_path), scorers=(guide,))
    assert chat_notes(guided) == [
        "--guide-template: no chat template there, so chats will be refused"
    ]
    bare = replace(guided, template=where("--policy-template", None))
    assert len(chat_notes(bare)) == 2
    on_tokens = [where("--guide-template", None)] * 2
    (note,) = chat_notes(served_at(tmp_path), on_tokens)
    assert note == "--guide-template: no chat template there, so the policy's is used"
    assert len(chat_notes(bare, on_tokens)) == 2


def test_a_guide_of_another_vocabulary_and_an_open_door(checkpoints, tmp_path, capsys):
    """Guides that read texts; and a warning, as other machines may come in."""
    models = [f"--policy={checkpoints['policy']}"]
    for seed, role in enumerate(("tuned", "untuned"), start=5):
        tokenizer = tokenizer_at(tmp_path / role, text="quite another text " * 50)
        save_model(tiny(seed), tmp_path / role, tokenizer=tokenizer)
        models.append(f"--{role}={tmp_path / role}")
    flags = ["--w=2", "--k=2", "--l=4", "--max-new-tokens=4", "--slots=2", "--warm-up=4"]
    with served(*models, *flags, "--host=0.0.0.0") as address:
        address = address.replace("0.0.0.0", "127.0.0.1")
        body = {"model": "policy", "prompt": "A film", "seed": 1}
        found = [httpx.post(f"{address}/v1/completions", json=body, timeout=120) for _ in range(2)]
        first, again = (response.json()["choices"][0] for response in found)
        assert first == again
        assert isinstance(first["score"], float)
        refusal = httpx.post(f"{address}/v1/completions", json=body | {"method": "eft"})
        assert "another" in refusal.json()["error"]["message"]
        chat = {"model": "policy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
        response = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=120)
        assert response.status_code == 200, response.text
    said = capsys.readouterr().err
    assert "the guide scores texts" in said
    assert "warning: 0.0.0.0 lets other machines in" in said
