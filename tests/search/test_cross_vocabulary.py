"""Guides of other vocabularies: every score is that of a plain encoding of the whole text."""

import jax
import numpy as np
import pytest

from tests.search.recorded import Recorded
from tests.tiny import tiny_model
from tests.vocabularies import REAL, real_tokenizer
from w2s_jax.models.model import Model
from w2s_jax.ops.sampling import Sampling
from w2s_jax.search import Guide, search
from w2s_jax.search.judges import TextLogRatio, TextModel
from w2s_jax.search.presets import best_of_n, cbs
from w2s_jax.text.chat import load_template
from w2s_jax.text.conversations import Conversation, Message
from w2s_jax.text.prompts import decode_tokens, encode_prompt

PROMPTS = ("The film", "Émigré naïve – 日本", "A line\n  then", "", " x", "don", "🎬🎬 wow")
PADDED = 128


@pytest.fixture(scope="module")
def tokenizers(shared_data, tmp_path_factory):
    return {name: real_tokenizer(shared_data, name, tmp_path_factory.mktemp(name)) for name in REAL}


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


@pytest.mark.parametrize(
    ("policy_vocabulary", "guide_vocabulary", "template_name"),
    [("gpt2", "llama2", "auto"), ("llama2", "gpt2", "zephyr")],
)
def test_scores_equal_a_plain_encoding_of_the_whole(
    tokenizers, policy_vocabulary, guide_vocabulary, template_name
):
    own, other = tokenizers[policy_vocabulary], tokenizers[guide_vocabulary]
    # Token ids of one byte or character are likely, so that texts end inside characters.
    policy = model_of(0, own, sharpness=4.0)
    template = load_template(other, template_name, where="test")
    members = [TextModel(model_of(seed, other), template) for seed in (1, 2)]
    recorded = Recorded(TextLogRatio(*members))
    texts = [prompt for prompt in PROMPTS if prompt or policy_vocabulary != "none"]
    results = search(
        policy,
        None,
        [encode_prompt(own, text) for text in texts],
        cbs(2, 2, 4, max_new_tokens=12, sampling=Sampling(1.0), slots=3),
        scorers=[recorded],
        conversations=[Conversation(text=text) for text in texts],
        decode=lambda tokens: decode_tokens(own, tokens),
    )
    for candidate, score in recorded.seen:
        expected = plain_logprob(members[0], candidate) - plain_logprob(members[1], candidate)
        assert score == pytest.approx(expected, abs=1e-4 * max(1, abs(expected))), candidate
    kept = {score for _, score in recorded.seen}
    for result in results:
        assert result.best.score in kept
    assert len(recorded.seen) >= len(texts) * 2 * 4
    assert any("\ufffd" in candidate.response for candidate, _ in recorded.seen)
    assert any(not candidate.response.isascii() for candidate, _ in recorded.seen)


def test_the_same_vocabulary_on_text_scores_as_on_tokens(tokenizers):
    """Where a text encodes to the tokens that were sampled, both paths are one."""
    own = tokenizers["gpt2"]
    policy = model_of(0, own)
    tuned, untuned = (model_of(seed, own) for seed in (1, 2))
    template = load_template(own, "auto", where="test")
    scorer = TextLogRatio(TextModel(tuned, template), TextModel(untuned, template))
    prompts = [encode_prompt(own, text) for text in PROMPTS if text]
    config = best_of_n(4, max_new_tokens=4, sampling=Sampling(0.6))
    on_tokens = search(policy, Guide(tuned, untuned), prompts, config)
    on_text = search(
        policy,
        None,
        prompts,
        config,
        scorers=[scorer],
        conversations=[Conversation(text=text) for text in PROMPTS if text],
        decode=lambda tokens: decode_tokens(own, tokens),
    )
    same = 0
    for prompt, one, other in zip(prompts, on_tokens, on_text, strict=True):
        scores = {h.tokens: h.score for h in one.hypotheses}
        for hypothesis in other.hypotheses:
            text = decode_tokens(own, prompt) + decode_tokens(own, hypothesis.tokens)
            whole = [*prompt, *hypothesis.tokens]
            if hypothesis.finished or own(text).input_ids != whole:
                continue
            same += 1
            assert hypothesis.score == pytest.approx(scores[hypothesis.tokens], abs=1e-3)
    assert same >= 12


def test_messages_are_read_behind_each_models_own_template(tokenizers):
    own, other = tokenizers["mistral"], tokenizers["llama2"]
    template = load_template(other, "tulu", where="test")
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
    for candidate, score in recorded.seen:
        expected = plain_logprob(members[0], candidate) - plain_logprob(members[1], candidate)
        assert score == pytest.approx(expected, abs=1e-4 * max(1, abs(expected)))
