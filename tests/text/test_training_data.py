"""Files of rows through to batches: what is in them, what is refused, what is read again."""

import copy
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.chats import chat
from tests.text.data_cases import CHATML, MARKED
from tests.vocabularies import real_tokenizer
from w2s_jax.errors import InputError
from w2s_jax.text import training_data
from w2s_jax.text.batches import Batches, Document, Side, best_fit, write_store
from w2s_jax.text.chat import load_template
from w2s_jax.text.examples import Example
from w2s_jax.text.rows import write_jsonl
from w2s_jax.text.supervised import Encoded, encode, shorten
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.text.training_data import (
    DataConfig,
    load,
    open_source,
)

TOKENIZER = Path(__file__).parents[1] / "golden" / "training_data"
END, PAD = 0, 1
ROWS = [{"prompt": "the sea" * n, "completion": " and a film"} for n in (1, 9, 2, 5, 3, 7)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def config(tmp_path):
    """Writes rows to a file and makes the config that reads it."""

    def make(rows, **options):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        return DataConfig(
            **({"data": (str(tmp_path / "rows.jsonl"),)} | options), cache=str(tmp_path)
        )

    return make


def texts(tokenizer, batch, row, *, side=None):
    """What is read and what of it counts."""
    place = row if side is None else (row, side)
    tokens, targets, segments = (batch[name][place] for name in ("tokens", "targets", "segments"))
    return tokenizer.decode(tokens[segments > 0]), tokenizer.decode(tokens[targets])


# What a batch holds


def test_a_batch_is_padded_on_the_right_to_a_multiple(tokenizer, config):
    data = load("sequences", config(ROWS, pad_to_multiple_of=16), tokenizer)
    for indices in ([0], [1], [0, 1, 2]):
        batch = data.at(indices)
        width = -(-data.lengths[indices].max() // 16) * 16
        assert batch["tokens"].shape == (len(indices), width)
        assert batch["tokens"].dtype == batch["segments"].dtype == np.int32
        for row, index in enumerate(indices):
            length = data.lengths[index]
            assert batch["segments"][row].tolist() == [1] * length + [0] * (width - length)
            assert (batch["tokens"][row, length:] == PAD).all()
            assert not batch["targets"][row, length:].any()


def test_a_conversation_that_a_template_writes_as_nothing_has_no_tokens(tokenizer):
    marked = (
        "{% for m in messages if m['content'] %}{% generation %}a{% endgeneration %}{% endfor %}"
    )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = marked
    silent, told = (Example(None, (chat(("assistant", said)),), "assistant") for said in ("", "b"))
    found = encode(load_template(tokenizer, "chat", where="it"), [silent, told], ["1", "2"])
    assert [len(one.sides[0].tokens) for one in found] == [0, 1]
    assert found[1].sides[0].targets.dtype == bool


def test_no_row_is_wider_than_max_length(tokenizer, config):
    data = load("sequences", config(ROWS, max_length=30), tokenizer)
    assert data.at([1])["tokens"].shape == (1, 30)


def test_a_part_of_a_batch_is_as_wide_as_the_whole(tokenizer, config):
    data = load("sequences", config(ROWS, pad_to_multiple_of=8), tokenizer)
    whole, part = data.at([0, 2, 1]), data.at([0, 2, 1], slice(0, 2))
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][:2])


def test_the_chosen_side_is_first(tokenizer, config):
    rows = [{"prompt": "the", "responses": [" sea", " film"], "chosen": 1}]
    batch = load("pairs", config(rows), tokenizer).at([0])
    assert texts(tokenizer, batch, 0, side=0) == (
        "<|endoftext|>the film<|endoftext|>", " film<|endoftext|>",
    )  # fmt: skip
    assert texts(tokenizer, batch, 0, side=1)[1] == " sea<|endoftext|>"


def test_a_labelled_row_has_the_response_before_it_behind_its_own_prompt(tokenizer, config):
    rows = [
        {"prompt": f"the {a}", "completion": f" {b}", "label": a < "b"}
        for a, b in (("a", "x"), ("b", "y"), ("c", "z"))
    ]
    data = load("labelled", config(rows), tokenizer)
    batch = data.at([0, 2, 1])
    read = [texts(tokenizer, batch, row, side=1) for row in range(3)]
    assert [text for _, text in read] == [
        " y<|endoftext|>", " x<|endoftext|>", " z<|endoftext|>",
    ]  # fmt: skip
    assert [text for text, _ in read] == [
        f"<|endoftext|>the {a} {b}<|endoftext|>" for a, b in (("a", "y"), ("c", "x"), ("b", "z"))
    ]
    assert batch["labels"].tolist() == [True, False, False]
    part = data.at([0, 2, 1], slice(1, 3))
    for name in batch:
        np.testing.assert_array_equal(part[name], batch[name][1:])


DIALOGUE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize(
    ("loss_on", "counted"),
    [
        ("assistant", "two<|endoftext|>\nfour<|endoftext|>\n"),
        ("completion", "four<|endoftext|>\n"),
    ],
)
def test_answers_in_a_chat_template_without_marks(tokenizer, config, loss_on, counted):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = CHATML
    batch = load("sequences", config([{"messages": DIALOGUE}], loss_on=loss_on), chatty).at([0])
    assert texts(chatty, batch, 0)[1] == counted


@pytest.mark.parametrize(
    ("row", "loss_on", "counted"),
    [
        ({"messages": DIALOGUE}, "assistant", "two<|endoftext|>four<|endoftext|>"),
        ({"messages": DIALOGUE}, "completion", "four<|endoftext|>"),
        ({"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}, "assistant", "four<|endoftext|>"),
    ],
)
def test_answers_in_a_template_with_marks(config, row, loss_on, counted):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = MARKED
    batch = load("sequences", config([row], loss_on=loss_on), chatty).at([0])
    assert texts(chatty, batch, 0)[1] == counted


def test_a_conversation_that_the_assistant_opens(config):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|system|>Be kind.\n{% endif %}" + CHATML
    )
    rows = [{"messages": [{"role": "assistant", "content": "hi"}, *DIALOGUE]}]
    batch = load("sequences", config(rows, loss_on="assistant"), chatty).at([0])
    end = "<|endoftext|>\n"
    assert texts(chatty, batch, 0)[1] == f"hi{end}two{end}four{end}"


@pytest.mark.parametrize(
    ("first", "template", "found"),
    [
        # What is said comes again in what ends a turn, is written otherwise, or is a call alone.
        ({"content": "ext"}, "{{ m['content'] }}", "ext"),
        ({"content": "hi  you"}, "{{ m['content'] | upper }}", "HI  YOU"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
         "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}",
         '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'),
    ],
)  # fmt: skip
def test_what_the_assistant_opens_with_is_trained_however_it_is_written(
    config, first, template, found
):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>" + template + "<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"messages": [{"role": "assistant", **first}, {"role": "user", "content": "q"}]}]
    batch = load("sequences", config(rows, loss_on="assistant"), chatty).at([0])
    assert texts(chatty, batch, 0)[1] == f"{found}<|endoftext|>\n"


def test_thoughts_that_a_template_forgets_when_the_conversation_goes_on(config):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    batch = load("sequences", config([{"messages": DIALOGUE}], loss_on="assistant"), chatty).at([0])
    end = "<|endoftext|>\n"
    assert texts(chatty, batch, 0)[1] == f"two{end}<think>\n\n</think>\n\nfour{end}"


@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
@pytest.mark.parametrize("kept", ["thinking", "reasoning_content", None])
def test_thoughts_that_a_template_does_not_write_are_told(config, caplog, kept, loss_on):
    chatty = load_tokenizer(TOKENIZER)
    written = f"{{{{ m['{kept}'] if m['{kept}'] is defined else '' }}}}" if kept else ""
    chatty.chat_template = CHATML.replace("{{ m['content'] }}", written + "{{ m['content'] }}")
    thoughts = {"thinking": "it is", "reasoning_content": "was it"}
    rows = [{"messages": [*DIALOGUE[:3], DIALOGUE[3] | thoughts]}] * 2
    batch = load("sequences", config(rows, loss_on=loss_on), chatty).at([0])
    assert thoughts.get(kept, "") + "four" in texts(chatty, batch, 0)[1]
    left = [f'"{name}" of a message' for name in sorted(thoughts) if name != kept]
    assert [message.partition("rows.jsonl ")[2] for message in caplog.messages] == [
        f"line 1: no part of the training: {name}, which the template does not write"
        for name in left
    ]


def test_columns_are_read_by_the_names_of_the_format(tokenizer, config, caplog):
    rows = [{"question": row["prompt"], "answer": row["completion"], "prompt": 3} for row in ROWS]
    columns = ("prompt=question", "completion=answer")
    named = load("sequences", config(rows, columns=columns), tokenizer)
    assert (
        named.at([1])["tokens"].tolist()
        == load("sequences", config(ROWS), tokenizer).at([1])["tokens"].tolist()
    )
    (told,) = caplog.messages
    assert told.endswith(
        'line 1: no part of the training: "prompt", for which --columns takes "question"'
    )
    for wrong, told in (("prompt", "takes NAME=COLUMN"), ("prompt=q", 'no "q"; found "question"')):
        with pytest.raises(InputError, match=f"^--columns {wrong}: .*{told}"):
            load("sequences", config(rows, columns=(wrong,)), tokenizer)


def test_brackets_in_a_path_are_no_pattern(tokenizer, tmp_path):
    folder = tmp_path / "rows[1]"
    folder.mkdir()
    write_jsonl(folder / "train[2].jsonl", ROWS)
    table = pyarrow.table({"text": ["the sea", "a film"]})
    pyarrow.parquet.write_table(table, folder / "rows[3].parquet")
    rows = {
        name: len(load("sequences", DataConfig(data=(str(name),), cache=str(tmp_path)), tokenizer))
        for name in (folder / "train[2].jsonl", folder / "rows[3].parquet")
    }
    assert list(rows.values()) == [len(ROWS), 2]
    (folder / "rows[3].parquet").unlink()
    assert len(open_source(str(folder)).rows()[0]) == len(ROWS)


TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
        {"role": "tool", "content": "a film"},
        {"role": "assistant", "content": "two"},
    ],
    "tools": [{"type": "function", "function": {"name": "look"}}],
}
CALLING = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_calls_of_tools_are_trained_on_as_the_template_writes_them(config):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = CALLING
    batch = load("sequences", config([TOOL_ROW], loss_on="assistant"), chatty).at([0])
    whole = "[look]<|user|>one<|assistant|>look({})<|tool|>a film<|assistant|>two"
    assert texts(chatty, batch, 0) == (whole, "look({})two")
    chatty.chat_template = CHATML
    with pytest.raises(InputError, match="line 1: .*template does not write the tool 'look'"):
        load("sequences", config([TOOL_ROW]), chatty)
    with pytest.raises(InputError, match="line 1: the template zephyr writes no tools"):
        load("sequences", config([TOOL_ROW], template="zephyr"), chatty)


def test_what_is_no_part_of_the_training_is_told_once(tokenizer, config, caplog):
    rows = [row | {"system": "s", "score": 1} for row in ROWS]
    load("sequences", config(rows), tokenizer)
    (told,) = caplog.messages
    assert told.endswith('rows.jsonl line 1: no part of the training: "system"')


def test_the_last_answer_behind_a_plain_text_of_turns(tokenizer, config):
    options = {"template": "plain", "loss_on": "completion"}
    data = load("sequences", config([{"messages": DIALOGUE}], **options), tokenizer)
    whole = "<|endoftext|>user: one\nassistant: two\nuser: three\nassistant: four<|endoftext|>"
    assert texts(tokenizer, data.at([0]), 0) == (whole, "four<|endoftext|>")


def test_a_row_of_one_turn_reads_as_a_plain_text(tokenizer, config):
    rows = [{"instruction": "the sea", "input": "", "output": " and a film"}]
    data = load("sequences", config(rows, template="plain"), tokenizer)
    like = [{"prompt": "the sea", "completion": " and a film"}]
    for name, array in load("sequences", config(like), tokenizer).at([0]).items():
        np.testing.assert_array_equal(data.at([0])[name], array)


@pytest.mark.parametrize(
    ("template", "whole", "counted"),
    [
        ("zephyr",
         "<|system|>\n</s>\n<|user|>\none</s>\n<|assistant|>\ntwo</s>\n<|user|>\nthree</s>\n"
         "<|assistant|>\nfour<|endoftext|>",
         "two</s>four<|endoftext|>"),
        ("starling",
         "<s>GPT4 Correct User: one<|end_of_turn|>GPT4 Correct Assistant: two<|end_of_turn|>"
         "GPT4 Correct User: three<|end_of_turn|>GPT4 Correct Assistant: four<|endoftext|>",
         "two<|end_of_turn|>four<|endoftext|>"),
    ],
)  # fmt: skip
def test_answers_in_published_templates(tokenizer, config, template, whole, counted):
    """The vocabulary here has no </s>: what ends the last answer is the tokenizer's EOS."""
    options = {"template": template, "loss_on": "assistant"}
    data = load("sequences", config([{"messages": DIALOGUE}], **options), tokenizer)
    assert texts(tokenizer, data.at([0]), 0) == (whole, counted)


def test_a_template_that_forgets_earlier_turns_cannot_tell_answers(config):
    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match=r"line 1: the chat template writes .* generation"):
        load("sequences", config([{"messages": DIALOGUE}], loss_on="assistant"), chatty)


def test_an_empty_prompt_begins_as_a_search_does(tokenizer, config):
    batch = load("sequences", config([{"prompt": "", "completion": "sea"}]), tokenizer).at([0])
    assert texts(tokenizer, batch, 0) == ("<|endoftext|>sea<|endoftext|>", "sea<|endoftext|>")


def test_a_bos_in_the_text_is_not_doubled(tokenizer, config):
    prompts = ("the sea", f"{tokenizer.bos_token}the sea")
    rows = [{"prompt": prompt, "completion": " and a film"} for prompt in prompts]
    plain, begun = load("sequences", config(rows), tokenizer).at([0, 1])["tokens"]
    assert begun.tolist() == plain.tolist()


# Length


def example(*lengths, prompt):
    sides = []
    for side, length in enumerate(lengths):
        targets = np.arange(length) >= max(prompt, 1)
        sides.append(Side(np.arange(length, dtype=np.int32) + 100 * side, targets, prompt))
    return Encoded(tuple(sides))


@pytest.mark.parametrize(
    ("policy", "whole", "kept"),
    [
        ("keep_start", example(9, prompt=3), [[range(6)]]),
        ("keep_start", example(9, prompt=6), []),
        ("keep_start", example(9, 5, prompt=3), [[range(6), range(100, 105)]]),
        ("keep_end", example(9, prompt=6), [[range(3, 9)]]),
        ("keep_end", example(9, 5, prompt=3), [[range(3, 9), range(100, 105)]]),
        ("keep_response", example(9, 7, prompt=4), [[range(3, 9), range(103, 107)]]),
        ("keep_response", example(12, prompt=3), [[range(2, 8)]]),
        ("drop", example(9, 5, prompt=3), []),
        ("drop", example(6, prompt=3), [[range(6)]]),
        ("split", example(14, prompt=0), [[range(6)], [range(6, 12)], [range(12, 14)]]),
        ("split", example(13, prompt=0), [[range(6)], [range(6, 12)]]),
    ],
)
def test_truncation(policy, whole, kept):
    found = shorten(whole, 6, policy)
    assert [[side.tokens.tolist() for side in one.sides] for one in found] == [
        [list(side) for side in sides] for sides in kept
    ]
    for one in found:
        for before, side in zip(whole.sides, one.sides, strict=True):
            assert not side.targets[0]
            places = side.tokens[1:] - before.tokens[0]
            np.testing.assert_array_equal(side.targets[1:], before.targets[places])


def test_what_truncation_did_is_counted(tokenizer, config):
    data = load("sequences", config(ROWS, max_length=14), tokenizer)
    kept = [row for row in ROWS if len(tokenizer(row["prompt"]).input_ids) < 14]
    assert 0 < len(kept) < len(ROWS)
    assert (data.figures["rows"], data.figures["kept"]) == (len(ROWS), len(kept))
    assert data.figures["dropped"] == len(ROWS) - len(kept)
    assert data.figures["tokens"] == data.lengths.sum()


def test_a_long_row_is_an_error_where_asked(tokenizer, config):
    with pytest.raises(InputError, match=r"rows.jsonl line 2: \d+ tokens, and --max-length is 20"):
        load("sequences", config(ROWS, max_length=20, truncation="error"), tokenizer)


# Packing


@given(seed=st.integers(0, 100), truncation=st.sampled_from(["keep_start", "drop", "split"]))
def test_packed_rows_hold_every_document_once(tmp_path_factory, tokenizer, seed, truncation):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("packing")
    words = ["sea", "film", "of", "it", "and"]
    rows = [
        {"text": " ".join(rng.choice(words, rng.integers(1, 30)))}
        for _ in range(rng.integers(4, 20))
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    options = {"data": (str(folder / "rows.jsonl"),), "cache": str(folder)}
    options |= {"max_length": 24, "truncation": truncation}
    plain = load("sequences", DataConfig(**options), tokenizer)
    packed = load("sequences", DataConfig(**options, packing="best-fit"), tokenizer)
    again = load("sequences", DataConfig(**options, packing="best-fit"), tokenizer)
    found, names = [], []
    for index in range(len(packed)):
        batch = packed.at([index])
        tokens, targets, segments = (batch[name][0] for name in ("tokens", "targets", "segments"))
        assert len(tokens) == 24
        count = segments.max()
        used = segments[segments > 0]
        assert (np.diff(used) >= 0).all()
        assert set(used) == set(range(1, count + 1))
        assert not segments[len(used) :].any()
        assert packed.lengths[index] == len(used)
        for segment in range(1, count + 1):
            here = segments == segment
            assert not targets[here][0]
            found.append((tokens[here].tolist(), targets[here].tolist()))
        assert not targets[segments == 0].any()
        names += packed.names(index)
        for name in batch:
            np.testing.assert_array_equal(again.at([index])[name], batch[name])
    expected = []
    for index in range(len(plain)):
        batch, length = plain.at([index]), plain.lengths[index]
        expected.append(tuple(batch[name][0, :length].tolist() for name in ("tokens", "targets")))
    assert sorted(found) == sorted(expected)
    assert sorted(names) == sorted(one for i in range(len(plain)) for one in plain.names(i))
    assert len(packed) == len(best_fit(plain.lengths, 24))
    assert packed.identity == again.identity != plain.identity


def test_batches_of_packed_rows(tokenizer, config):
    data = load("sequences", config(ROWS * 5, packing="best-fit", max_length=64), tokenizer)
    batches = Batches(data, 2, part=(1, 2))
    batch = batches(0)
    assert batch["tokens"].shape == (1, 64)
    assert batch["segments"].max() > 1
    assert len(batches.names(0)) >= 2 + batch["segments"].max() - 1


# The cache


def test_a_second_run_reads_what_the_first_one_wrote(tokenizer, config, monkeypatch):
    made = config(ROWS)
    first = load("sequences", made, tokenizer)

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(training_data, "encode", refuse)
    second = load("sequences", made, load_tokenizer(TOKENIZER))
    assert (second.identity, second.figures) == (first.identity, first.figures)
    for name, array in first.at(range(6)).items():
        np.testing.assert_array_equal(second.at(range(6))[name], array)


def test_datasets_opens_the_cache(tokenizer, config, tmp_path):
    from datasets import Dataset

    data = load("sequences", config(ROWS), tokenizer)
    (path,) = tmp_path.glob("*.arrow")
    opened = Dataset.from_file(str(path))
    assert len(opened) == len(data)
    assert opened[1]["tokens"] == data.store.side(1).tokens.tolist()


@pytest.mark.parametrize("how", ["cut", "notes", "other notes", "cut between blocks", "empty"])
def test_a_damaged_cache_is_made_again(tokenizer, config, tmp_path, how):
    made = config(ROWS)
    first = load("sequences", made, tokenizer).at([0, 1])
    (path,) = tmp_path.glob("*.arrow")
    if how == "notes":
        path.with_suffix(".json").unlink()
    elif how == "other notes":
        path.with_suffix(".json").write_text("{}")
    elif how == "cut between blocks":
        notes = json.loads(path.with_suffix(".json").read_text())
        side = Side(np.arange(3, dtype=np.int32), np.ones(3, bool), 0)
        write_store(path, [[Document(side, 0, 1)]] * 2, notes)
    else:
        path.write_bytes(path.read_bytes()[: -200 if how == "cut" else 0])
    again = load("sequences", made, tokenizer).at([0, 1])
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])


def test_what_decides_on_tokens_decides_on_the_identity(tokenizer, config, tmp_path):
    made = [
        load("sequences", config(ROWS, **options), tokenizer).identity
        for options in ({}, {"max_length": 64}, {"loss_on": "all"}, {"limit": 3})
    ]
    made.append(load("sequences", config(ROWS, split="train[1:]"), tokenizer).identity)
    made.append(load("sequences", config(ROWS[::-1]), tokenizer).identity)
    other = load_tokenizer(TOKENIZER)
    other.add_tokens(["film"])
    made.append(load("sequences", config(ROWS), other).identity)
    assert len(set(made)) == len(made)
    same = config(ROWS, pad_to_multiple_of=8)
    assert load("sequences", same, tokenizer).identity == made[0]
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = DataConfig(data=(str(tmp_path / "moved.jsonl"),), cache=str(tmp_path))
    data = load("sequences", moved, tokenizer)
    assert data.identity == made[0]
    assert data.names(1) == [f"{tmp_path / 'moved.jsonl'} line 2"]


def test_padding_set_on_the_tokenizer_changes_nothing(config):
    tokenizer = load_tokenizer(TOKENIZER)
    before = load("sequences", config(ROWS), tokenizer).identity
    tokenizer(["the", "the sea"], padding=True, truncation=True, max_length=8)
    data = load("sequences", config(ROWS, limit=5), tokenizer)
    assert load("sequences", config(ROWS), tokenizer).identity == before
    assert data.lengths.max() > 8


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs /proc")
def test_a_cache_that_cannot_be_written_is_told(tokenizer, config):
    made = config(ROWS)
    with pytest.raises(InputError, match=r"^/proc/nowhere/.*cannot be written"):
        load("sequences", DataConfig(data=made.data, cache="/proc/nowhere"), tokenizer)


# Files


def test_files_of_several_kinds_are_read_one_after_the_other(tokenizer, tmp_path):
    from datasets import Dataset

    write_jsonl(tmp_path / "a.jsonl.xz", ROWS[:2])
    with gzip.open(tmp_path / "b.json.gz", "wt") as file:
        json.dump(
            [{"content": row["prompt"], "output": row["completion"]} for row in ROWS[2:4]], file
        )
    Dataset.from_list(ROWS[4:]).to_parquet(tmp_path / "c.parquet")
    names = ("a.jsonl.xz", "b.json.gz", "c.parquet")
    files = tuple(str(tmp_path / name) for name in names)
    data = load("sequences", DataConfig(data=files, cache=str(tmp_path)), tokenizer)
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    alone = DataConfig(data=(str(tmp_path / "all.jsonl"),), cache=str(tmp_path))
    for name, array in load("sequences", alone, tokenizer).at(range(6)).items():
        np.testing.assert_array_equal(data.at(range(6))[name], array)
    assert [data.names(index) for index in (1, 2, 5)] == [
        [f"{files[0]} line 2"], [f"{files[1]} row 1"], [f"{files[2]} row 2"],
    ]  # fmt: skip


def test_messages_of_a_parquet_file(tmp_path):
    from datasets import Dataset

    chatty = load_tokenizer(TOKENIZER)
    chatty.chat_template = CHATML
    Dataset.from_list([{"messages": DIALOGUE}] * 2).to_parquet(tmp_path / "rows.parquet")
    made = DataConfig(data=(str(tmp_path / "rows.parquet"),), cache=str(tmp_path))
    assert len(load("sequences", made, chatty)) == 2


def test_a_folder_is_read_by_its_splits(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
        write_jsonl(folder / f"{split}.jsonl", rows)
    made = DataConfig(data=(str(folder),), split="test", cache=str(tmp_path))
    data = load("sequences", made, tokenizer)
    assert (len(data), data.names(1)) == (2, [f"{folder} row 2"])


def test_a_part_of_a_file(tokenizer, config):
    whole = load("sequences", config(ROWS), tokenizer)
    first, rest = (
        load("sequences", config(ROWS, split=split), tokenizer)
        for split in ("train[:50%]", "train[50%:]")
    )
    assert (len(first), len(rest)) == (3, 3)
    assert [rest.names(index) for index in range(3)] == [whole.names(index) for index in (3, 4, 5)]
    assert len(load("sequences", config(ROWS, limit=4), tokenizer)) == 4


def test_a_data_set_of_the_hub(tokenizer, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = DataConfig(data=("some/set:main",), split="train[2:4]", cache=str(tmp_path))
    data = load("sequences", made, tokenizer)
    assert asked == [("some/set", "main", "train")]
    assert [data.names(index) for index in range(2)] == [
        ["some/set:main row 3"],
        ["some/set:main row 4"],
    ]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", "", r"rows.jsonl: no rows"),
        ("rows.json", "[]", r"rows.json: no rows"),
        ("rows.jsonl", '{"text": "a"}\n{"prompt"', r"rows.jsonl line 2: not JSON"),
        ("rows.txt", "a", r"rows.txt: not one of the files that can be read: .jsonl"),
        ("rows.parquet", "a", r"rows.parquet: cannot be read \("),
        ("rows.jsonl", '{"question": "a"}', r'rows.jsonl: a row needs .*; found "question"'),
        ("rows.jsonl", '{"prompt": "a\\ud800", "completion": "b"}', "line 1: not text"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    made = DataConfig(data=(str(tmp_path / name),), cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=told) as error:
        load("sequences", made, tokenizer)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data": ()}, "--data: name a file"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl: no such file"),
        ({"data": ("no where",)}, "no where: no such file"),
        ({"data": ("no/where",)}, r"no/where: cannot be read \("),
        ({"split": "train[5:4]"}, r"rows.jsonl: no rows from 5 to 4"),
        ({"split": "train["}, r"--split train\[: it takes"),
        ({"max_length": 1}, "--max-length 1: it takes at least 2"),
        ({"template": "zephir"}, "--template: no template 'zephir'"),
        ({"max_length": 2}, r"rows.jsonl: no row is left \(rows 6, dropped 6\)"),
        ({"loss_on": "assistant"}, "rows.jsonl line 1: text has no turns"),
        ({"format": "messages"}, 'rows.jsonl: no "messages"; found "prompt", "completion"'),
    ],
)
def test_options_that_cannot_be(tokenizer, config, options, told):
    with pytest.raises(InputError, match=told) as error:
        load("sequences", config(ROWS, **options), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"packing": "best-fit"}, "--packing best-fit: pairs are not packed"),
        ({"loss_on": "all"}, "--loss-on all: pairs count their responses"),
        ({"truncation": "split"}, "--truncation split: pairs cannot be split"),
    ],
)
def test_options_that_are_not_for_pairs(tokenizer, config, options, told):
    with pytest.raises(InputError, match=told):
        load("pairs", config(PAIRS, **options), tokenizer)


PAIRS = [
    {"prompt": "the sea", "chosen": " and", "rejected": " of"},
    {"prompt": "the sea", "chosen": " of", "rejected": " of"},
]


def test_equal_responses_are_refused_or_left_out(tokenizer, config):
    with pytest.raises(InputError, match=r"line 2: chosen and rejected are equal; .*--equal-pairs"):
        load("pairs", config(PAIRS), tokenizer)
    data = load("pairs", config(PAIRS, equal_pairs="drop"), tokenizer)
    assert (len(data), data.figures["equal"]) == (1, 1)
    with pytest.raises(InputError, match=r"no row is left \(rows 1, equal 1\)"):
        load("pairs", config(PAIRS[1:], equal_pairs="drop"), tokenizer)


def test_pairs_carry_the_weights_of_their_column(tokenizer, config):
    weighted = [{**PAIRS[0], "weight": weight} for weight in (0.7, 2, 0.25)]
    data = load("pairs", config(weighted, weight_column="weight"), tokenizer)
    np.testing.assert_array_equal(data.at([2, 0])["weights"], np.float32([0.25, 0.7]))
    np.testing.assert_array_equal(data.at([2, 1], slice(1, 2))["weights"], np.float32([2]))
    assert "weights" not in load("pairs", config(weighted), tokenizer).at([0])


@pytest.mark.parametrize("weight", [None, 0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_weight_is_a_number_above_zero(tokenizer, config, weight):
    rows = [{**PAIRS[0], "weight": 1.0}, {**PAIRS[0], "weight": weight}]
    with pytest.raises(InputError, match=r'line 2: "weight" is .* takes a number above 0'):
        load("pairs", config(rows, weight_column="weight"), tokenizer)


def test_only_pairs_are_weighted(tokenizer, config):
    with pytest.raises(InputError, match="--weight-column weight: single responses carry none"):
        load("sequences", config(PAIRS[:1], weight_column="weight"), tokenizer)
    with pytest.raises(InputError, match="--weight-column weight: labelled rows carry none"):
        load("labelled", config(PAIRS[:1], weight_column="weight"), tokenizer)


def test_messages_need_a_template(tokenizer, config):
    with pytest.raises(InputError, match="line 1: --template: the tokenizer has no chat template"):
        load("sequences", config([{"messages": DIALOGUE}]), tokenizer)


# Real data


@pytest.fixture(scope="module")
def llama2(shared_data, tmp_path_factory):
    return real_tokenizer(shared_data, "llama2", tmp_path_factory.mktemp("llama2"))


def test_the_published_reasoning_pairs(shared_data, llama2, tmp_path):
    name = shared_data / "w2s_reasoning" / "train_gsm8k_llama2_7b_iter2_hybrid_paired.json.gz"
    made = DataConfig(data=(str(name),), template="plain", cache=str(tmp_path), limit=100)
    data = load("pairs", made, llama2)
    assert (len(data), data.figures["dropped"]) == (100, 0)
    read, counted = texts(llama2, data.at([0]), 0, side=0)
    assert read.endswith("How much did she earn?\nAnswer:" + counted)
    assert counted.endswith("#### 10</s>")


def test_the_published_reasoning_sets(shared_data, llama2, tmp_path):
    name = shared_data / "w2s_reasoning" / "train_gsm8k_llama2_7b_iter1_weak.json.gz"
    data = load(
        "sequences",
        DataConfig(data=(str(name),), cache=str(tmp_path), packing="best-fit", limit=900),
        llama2,
    )
    assert data.figures["kept"] == 900
    assert data.figures["tokens"] / (len(data) * 1024) > 0.97


def test_eos_may_be_left_to_the_rows(tokenizer, tmp_path):
    ended = {"prompt": "ab", "chosen": f" ba{tokenizer.eos_token}", "rejected": " aa"}
    write_jsonl(tmp_path / "pairs.jsonl", [ended])
    ends = []
    for append in (True, False):
        config = DataConfig(
            data=(str(tmp_path / "pairs.jsonl"),), cache=str(tmp_path), append_eos=append
        )
        batch = load("pairs", config, tokenizer).at([0])
        last = (batch["segments"][0] > 0).sum(-1) - 1
        found = batch["tokens"][0, [0, 1], last]
        ends.append((found == tokenizer.eos_token_id).tolist())
    assert ends == [[True, True], [True, False]]
