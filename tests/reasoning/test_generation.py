"""Generation against a plain loop over full forward passes, and what may not change its rows."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.cli.test_search import POSITIONS, tiny
from w2s_jax.errors import InputError
from w2s_jax.models.load import load_model
from w2s_jax.ops.logits import Sampling
from w2s_jax.reasoning.config import GenerationConfig
from w2s_jax.reasoning.generation import generate, row_key
from w2s_jax.search import Guide, search
from w2s_jax.search.config import cbs
from w2s_jax.search.session import Session
from w2s_jax.text.prompts import decode_tokens, encode_prompt, response_end
from w2s_jax.text.rows import read_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

NEW = 14
PROMPTS = ["A film", "of the sea, " * 3, "We", "the film of a sea", "", "Sea? A: it was"]
ROWS = [
    {"id": index if index % 2 else f"q{index}", "prompt": text}
    for index, text in enumerate(PROMPTS)
]
GREEDY = GenerationConfig(max_new_tokens=NEW, stop=(), batch_size=2)
SAMPLED = dataclasses.replace(GREEDY, samples=3, temperature=1.0, seed=5)
INSERT, ADVANCE = Session.insert, Session.advance
LARGER = len(ROWS)  # a batch with all rows in it


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [tiny(root / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model(folders):
    return load_model(folders[0], dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders[0])


@pytest.fixture(scope="module")
def greedy(model, tokenizer, tmp_path_factory):
    return generate(model, tokenizer, ROWS, GREEDY, tmp_path_factory.mktemp("g") / "out.jsonl")


@pytest.fixture(scope="module")
def sampled(model, tokenizer, tmp_path_factory):
    return generate(model, tokenizer, ROWS, SAMPLED, tmp_path_factory.mktemp("s") / "out.jsonl")


def plain_loop(model, tokenizer, row, config, sample):
    """One response, a full forward pass a token; the stop strings looked for after each token."""
    prompt = encode_prompt(tokenizer, row["prompt"])
    before, tokens, text = decode_tokens(tokenizer, prompt), [], ""
    while len(tokens) < config.max_new_tokens:
        padded = np.zeros((1, POSITIONS), np.int32)
        padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits = np.asarray(model(padded))[0, len(prompt) + len(tokens) - 1]
        if config.temperature:
            key = jax.random.key(config.seed)
            for number in (row_key(row["id"]), len(tokens), sample):
                key = jax.random.fold_in(key, number)
            noise = np.asarray(jax.random.gumbel(key, logits.shape))
            logits = logits / config.temperature + noise
        token = int(np.argmax(logits))
        if token in model.config.eos_ids:
            return text.strip(), True
        tokens.append(token)
        text = decode_tokens(tokenizer, [*prompt, *tokens]).removeprefix(before)
        starts = [text.find(one) for one in config.stop if one in text]
        if starts:
            return text[: min(starts)].strip(), True
    return text.rstrip("\ufffd").strip(), False


def check(rows, model, tokenizer, config):
    assert [(row["id"], row["sample"]) for row in rows] == [
        (row["id"], sample) for row in ROWS for sample in range(config.samples)
    ]
    by_id = {row["id"]: row for row in ROWS}
    for found in rows:
        assert list(found) == ["id", "sample", "response", "finished"]
        wanted = plain_loop(model, tokenizer, by_id[found["id"]], config, found["sample"])
        assert (found["response"], found["finished"]) == wanted


def common_pairs(rows, count):
    """Pairs of characters inside several responses, not at their beginning."""
    texts = [row["response"] for row in rows]
    pairs = sorted({text[at : at + 2] for text in texts for at in range(3, len(text) - 1)})
    pairs = [pair for pair in pairs if pair.isascii() and pair.strip() == pair]
    return tuple(sorted(pairs, key=lambda pair: -sum(pair in text for text in texts))[:count])


def test_greedy_is_the_plain_loop(model, tokenizer, greedy):
    check(greedy, model, tokenizer, GREEDY)
    assert any(row["response"] for row in greedy)


def test_samples_are_the_plain_loop_with_the_draws_of_their_rows(model, tokenizer, sampled):
    check(sampled, model, tokenizer, SAMPLED)
    by_row = {}
    for row in sampled:
        by_row.setdefault(row["id"], set()).add(row["response"])
    assert all(len(responses) > 1 for responses in by_row.values())


@pytest.fixture(scope="module")
def stopped(sampled):
    """Settings with stop strings that come up."""
    stop = common_pairs(sampled[:: SAMPLED.samples], 3)
    return dataclasses.replace(SAMPLED, stop=stop, samples=1, max_new_tokens=48)


def test_several_stop_strings_end_responses(model, tokenizer, sampled, stopped, tmp_path):
    rows = generate(model, tokenizer, ROWS, stopped, tmp_path / "out.jsonl")
    check(rows, model, tokenizer, stopped)
    assert not [row for row in rows for stop in stopped.stop if stop in row["response"]]
    pairs = list(zip(rows, sampled[:: SAMPLED.samples], strict=True))
    for one in stopped.stop:
        assert any(one in free["response"] and row["finished"] for row, free in pairs)


class Pieces:
    """A tokenizer of whole pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, tokens, **_):
        return "".join(self.pieces[token] for token in tokens)


@pytest.mark.parametrize(
    ("pieces", "kept", "text"),
    [
        (["ab", " c\nQues", "tion", ": d"], 2, "ab c\n"),
        (["ab", " c\nQ", "Question", ": d"], 2, "ab c\nQ"),
        (["ab", "Answer: c Question", "d"], 1, "ab"),
        (["Question", "Answer"], 0, ""),
    ],
)
def test_a_stop_string_may_begin_inside_the_last_token_that_counts(pieces, kept, text):
    tokens = tuple(range(len(pieces)))
    ends = {"finished": True, "stop": ("Question", "Answer"), "behind": tokens[kept:]}
    assert response_end(Pieces(*pieces), [], tokens[:kept], **ends)[0] == text


def test_neither_slots_nor_order_nor_neighbours_nor_other_samples_matter(
    model, tokenizer, sampled, tmp_path
):
    """And a slot that draws more than are wanted, the second of a row, gives what is wanted."""
    order = [4, 1, 5, 0]
    rows = [ROWS[index] for index in order]
    config = dataclasses.replace(SAMPLED, batch_size=LARGER, samples=5, samples_per_slot=3)
    found = generate(model, tokenizer, rows, config, tmp_path / "out.jsonl")
    assert [row["sample"] for row in found] == [*range(5)] * len(order)
    wanted = [row for index in order for row in sampled if row["id"] == ROWS[index]["id"]]
    assert [row for row in found if row["sample"] < SAMPLED.samples] == wanted
    by_id = {row["id"]: row for row in rows}
    for row in found:
        if row["sample"] >= SAMPLED.samples:
            one = plain_loop(model, tokenizer, by_id[row["id"]], config, row["sample"])
            assert (row["response"], row["finished"]) == one


def test_another_seed_and_another_id_draw_anew(model, tokenizer, sampled, tmp_path):
    other = dataclasses.replace(SAMPLED, seed=6)
    reseeded = generate(model, tokenizer, ROWS, other, tmp_path / "a.jsonl")
    renamed = [row | {"id": f"other {row['id']}"} for row in ROWS]
    moved = generate(model, tokenizer, renamed, SAMPLED, tmp_path / "b.jsonl")
    texts = [[row["response"] for row in rows] for rows in (sampled, reseeded, moved)]
    same = [sum(map(str.__eq__, texts[0], other)) for other in texts[1:]]
    assert max(same) <= 2


def test_keys_of_rows():
    assert row_key(7) == 7
    assert row_key(-1) == 2**32 - 1
    assert len({row_key(name) for name in ("7", "8", "q7", "é", "\ud800", 7)}) == 6


def test_a_prompt_is_read_once_for_its_samples_and_nothing_is_scored(
    model, tokenizer, sampled, tmp_path, monkeypatch
):
    inserted, states = [], []

    def insert(held, slot, request):
        inserted.append(request)
        return INSERT(held, slot, request)

    def advance(held):
        states.append(held.state)
        return ADVANCE(held)

    monkeypatch.setattr(Session, "insert", insert)
    monkeypatch.setattr(Session, "advance", advance)
    generate(model, tokenizer, ROWS, SAMPLED, tmp_path / "out.jsonl")
    assert len(inserted) == len(ROWS)
    for state in states:
        assert state.scorer == ()
        assert state.objectives.shape == (SAMPLED.batch_size, SAMPLED.samples, 0)
        (cache,) = state.proposer
        slots, prefix = cache.prefix[0].keys.shape[:2]
        assert slots == SAMPLED.batch_size
        assert prefix in (16, 32, 64)
        assert cache.committed[0].keys.shape[:2] == (SAMPLED.batch_size, SAMPLED.samples)


def test_slots_are_refilled_as_rows_finish(model, tokenizer, tmp_path, monkeypatch):
    stop = tuple("abcdefghijklmnop")  # of bytes at random: some rows end soon, some late
    settings = dataclasses.replace(SAMPLED, stop=stop, samples=1, max_new_tokens=48)
    rows = [{"id": index, "prompt": "A film"} for index in range(12)]
    begun, chunks, told = set(), dict.fromkeys(range(12), 0), []
    count = 0

    def advance(held):
        nonlocal count
        count += 1
        begun.update(request.row_id for request in held.requests.values())
        assert len(held.requests) == 2 or len(begun) == 12
        for request in held.requests.values():
            chunks[request.row_id] += 1
        return ADVANCE(held)

    monkeypatch.setattr(Session, "advance", advance)
    generate(
        model, tokenizer, rows, settings, tmp_path / "out.jsonl", lambda *done: told.append(done)
    )
    assert told == [(done, 12) for done in range(13)]
    in_pairs = sum(max(chunks[index], chunks[index + 1]) for index in range(0, 12, 2))
    assert count < in_pairs
    assert count <= sum(chunks.values()) // 2 + max(chunks.values())


def test_guided_samples_are_searches_of_their_seeds(folders, model, tokenizer, tmp_path):
    guide = Guide(*(load_model(folder, dtype="float32") for folder in folders[1:]))
    sizes = {"beam_width": 2, "successors": 2, "chunk_length": 3}
    config = dataclasses.replace(SAMPLED, method="cbs", samples=2, **sizes)
    rows = generate(model, tokenizer, ROWS, config, tmp_path / "out.jsonl", guide=guide)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in ROWS]
    keys = [row_key(row["id"]) for row in ROWS]
    for sample in range(2):
        settings = {"max_new_tokens": NEW, "seed": config.seed + sample, "slots": 2}
        settings["eos_ids"] = model.config.eos_ids
        plain = cbs(2, 2, 3, sampling=Sampling(1.0), **settings)
        results = search(model, guide, prompts, plain, row_ids=keys)
        for prompt, row, result in zip(prompts, rows[sample::2], results, strict=True):
            tokens = result.best.tokens
            before = decode_tokens(tokenizer, prompt)
            text = decode_tokens(tokenizer, [*prompt, *tokens]).removeprefix(before)
            assert row["response"] == text.rstrip("\ufffd").strip()
            assert row["finished"] == result.best.finished
    assert rows[0::2] != rows[1::2]


def test_killed_and_interrupted_it_ends_as_if_it_had_not_been(
    model, tokenizer, sampled, tmp_path, monkeypatch
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(model, tokenizer, ROWS, SAMPLED, whole)
    journal = Path(f"{output}.journal")

    def interrupted_at(rows):
        def advance(held):
            if journal.exists() and len(journal.read_bytes().splitlines()) == 1 + rows:
                raise KeyboardInterrupt
            return ADVANCE(held)

        with monkeypatch.context() as patched:
            patched.setattr(Session, "advance", advance)
            with pytest.raises(KeyboardInterrupt):
                generate(model, tokenizer, ROWS, SAMPLED, output)
        assert not output.exists()

    interrupted_at(2)
    with journal.open("ab") as file:  # what a kill leaves of a row
        file.write(b'{"row_id": 3, "row": {"rows": [{"id')
    interrupted_at(4)
    inserted = []

    def insert(held, slot, request):
        inserted.append(request)
        return INSERT(held, slot, request)

    monkeypatch.setattr(Session, "insert", insert)
    rows = generate(model, tokenizer, ROWS, SAMPLED, output)
    assert len(inserted) == len(ROWS) - 4
    assert output.read_bytes() == whole.read_bytes()
    assert rows == sampled == read_jsonl(output)
    assert not journal.exists()


def test_a_journal_of_other_settings_is_not_taken_up(model, tokenizer, sampled, tmp_path):
    output = tmp_path / "out.jsonl"

    def stop(done, count):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, ROWS, SAMPLED, output, stop)
    others = [
        (ROWS, dataclasses.replace(SAMPLED, max_new_tokens=5), {}, "max_new_tokens: 14 there"),
        (ROWS[1:], SAMPLED, {}, "prompts_sha256"),
        (ROWS, SAMPLED, {"model": "another"}, "model: None there, 'another' here"),
    ]
    for rows, config, identity, message in others:
        with pytest.raises(InputError, match=message):
            generate(model, tokenizer, rows, config, output, identity=identity)
    larger = dataclasses.replace(SAMPLED, batch_size=LARGER)
    assert generate(model, tokenizer, ROWS, larger, output) == sampled


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "f.jsonl: no rows"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "f.jsonl row 1: the id is there"),
        ([{"prompt": "a"}], "f.jsonl row 1: it needs an id"),
        ([{"id": True, "prompt": "a"}], "it needs an id"),
        ([{"id": "x"}], "f.jsonl row 'x': it needs a \"prompt\""),
        (
            [{"id": 3, "prompt": "a"}, {"id": "long", "prompt": "ÿ" * 45}],
            r"f.jsonl row 'long': a prompt of 91 tokens and 14 new ones do not fit the policy's 96",
        ),
        ([{"id": "s", "prompt": "\ud800"}], "f.jsonl row 's': the prompt is not text"),
    ],
)
def test_rows_that_cannot_be_answered(model, tokenizer, tmp_path, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        generate(model, tokenizer, rows, GREEDY, tmp_path / "out.jsonl", source="f.jsonl")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2}, "temperature 0"),
        ({"method": "cbs"}, "temperature 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"batch_size": 0}, "batch_size"),
        ({"samples_per_slot": 0}, "samples_per_slot"),
        ({"method": "cbs", "temperature": 1.0, "samples_per_slot": 2}, "samples_per_slot"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig(**fields)


def test_a_guide_too_many_or_too_few(model, tokenizer, tmp_path):
    guided = dataclasses.replace(SAMPLED, method="cbs")
    with pytest.raises(InputError, match="needs a guide"):
        generate(model, tokenizer, ROWS, guided, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="has no guide"):
        generate(model, tokenizer, ROWS, SAMPLED, tmp_path / "o.jsonl", guide=Guide(model, model))
