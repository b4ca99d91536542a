import copy
import types

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from w2s_jax.errors import InputError
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import (
    Conversation,
    decode_tokens,
    encode_prompt,
    escape_notes,
    response_end,
    special_stops,
)
from w2s_jax.text.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_bpe,
    tell_left_out,
    tokens_behind,
    train_bpe,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(train_bpe(["the sea , and a film of it ."] * 20, 290), directory, max_length=64)
    return load_tokenizer(directory)


def test_a_prompt_keeps_the_special_tokens_of_its_tokenizer(tokenizer):
    bos = tokenizer.bos_token_id
    once = encode_prompt(tokenizer, "a film")
    assert once.count(bos) == 1
    assert once[0] == bos
    assert encode_prompt(tokenizer, "") == [bos]
    assert encode_prompt(tokenizer, f"{tokenizer.bos_token}a film") == once


@pytest.fixture(scope="module")
def closing(tokenizer):
    """The same vocabulary with a post-processor that puts EOS behind every text too."""
    closing = copy.deepcopy(tokenizer)
    end = (closing.eos_token, closing.eos_token_id)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end[0]} $A {end[0]}", pair=f"{end[0]} $A $B {end[0]}", special_tokens=[end]
    )
    return closing


@pytest.mark.parametrize("spelled", ["", END_OF_TEXT])
def test_special_tokens_that_the_tokenizer_puts_behind_are_left_out(tokenizer, closing, spelled):
    prompt = f"a film{spelled}"
    text, end = tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer.eos_token_id
    assert closing(prompt).input_ids == [end, *text, end]
    assert encode_prompt(closing, prompt) == [end, *text]
    assert encode_prompt(closing, "") == [end]
    template = load_template(closing, where="here")
    assert template.encode(Conversation(text=prompt)) == [end, *text]
    assert template.encode_responses(Conversation(text=prompt), [" ,"])[0][: len(text) + 1] == [
        end, *text
    ]  # fmt: skip


def test_that_special_tokens_are_left_out_is_said(tokenizer, closing, caplog):
    tell_left_out(tokenizer, "here")
    assert not caplog.records
    tell_left_out(closing, "here")
    assert caplog.messages == [
        "here: the tokenizer puts <|endoftext|> behind every text; prompts are read without"
    ]


@pytest.mark.parametrize("words", [["<s>", "</s>", "sea", "of"], ["</s>", "x y", "sea", "<s>"]])
def test_what_a_tokenizer_puts_behind_is_known_whatever_it_can_write(words):
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    backend.pre_tokenizer = Whitespace()
    ids = {word: words.index(word) for word in ("<s>", "</s>")}
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(ids.items())
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokens_behind(tokenizer) == 1
    assert encode_prompt(tokenizer, "sea") == [ids["<s>"], words.index("sea")]


@pytest.mark.parametrize(("bos", "eos", "tokens"), [(5, 7, [5]), (None, 7, [7])])
def test_a_prompt_is_never_empty(bos, eos, tokens):
    class Bare:
        bos_token = None
        bos_token_id = bos
        eos_token_id = eos

        def __call__(self, text, **_):
            return types.SimpleNamespace(input_ids=[[]] if isinstance(text, list) else [])

    assert encode_prompt(Bare(), "") == tokens
    Bare.bos_token_id = Bare.eos_token_id = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        encode_prompt(Bare(), "")


@pytest.mark.parametrize("response", [" of the sea .", "s", " , 'quoted' é 電影", "", "\n\nA b"])
def test_a_response_is_what_its_tokens_add_to_the_prompt(tokenizer, response):
    prompt = encode_prompt(tokenizer, "the film")
    tokens = tokenizer(response, add_special_tokens=False).input_ids
    assert response_end(tokenizer, prompt, tokens, finished=False)[0] == response
    ended = [*tokens, tokenizer.eos_token_id]
    assert response_end(tokenizer, prompt, ended, finished=True)[0] == response
    # A model may end at an id that its tokenizer does not know as special.
    ended = [*tokens, tokenizer.convert_tokens_to_ids("a")]
    eos_ids = ended[-1:]
    assert response_end(tokenizer, prompt, ended, finished=True, eos_ids=eos_ids)[0] == response


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), " of the sea . And"),
        ((".",), " of the sea "),
        (("sea", " the"), " of"),
        (("x",), " of the sea . And"),
    ],
)
def test_a_response_ends_before_the_first_stop_string(tokenizer, stop, text):
    prompt = encode_prompt(tokenizer, "a film")
    tokens = tokenizer(" of the sea . And", add_special_tokens=False).input_ids
    assert response_end(tokenizer, prompt, tokens, finished=True, stop=stop)[0] == text
    _, ended_by = response_end(tokenizer, prompt, tokens, finished=True, stop=stop)
    assert ended_by == {" of the sea ": ".", " of": " the"}.get(text)


def test_a_half_written_character_does_not_swallow_the_response(tokenizer):
    prompt = encode_prompt(tokenizer, "the film é")
    cut, rest = prompt[:-1], prompt[-1:]
    assert decode_tokens(tokenizer, cut).endswith("�")
    assert response_end(tokenizer, cut, rest, finished=True)[0]


@pytest.mark.parametrize(("finished", "text"), [(False, " of"), (True, " of\ufffd")])
def test_a_character_that_the_length_cut_short_is_left_out(tokenizer, finished, text):
    prompt = encode_prompt(tokenizer, "the film")
    tokens = tokenizer(" of電", add_special_tokens=False).input_ids[:-1]
    assert decode_tokens(tokenizer, tokens) == " of\ufffd"
    assert response_end(tokenizer, prompt, tokens, finished=finished)[0] == text


def test_sentencepiece_keeps_the_space_in_front_of_a_response(shared_data):
    folder = shared_data / "tokenizers" / "llama2"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tokenizer = load_tokenizer(folder)
    whole = encode_prompt(tokenizer, "The movie was great")
    prompt = encode_prompt(tokenizer, "The movie")
    assert whole[: len(prompt)] == prompt
    assert response_end(tokenizer, prompt, whole[len(prompt) :], finished=False)[0] == " was great"


def test_text_without_a_utf8_form_is_refused(tokenizer):
    with pytest.raises(InputError, match="not text"):
        encode_prompt(tokenizer, "\ud800x")


def test_stops_that_are_special_tokens_become_ids(tokenizer):
    special = tokenizer.all_special_tokens[0]
    texts, ids = special_stops(tokenizer, ("\n", special))
    assert texts == ("\n",)
    assert ids == (tokenizer.convert_tokens_to_ids(special),)


def test_stops_that_a_shell_did_not_unescape_are_told():
    assert escape_notes(("\n", "a\\b", "\\text", "Answer")) == []
    (told,) = escape_notes(("\n", "\\n"))
    assert "a backslash and a letter" in told
    assert "$'\\n' in a shell" in told
