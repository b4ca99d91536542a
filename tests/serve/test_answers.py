from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.tiny_server import tokenizer_at
from w2s_jax.serve.answers import TokenTexts, settled, shared, token_bytes
from w2s_jax.text.prompts import decode_tokens, response_end


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_at(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("abc", (), "abc"),
        ("ab\ufffd\ufffd", (), "ab"),
        ("a\ufffdb", (), "a\ufffdb"),
        ("abc EN", ("END",), "abc "),
        ("abc E", ("END", " EX"), "abc"),
        ("abc END", ("ENDE",), "abc "),
        ("aaa", ("aab",), "a"),
        ("abc", ("x",), "abc"),
        ("", ("x",), ""),
    ],
)
def test_what_further_tokens_cannot_change(text, stop, kept):
    assert settled(text, stop) == kept


@given(st.lists(st.text("ab\ufffd", max_size=6), min_size=1, max_size=4))
def test_shared_is_the_longest_common_head(texts):
    found = shared(texts)
    assert all(text.startswith(found) for text in texts)
    longer = {text[: len(found) + 1] for text in texts}
    assert len(longer) > 1 or longer == {found}


@given(st.text(max_size=12), st.lists(st.text("ab €", min_size=1, max_size=4), max_size=3))
def test_settled_text_is_never_retracted(tokenizer_text, stop):
    """Token by token, what was said once stays at the head of the final text."""
    tokenizer = test_settled_text_is_never_retracted.tokenizer
    prompt, tokens = tokenizer("The sea").input_ids, tokenizer(
        tokenizer_text, add_special_tokens=False
    ).input_ids  # fmt: skip
    text_of = partial(response_end, tokenizer, prompt, finished=False)
    final, said = text_of(tokens, stop=stop)[0], ""
    for count in range(len(tokens) + 1):
        text = text_of(tokens[:count], stop=stop)[0]
        whole = text_of(tokens[:count])[0]
        if any(one in whole for one in stop):
            break
        now = settled(text, stop)
        assert now.startswith(said)
        said = now
    assert final.startswith(said)


@pytest.fixture(autouse=True)
def _lend_tokenizer(tokenizer):
    # hypothesis and fixtures of modules do not go together in a signature.
    test_settled_text_is_never_retracted.tokenizer = tokenizer


def test_token_texts_and_offsets_add_up_to_the_text(tokenizer):
    texts = TokenTexts(tokenizer)
    text = "a film of the séa – naïve 東 🎬."
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    decode = partial(decode_tokens, tokenizer)
    assert texts.offsets(tokens) == [
        len(decode(tokens[:index]).rstrip("\ufffd")) for index in range(len(tokens))
    ]
    raw = b"".join(bytes(token_bytes(texts.of(token))) for token in tokens)
    assert raw == text.encode()
    assert any(texts.of(token).startswith("bytes:\\x") for token in tokens)
    assert " film" in [texts.of(token) for token in tokens] or "film" not in tokenizer.get_vocab()


def test_special_tokens_have_a_text(tokenizer):
    assert TokenTexts(tokenizer).of(0) == "<|endoftext|>"
