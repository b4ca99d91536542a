import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.text.tokenizer import END_OF_TEXT, PADDING, load_tokenizer, save_bpe, train_bpe

TEXTS = ["a good film, a very good film", "the worst film of all\nthe films", "good, good fun!"]


@pytest.fixture(scope="module")
def backend():
    return train_bpe(TEXTS * 4, 300)


@pytest.fixture(scope="module")
def tokenizer(backend, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_bpe(backend, directory, max_length=64)
    return load_tokenizer(directory)


def test_merges_are_learnt_up_to_the_size_asked_for(backend):
    assert 260 < backend.get_vocab_size() <= 300
    assert len(backend.encode("a good film", add_special_tokens=False).ids) < len("a good film")


@given(
    text=st.text(max_size=40).filter(lambda text: END_OF_TEXT not in text and PADDING not in text)
)
def test_every_text_decodes_to_itself(backend, text):
    ids = backend.encode(text, add_special_tokens=False).ids
    assert backend.decode(ids) == text


def test_loaded_again_it_encodes_the_same_behind_an_end_token(backend, tokenizer):
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == backend.encode(text).ids
        assert tokenizer(text)["input_ids"][0] == tokenizer.eos_token_id == 0
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_have_their_roles(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        END_OF_TEXT, END_OF_TEXT, PADDING,
    )  # fmt: skip
    assert tokenizer.model_max_length == 64
    padded = tokenizer(["good", "a good film"], padding=True, return_tensors="np")
    assert padded["attention_mask"][0].sum() < padded["attention_mask"][1].sum()
    assert np.all(padded["input_ids"][padded["attention_mask"] == 0] == tokenizer.pad_token_id)


def test_a_vocabulary_below_the_bytes_is_told():
    with pytest.raises(InputError, match="at least 258"):
        train_bpe(TEXTS, 257)
