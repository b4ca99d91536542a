"""Guides of other vocabularies: every score is that of a plain encoding of the whole text."""

import jax
import numpy as np
import pytest

from tests.search.recorded import Recorded
from tests.tiny import tiny_model
from tests.vocabularies import real_tokenizer
from w2s_jax.models.model import Model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import search
from w2s_jax.search.config import cbs
from w2s_jax.search.scorers import TextLogRatio, TextModel
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import Conversation, Message, decode_tokens, encode_prompt

PROMPTS = ("The film", "Émigré naïve – 日本", "A line\n  then", "", " x", "don", "🎬🎬 wow")
PADDED = 128


@pytest.fixture(scope="module")
def tokenizers(shared_data, tmp_path_factory):
    names = ("gpt2", "llama2")
    return {
        name: real_tokenizer(shared_data, name, tmp_path_factory.mktemp(name)) for name in names
    }


def model_of(seed, tokenizer, **fields):
    size = {"vocab_size": len(tokenizer), "eos_ids": (tokenizer.eos_token_id,)}
    return tiny_model(seed, layers=1, max_positions=256, **(size | fields))


def plain_logprob(member, candidate):
    """The published way: encode all, mask what is common with the prompt, one forward pass."""
    template = member.template
    prompt = template.encode(candidate.conversation)
    (tokens,) = template.encode_responses(candidate.conversation, [candidate.response])
    if candidate.finished:
        tokens = [*tokens, template.eos_id]
    common = 0
    while common < min(len(prompt), len(tokens)) and prompt[common] == tokens[common]:
        common += 1
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(tokens)] = tokens
    start, model = max(common, 1), member.model
    # Logits of the scored tokens alone: of so many ids those of all places are most of the time.
    states = _read(_headless(model), padded)[0, start - 1 : len(tokens) - 1]
    logits = np.asarray(states) @ np.asarray(model.params["head"]["kernel"])
    most = logits.max(-1)
    normalisers = most + np.log(np.exp(logits - most[:, None]).sum(-1))
    drawn = logits[np.arange(len(logits)), tokens[start:]]
    return float((drawn.astype(np.float64) - normalisers).sum())


def _headless(model):
    """The model whose logits are the states that its own head reads."""
    return Model(model.config, model.params | {"head": {"kernel": np.eye(model.config.width)}})


_read = jax.jit(lambda model, tokens: model(tokens))


def check_scores(recorded, members):
    for candidate, score in recorded.seen:
        expected = plain_logprob(members[0], candidate) - plain_logprob(members[1], candidate)
        assert score == pytest.approx(expected, abs=1e-4 * max(1, abs(expected))), candidate


def test_scores_equal_a_plain_encoding_of_the_whole(tokenizers):
    own, other = tokenizers["gpt2"], tokenizers["llama2"]
    # Token ids of one byte or character are likely, so that texts end inside characters.
    policy = model_of(0, own, sharpness=4.0)
    template = load_template(other, "auto", where="test")
    members = [TextModel(model_of(seed, other), template) for seed in (1, 2)]
    recorded = Recorded(TextLogRatio(*members))
    results = search(
        policy,
        None,
        [encode_prompt(own, text) for text in PROMPTS],
        cbs(2, 2, 4, max_new_tokens=8, sampling=Sampling(1.0), slots=3),
        scorers=[recorded],
        conversations=[Conversation(text=text) for text in PROMPTS],
        decode=lambda tokens: decode_tokens(own, tokens),
    )
    check_scores(recorded, members)
    kept = {score for _, score in recorded.seen}
    for result in results:
        assert result.best.score in kept
    assert len(recorded.seen) >= len(PROMPTS) * 2 * 4
    assert any("\ufffd" in candidate.response for candidate, _ in recorded.seen)
    assert any(not candidate.response.isascii() for candidate, _ in recorded.seen)


def test_messages_are_read_behind_each_models_own_template(tokenizers):
    own, other = tokenizers["llama2"], tokenizers["gpt2"]
    template = load_template(other, "zephyr", where="test")
    members = [TextModel(model_of(seed, other), template) for seed in (1, 2)]
    recorded = Recorded(TextLogRatio(*members))
    conversation = Conversation(messages=(Message("user", "Say {braces} and 日本"),))
    reader = load_template(own, "llama-2-chat", where="test")
    search(
        model_of(0, own),
        None,
        [reader.encode(conversation)],
        cbs(2, 2, 3, max_new_tokens=6, sampling=Sampling(1.0), reference_quirks=True),
        scorers=[recorded],
        conversations=[conversation],
        decode=lambda tokens: decode_tokens(own, tokens),
    )
    assert any(candidate.finished for candidate, _ in recorded.seen)
    check_scores(recorded, members)
