import json
from dataclasses import replace

import pytest

from tests.text.chats import TURNS, chat, template, text
from w2s_jax.errors import InputError
from w2s_jax.text.chat import TEMPLATES, load_template
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.tokenizer import END_OF_TEXT, load_tokenizer, save_bpe, train_bpe

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small byte-level vocabulary that puts a special token in front; no chat template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(train_bpe(["the sea , and a film of it ."] * 20, 290), directory, max_length=64)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The same with a chat template that puts no special token in front."""
    directory = tmp_path_factory.mktemp("chatty")
    save_bpe(train_bpe(["the sea , and a film of it ."] * 20, 290), directory, max_length=64)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("llama-2-chat", (("user", "a"), ("user", "b")), "user and assistant must take turns"),
        ("llama-2-chat", (("user", "a"), ("system", "b"), ("user", "c")), "must take turns"),
        ("imdb", TURNS, "it takes one text to continue, not several messages"),
        ("none", (("user", "a"),), "none takes text only"),
        ("auto", (("user", "a"),), "the tokenizer has no chat template"),
    ],
)
def test_messages_that_a_template_cannot_write_are_refused(tokenizer, name, turns, message):
    with pytest.raises(InputError) as error:
        template(tokenizer, name).encode(chat(*turns))
    assert str(error.value).startswith("--policy-template: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# auto, none, chat and files


@pytest.mark.parametrize("content", ["a film", "", "the {sea}", "  two", "\n", "é 😀"])
def test_a_text_under_auto_is_encoded_as_a_prompt_always_was(tokenizer, chatty, content):
    for found in (template(tokenizer), template(chatty), template(tokenizer, "none")):
        assert found.render(text(content)) == content
        assert found.encode(text(content)) == encode_prompt(found.tokenizer, content)


def test_messages_go_through_the_tokenizers_own_template(chatty):
    rendered = "<|system|>Be kind.<|user|>one<|assistant|>two<|user|>three<|assistant|>"
    for name in ("auto", "chat"):
        found = template(chatty, name)
        assert found.render(chat(*TURNS)) == rendered
        assert found.encode(chat(*TURNS)) == chatty.encode(rendered, add_special_tokens=False)
        reference = chatty.apply_chat_template(
            [{"role": role, "content": content} for role, content in TURNS],
            add_generation_prompt=True,
        )
        assert found.encode(chat(*TURNS)) == list(reference["input_ids"])


def test_a_template_reads_further_values(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(CHATML + "{% if enable_thinking is false %}quick{% endif %}")
    where = "--policy-template"
    quick = load_template(tokenizer, str(path), where=where, args={"enable_thinking": False})
    asked = chat(("user", "a"))
    assert quick.render(asked) == "<|user|>a<|assistant|>quick"
    assert replace(quick, args={}).describe() != quick.describe()
    thorough = replace(asked, template_args={"enable_thinking": True})
    assert quick.render(thorough) == "<|user|>a<|assistant|>", "a conversation's own go before"
    for name in ("messages", "tokenize", "add_generation_prompt"):
        with pytest.raises(InputError, match=f"--policy-template: {name} is no value"):
            quick.render(replace(asked, template_args={name: 1}))


def test_chat_makes_a_text_one_user_message(chatty):
    assert template(chatty, "chat").render(text("a {film}")) == "<|user|>a {film}<|assistant|>"


def test_a_file_is_a_template(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    found = template(tokenizer, str(path))
    assert found.render(text("é {}")) == f"{END_OF_TEXT}[é {{}}]"
    assert found.encode(text("a"))[:2] == encode_prompt(tokenizer, "[a]")[:2]


def test_a_bos_in_the_text_is_not_doubled(tokenizer, chatty, tmp_path):
    path = tmp_path / "bos.jinja"
    path.write_text("{{ bos_token }}{{ messages[0].content }}")
    once = encode_prompt(tokenizer, "a film")
    for found, content in [
        (template(tokenizer), f"{END_OF_TEXT}a film"),
        (template(tokenizer, "none"), f"{END_OF_TEXT}a film"),
        (template(chatty, str(path)), "a film"),
    ]:
        assert found.encode(text(content)) == once
        assert found.encode_responses(text(content), [" of it"])[0][: len(once)] == once


def test_a_template_that_renders_nothing_still_gives_a_token(tokenizer, tmp_path):
    path = tmp_path / "empty.jinja"
    path.write_text("{{ messages[0].content }}")
    found = template(tokenizer, str(path))
    assert found.encode(text("")) == [tokenizer.bos_token_id]
    assert found.encode_responses(text(""), ["a"]) == [encode_prompt(tokenizer, "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ raise_exception('only\nGerman') }}", "the chat template fails: only"),
        ("{{ nothing.there }}", "the chat template fails: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{{ messages.append(1) }}", "the chat template fails: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__'"),
    ],
)
def test_a_failing_template_is_told_in_one_line(tokenizer, tmp_path, content, message):
    path = tmp_path / "own.jinja"
    path.write_text(content)
    found = template(tokenizer, str(path))
    with pytest.raises(InputError) as error:
        found.encode(text("a"))
    assert str(error.value).startswith(f"--policy-template: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama2-chat", "no template 'llama2-chat', perhaps llama-2-chat; it takes a .jinja file"),
        ("xyz", "no template 'xyz'; it takes a .jinja file or one of auto, none, chat, llama-2-ch"),
        ("", "no template ''; it takes a .jinja file"),
        ("chat", "the tokenizer has no chat template for chat; name a .jinja file or one of llama"),
        ("/no/such.jinja", "/no/such.jinja cannot be read (No such file or directory)"),
    ],
)
def test_a_template_that_is_not_there_is_refused_in_one_line(tokenizer, name, message):
    with pytest.raises(InputError) as error:
        template(tokenizer, name)
    assert str(error.value).startswith(f"--policy-template: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{% for m in %}", "the chat template fails"), (b"\xff\xfe", "is not UTF-8")],
)
def test_a_file_that_is_no_template_is_refused_on_loading(tokenizer, tmp_path, content, message):
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        template(tokenizer, str(path))
    assert "\n" not in str(error.value)


def test_a_template_that_asks_for_a_system_message_loads(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}ok"
    )
    assert template(tokenizer, str(path)).render(chat(("system", ""), ("user", "a"))) == "ok"


def test_one_of_several_templates_must_be_the_default(chatty):
    tokenizer = load_tokenizer(chatty.name_or_path)
    tokenizer.chat_template = {"rag": CHATML, "default": "{{ messages[0].content }}!"}
    assert template(tokenizer, "chat").render(text("a")) == "a!"
    tokenizer.chat_template = {"rag": CHATML, "tool": CHATML}
    assert template(tokenizer).render(text("a")) == "a"
    with pytest.raises(InputError, match="multiple chat templates with no default"):
        template(tokenizer, "chat")


def test_text_without_a_utf8_form_is_refused(tokenizer):
    for found in (template(tokenizer), template(tokenizer, "zephyr")):
        with pytest.raises(InputError, match="not text"):
            found.encode(text("\ud800x"))
        with pytest.raises(InputError, match="not text"):
            found.encode_responses(text("a"), ["fine", "\ud800x"])


def test_a_description_tells_templates_apart_by_what_they_render(tokenizer, chatty, tmp_path):
    files = {"a": "{{ messages[0].content }}", "b": "{{ messages[0].content }}", "c": "x"}
    for name, content in files.items():
        (tmp_path / f"{name}.jinja").write_text(content)
    a, b, c = (template(tokenizer, str(tmp_path / f"{name}.jinja")).describe() for name in files)
    assert a == b != c
    assert a.startswith("jinja:")
    assert template(tokenizer).describe() == "auto"
    assert template(tokenizer, "none").describe() == "none"
    assert template(chatty).describe().startswith("auto:")
    assert template(chatty, "chat").describe().removeprefix("chat") == (
        template(chatty).describe().removeprefix("auto")
    )
    assert len({template(tokenizer, name).describe() for name in TEMPLATES}) == len(TEMPLATES)


def test_the_end_of_a_turn(tokenizer, tmp_path):
    assert template(tokenizer, "starling").eos_id == tokenizer.eos_token_id
    special = train_bpe(["the sea"] * 20, 290)
    special.add_special_tokens(["<|eot_id|>", "<|end_of_turn|>", "</s>"])
    save_bpe(special, tmp_path, max_length=64)
    loaded = load_tokenizer(tmp_path)
    ends = {name: loaded.convert_ids_to_tokens(template(loaded, name).eos_id) for name in TEMPLATES}
    assert ends == {
        "llama-2-chat": "</s>",
        "llama-3-instruct": "<|eot_id|>",
        "zephyr": "</s>",
        "starling": "<|end_of_turn|>",
        "tulu": "</s>",
        "imdb": END_OF_TEXT,
        "plain": END_OF_TEXT,
        "ultrarm": "</s>",
        "starling-rm": "</s>",
    }
    for name in ("auto", "none"):
        assert template(loaded, name).eos_id == loaded.eos_token_id
