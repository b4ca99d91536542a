import pytest

from tests.text.chats import TURNS, chat, template, text
from w2s_jax.text.chat import TEMPLATES
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(train_bpe(["the sea , and a film of it ."] * 20, 290), directory, max_length=64)
    return load_tokenizer(directory)


RENDERED = {
    "llama-2-chat": ("<s>[INST] <<SYS>>\n\n<</SYS>>\n\n", " [/INST] "),
    "llama-3-instruct": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr": ("<|system|>\n</s>\n<|user|>\n", "</s>\n<|assistant|>\n"),
    "starling": ("<s>GPT4 Correct User: ", "<|end_of_turn|>GPT4 Correct Assistant: "),
    "tulu": ("<|user|>\n", "\n<|assistant|>\n"),
    "imdb": ("Here is a movie review from imdb: ", ""),
    "plain": ("", ""),
    "ultrarm": ("Human: ", "\nAssistant: "),
    "starling-rm": ("<s>[INST] ", " </s> [/INST] "),
}
INSTRUCTIONS = [
    "Who wrote Faust?",
    "",
    " spaced \n",
    "{}",
    "{raw_prompt} {0} {{ messages }} {% if %} {# x #} %s",
    "x\n\nline {",
    "'quoted' \"twice\" \\n <b>&amp;</b> é 電影 😀",
]


def test_every_published_template_is_tested():
    assert set(TEMPLATES) == set(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("content", [*INSTRUCTIONS, pytest.param("long {} " * 12_500, id="long")])
def test_a_published_template_renders_byte_for_byte(tokenizer, name, content):
    before, behind = RENDERED[name]
    found = template(tokenizer, name)
    assert found.render(chat(("user", content))) == before + content + behind
    assert found.render(text(content)) == before + content + behind


SEVERAL = {
    "llama-2-chat": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST] ",
        "<s>[INST] <<SYS>>\n\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST] ",
    ),
    "llama-3-instruct": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\none</s>\n<|assistant|>\ntwo</s>\n"
        "<|user|>\nthree</s>\n<|assistant|>\n",
        "<|system|>\n</s>\n<|user|>\none</s>\n<|assistant|>\ntwo</s>\n"
        "<|user|>\nthree</s>\n<|assistant|>\n",
    ),
    "starling": (
        "<s>GPT4 Correct System: Be kind.<|end_of_turn|>GPT4 Correct User: one<|end_of_turn|>"
        "GPT4 Correct Assistant: two<|end_of_turn|>GPT4 Correct User: three<|end_of_turn|>"
        "GPT4 Correct Assistant: ",
        "<s>GPT4 Correct User: one<|end_of_turn|>"
        "GPT4 Correct Assistant: two<|end_of_turn|>GPT4 Correct User: three<|end_of_turn|>"
        "GPT4 Correct Assistant: ",
    ),
    "tulu": (
        "<|system|>\nBe kind.\n<|user|>\none\n<|assistant|>\ntwo</s>\n<|user|>\nthree\n"
        "<|assistant|>\n",
        "<|user|>\none\n<|assistant|>\ntwo</s>\n<|user|>\nthree\n<|assistant|>\n",
    ),
    "plain": (
        "system: Be kind.\nuser: one\nassistant: two\nuser: three\nassistant: ",
        "user: one\nassistant: two\nuser: three\nassistant: ",
    ),
    "ultrarm": (
        "Be kind.\nHuman: one\nAssistant: two\nHuman: three\nAssistant: ",
        "Human: one\nAssistant: two\nHuman: three\nAssistant: ",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_turns_with_and_without_a_system_message(tokenizer, name):
    with_system, without = SEVERAL[name]
    assert template(tokenizer, name).render(chat(*TURNS)) == with_system
    assert template(tokenizer, name).render(chat(*TURNS[1:])) == without
