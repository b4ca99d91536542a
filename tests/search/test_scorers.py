"""Scorers of texts that read with models, and what a search tells of its chunks."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.search.oracle import log_softmax
from tests.search.recorded import Recorded
from tests.tiny import EOS, tiny_model
from w2s_jax.errors import InputError, RowsFailed
from w2s_jax.models.model import Model
from w2s_jax.models.reward import Classifier, EncoderConfig, RewardModel, init_classifier
from w2s_jax.ops.logits import Sampling
from w2s_jax.search import FunctionScorer, search
from w2s_jax.search.config import best_of_n, cbs
from w2s_jax.search.scorers import Candidate, RewardScorer, TextLogRatio, TextModel
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import Conversation, cut
from w2s_jax.text.tokenizer import load_tokenizer

PADDED = 256
PIECES = ["<", ">", "|", "", *"abdefgiklmnprs", "th", "he", " an", " i", "日"]
PROMPTS = ([4, 5, 6], [20, 7], [12], [8, 21, 22, 9])
CORPUS = (
    "then he said that the man and the hen had it in the land",
    "pipe rim skid 日本 frog leaf",
)
BEAM = cbs(2, 2, 3, max_new_tokens=8, sampling=Sampling(1.0), slots=3)
QUIRKS = replace(BEAM, reference_quirks=True)
BEST = best_of_n(4, max_new_tokens=8, sampling=Sampling(1.0), slots=3, chunk_length=4)


def decode(tokens):
    return "".join(PIECES[token] for token in tokens)


CONVERSATIONS = [Conversation(text=decode(prompt)) for prompt in PROMPTS]


def small_tokenizer(folder, corpus, size, *, ends=True):
    """A byte-level BPE of few merges, with BOS in front and perhaps an EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if ends else {})
    options = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        name: small_tokenizer(folder / name, corpus, size)
        for name, corpus, size in zip("ab", CORPUS, (300, 270), strict=True)
    }
    endless = small_tokenizer(folder / "endless", CORPUS[0], 300, ends=False)
    return made | {"endless": endless}


@pytest.fixture(scope="module")
def policy():
    return tiny_model(0, layers=1)


def model_of(seed, tokenizer):
    size = {"vocab_size": len(tokenizer), "max_positions": PADDED}
    return tiny_model(seed, layers=1, **size)


def text_model(seed, tokenizer, name):
    return TextModel(model_of(seed, tokenizer), load_template(tokenizer, name, where="test"))


def searched(policy, config, scorers, *, on_chunk=None):
    return search(
        policy,
        None,
        PROMPTS,
        config,
        scorers=scorers,
        conversations=CONVERSATIONS,
        decode=decode,
        on_chunk=on_chunk,
    )


def whole_text(template, conversation, response, finished):
    (tokens,) = template.encode_responses(conversation, [response])
    return [*tokens, template.eos_id] if finished and template.eos_id is not None else tokens


def padded(tokens, width=PADDED):
    filled = np.zeros((1, width), np.int32)
    filled[0, : len(tokens)] = tokens
    return filled


def plain_logprob(member, conversation, response, finished):
    """All encoded together, what is common with the prompt masked, one forward pass."""
    tokens = whole_text(member.template, conversation, response, finished)
    prompt = member.template.encode(conversation)
    differ = [i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b]
    start = differ[0] if differ else min(len(tokens), len(prompt))
    logits = np.asarray(member.model(padded(tokens))[0])
    return sum(log_softmax(logits[i - 1])[tokens[i]] for i in range(max(start, 1), len(tokens)))


def decoder_judge(tokenizer):
    decoder = model_of(5, tokenizer)
    head = {"kernel": jax.random.normal(jax.random.key(0), (16, 1))}
    model = RewardModel(decoder.config, decoder.params, head, ("reward",))
    template = load_template(tokenizer, "auto", where="test")

    def plain(conversation, response, finished):
        tokens = whole_text(template, conversation, response, finished)
        mask = np.arange(PADDED)[None] < len(tokens)
        return float(model(padded(tokens), mask)[0, 0])

    return RewardScorer(model, template, weight=2.0), plain


# A program: its operations one by one would each be compiled.
classify = jax.jit(lambda model, *batch: model(*batch))


def encoder_judge(tokenizer):
    size = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 24, "max_positions": 16}
    config, rng = EncoderConfig(len(tokenizer), **size), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_classifier, config), jax.random.key(0)).params
    draw = lambda leaf: rng.normal(0, 0.8, leaf.shape).astype(np.float32)  # noqa: E731
    model = Classifier(config, jax.tree.map(draw, shapes))
    template = load_template(tokenizer, "auto", where="test")

    def plain(conversation, response, finished):
        tokens = tokenizer(conversation.text + response).input_ids[:16]
        logits = classify(model, padded(tokens, 16), np.arange(16)[None] < len(tokens))[0]
        return float(logits[1] - logits[0])

    return RewardScorer(model, template, weight=2.0), plain


def without_numbers(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)


def test_rows_name_the_judge_whose_logits_are_no_numbers(policy, tokenizers):
    tuned, untuned = (
        replace(text_model(seed, tokenizers["a"], "auto"), name="") for seed in (1, 2)
    )
    broken = Model(untuned.model.config, without_numbers(untuned.model.params))
    scorer = TextLogRatio(tuned, replace(untuned, model=broken))
    with pytest.raises(RowsFailed, match="row 0, 1, 2, 3: logits of the untuned model are NaN"):
        searched(policy, BEAM, [scorer])
    judge, _ = encoder_judge(tokenizers["a"])
    broken = Classifier(judge.model.config, without_numbers(judge.model.params))
    with pytest.raises(RowsFailed, match="row 0, 1, 2, 3: logits of the reward model are NaN"):
        searched(policy, BEAM, [replace(judge, model=broken)])


@pytest.mark.parametrize(
    ("judge", "config"), [(decoder_judge, BEAM), (encoder_judge, BEST)], ids=["cbs", "best of n"]
)
def test_rewards_are_those_of_the_whole_text(policy, tokenizers, judge, config):
    scorer, plain = judge(tokenizers["a"])
    recorded = Recorded(scorer)
    results = searched(policy, config, [recorded])
    for candidate, score in recorded.seen:
        expected = plain(candidate.conversation, candidate.response, candidate.finished)
        assert score == pytest.approx(expected, abs=1e-4), candidate
    assert any(candidate.finished for candidate, _ in recorded.seen), "change the seed"
    assert len({round(score, 3) for _, score in recorded.seen}) > 8
    for conversation, result in zip(CONVERSATIONS, results, strict=True):
        scores = [h.score for h in result.hypotheses]
        assert scores == sorted(scores, reverse=True)
        for hypothesis in result.hypotheses:
            ended = hypothesis.tokens[-1] == EOS
            expected = 2 * plain(conversation, decode(hypothesis.tokens), ended)
            assert hypothesis.score == pytest.approx(expected, abs=2e-4)


def test_tuned_and_untuned_may_differ_in_vocabulary_and_template(policy, tokenizers):
    tuned = text_model(1, tokenizers["a"], "auto")
    untuned = text_model(2, tokenizers["b"], "tulu")
    recorded = Recorded(TextLogRatio(tuned, untuned))
    results = searched(policy, QUIRKS, [recorded])
    for candidate, score in recorded.seen:
        read = (candidate.conversation, candidate.response, candidate.finished)
        expected = plain_logprob(tuned, *read) - plain_logprob(untuned, *read)
        assert score == pytest.approx(expected, abs=1e-4 * max(1, abs(expected))), candidate
    lengths = [
        [len(whole_text(m.template, c.conversation, c.response, False)) for c, _ in recorded.seen]
        for m in (tuned, untuned)
    ]
    assert lengths[0] != lengths[1]
    for conversation, result in zip(CONVERSATIONS, results, strict=True):
        for hypothesis in result.hypotheses:
            # With the quirks an EOS is scored behind what the length limit cut, too.
            ended = hypothesis.tokens[-1] == EOS or len(hypothesis.tokens) == 8
            read = (conversation, decode(hypothesis.tokens), ended)
            expected = plain_logprob(tuned, *read) - plain_logprob(untuned, *read)
            assert hypothesis.score == pytest.approx(expected, abs=1e-4 * max(1, abs(expected)))


def length_of(prompts, responses):
    return [float(len(response)) for response in responses]


def vowels_of(prompts, responses):
    return [float(sum(letter in "aei" for letter in response)) for response in responses]


def nan_at_the_second(prompts, responses):
    scores = length_of(prompts, responses)
    pairs = zip(prompts, scores, strict=True)
    return [np.nan if prompt == CONVERSATIONS[1].text else score for prompt, score in pairs]


def raising_at_the_second(prompts, responses):
    if CONVERSATIONS[1].text in prompts:
        raise KeyError("second")
    return length_of(prompts, responses)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    ("function", "did"),
    [
        (nan_at_the_second, "gave a score that is not a finite number"),
        (raising_at_the_second, "raised KeyError: 'second'"),
    ],
)
def test_a_row_that_a_function_cannot_value_fails_alone(policy, function, did, slots):
    config = replace(BEAM, slots=slots)
    expected = searched(policy, config, [FunctionScorer(length_of)])
    told = rf"^row 1: the scorer {function.__name__} {did}$"
    with pytest.raises(RowsFailed, match=told) as raised:
        searched(policy, config, [FunctionScorer(function)])
    assert list(raised.value.results) == [
        None if result.row_id == 1 else result for result in expected
    ]


def test_a_function_that_fails_at_every_prompt_ends_the_search(policy):
    def failing(prompts, responses):
        raise ValueError(f"no {len(prompts)}")

    with pytest.raises(InputError, match=r"^the scorer failing raised ValueError: no 12$"):
        searched(policy, BEAM, [FunctionScorer(failing)])


def test_where_all_are_kept_only_what_has_ended_is_scored(policy):
    calls = []

    def counted(prompts, responses):
        calls.append(list(zip(prompts, responses, strict=True)))
        return length_of(prompts, responses)

    results = searched(policy, BEST, [FunctionScorer(counted)])
    ended = [
        (conversation.text, decode(hypothesis.tokens))
        for conversation, result in zip(CONVERSATIONS, results, strict=True)
        for hypothesis in result.hypotheses
    ]
    assert sorted(pair for call in calls for pair in call) == sorted(ended)
    assert all(calls), "called for nothing"
    assert {len(h.tokens) <= 4 for result in results for h in result.hypotheses} == {True, False}


def test_an_eos_that_cannot_be_scored_is_refused(policy, tokenizers):
    guide = [text_model(seed, tokenizers["endless"], "none") for seed in (1, 2)]
    with pytest.raises(InputError, match="^test: the tokenizer has no EOS token"):
        searched(policy, BEAM, [TextLogRatio(*guide)])
    scorer, plain = decoder_judge(tokenizers["endless"])
    recorded = Recorded(scorer)
    searched(policy, BEAM, [recorded])
    for candidate, score in recorded.seen:
        expected = plain(candidate.conversation, candidate.response, candidate.finished)
        assert score == pytest.approx(expected, abs=1e-4)


def followed(chunks, place):
    """The text and objectives of what is kept at a place, from the last chunk to the first."""
    text, objectives = "", None
    for chunk in reversed(chunks):
        index = chunk.kept.index(place)
        text = chunk.texts[index] + text
        if objectives is None:
            objectives = chunk.objectives[index]
        place = chunk.parents[index]
    return text, objectives


@pytest.mark.parametrize("quirks", [False, True])
def test_the_chunks_lead_to_what_was_found(policy, quirks):
    stop = () if quirks else ("bg", "ea", "i ")
    config = QUIRKS if quirks else replace(BEAM, stop=stop)
    scorers = [FunctionScorer(length_of, -0.5), FunctionScorer(vowels_of)]
    chunks = []
    results = searched(policy, config, scorers[quirks:], on_chunk=chunks.append)
    across = 0
    for result in results:
        tree = [chunk for chunk in chunks if chunk.row_id == result.row_id]
        check_tree(tree, config, len(scorers[quirks:]))
        # With the quirks a finished hypothesis may fill many places, and has one origin.
        shown = result.hypotheses[:1] if quirks else result.hypotheses
        for place, hypothesis in enumerate(shown):
            text, objectives = followed(tree, place)
            kept = cut(decode(hypothesis.tokens), stop)
            response = decode(hypothesis.tokens) if kept is None else kept
            across += text != response
            # The first character of a stop string was shown with an earlier chunk.
            assert text.startswith(response)
            assert len(text) - len(response) <= bool(hypothesis.finished and stop)
            np.testing.assert_allclose(objectives, hypothesis.objectives, atol=1e-5)
    assert any("" in chunk.texts for chunk in chunks), "nothing is carried over; change the seed"
    assert across or quirks, "no stop string lies across two chunks; change the stop strings"


def check_tree(tree, config, objectives):
    width, count = config.beam_width, config.successors
    for chunk in tree:
        entries = len(chunk.texts)
        assert chunk.objectives.shape == (entries, objectives)
        assert len(chunk.parents) == len(chunk.finished) == len(chunk.kept) == entries
        places = sorted(place for place in chunk.kept if place >= 0)
        assert places == sorted(set(places))
        assert config.reference_quirks or places == list(range(width))
        # What is kept is best first, and nothing dropped is better.
        sums = chunk.objectives.sum(axis=1)
        ranked = [float(sums[chunk.kept.index(place)]) for place in places]
        assert ranked == sorted(ranked, reverse=True)
        dropped = [total for total, place in zip(sums, chunk.kept, strict=True) if place < 0]
        assert max(dropped, default=-np.inf) <= ranked[-1] + 1e-5 or config.reference_quirks
    for before, after in pairwise(tree):
        ends = {p for p, ended in zip(before.kept, before.finished, strict=True) if ended}
        if not config.reference_quirks:
            alone = {p for p in after.parents if after.parents.count(p) == 1}
            assert alone == ends - {-1}
        assert all(after.parents.count(p) in (1, count) for p in after.parents)


def test_chunks_of_independent_samples_lead_to_them(policy):
    chunks = []
    results = searched(policy, BEST, [FunctionScorer(length_of)], on_chunk=chunks.append)
    for result in results:
        tree = [chunk for chunk in chunks if chunk.row_id == result.row_id]
        texts = [followed(tree, place)[0] for place in range(4)]
        assert sorted(texts) == sorted(decode(h.tokens) for h in result.hypotheses)


def test_an_encoder_reads_the_response_whatever_the_prompts_length(tokenizers):
    scorer, _ = encoder_judge(tokenizers["a"])
    asked = Conversation(text="then he said that the man and the hen had it " * 4)
    responses = ("the land", "said that he", "man", "hen and the hen")
    candidates = [Candidate(0, row, 0, asked, text, False) for row, text in enumerate(responses)]
    _, scores = scorer.score(scorer.start(1, 1, 4, 1), candidates)
    assert len({round(score, 4) for score in scores.tolist()}) == 4
