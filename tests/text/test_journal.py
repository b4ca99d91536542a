import json
import re
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.text.rows import journal_path, open_journal, read_jsonl

JOB = {"seed": 0, "prompts": "abc", "stop": ("a", "b")}


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "out.jsonl")


def test_rows_are_read_back_by_id(path):
    assert path.name == "out.jsonl.journal"
    journal = open_journal(path, JOB)
    assert journal.read() == {}
    journal.append(2, {"response": "c"})
    journal.append(0, {"response": "a\nb"})
    assert journal.read() == {2: {"response": "c"}, 0: {"response": "a\nb"}}
    assert open_journal(path, JOB).read() == journal.read()


def test_merging_writes_rows_in_input_order_and_removes_the_journal(path, tmp_path):
    journal = open_journal(path, JOB)
    for row_id in (3, 1, 0, 2):
        journal.append(row_id, {"id": row_id})
    journal.merge(tmp_path / "out.jsonl", 4)
    assert read_jsonl(tmp_path / "out.jsonl") == [{"id": 0}, {"id": 1}, {"id": 2}, {"id": 3}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_incomplete_journal_is_not_merged(path, tmp_path):
    journal = open_journal(path, JOB)
    journal.append(0, {"id": 0})
    journal.append(2, {"id": 2})
    with pytest.raises(InputError, match="2 of 4 rows are missing, first 1"):
        journal.merge(tmp_path / "out.jsonl", 4)
    assert sorted(journal.read()) == [0, 2]
    assert not (tmp_path / "out.jsonl").exists()


@given(st.integers(1, 400))
def test_any_cut_keeps_the_rows_before_it(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = open_journal(path, JOB)
    ends = []
    for row_id in range(5):
        journal.append(row_id, {"text": "é" * row_id})
        ends.append(path.stat().st_size)
    data = path.read_bytes()[: -min(cut, ends[-1])]
    path.write_bytes(data)
    journal = open_journal(path, JOB)
    whole = sum(end <= len(data) for end in ends)
    assert sorted(journal.read()) == list(range(whole))
    journal.append(9, {"text": "after"})
    assert sorted(open_journal(path, JOB).read()) == [*range(whole), 9]


@pytest.mark.parametrize("tail", [b'{"row_id": 1, "', b"\x00" * 100, b'{"row_id": 1}\n', b"\x00\n"])
def test_a_half_written_last_line_is_dropped_and_cut_away(path, tail):
    open_journal(path, JOB).append(0, {"a": 1})
    sound = path.read_bytes()
    path.write_bytes(sound + tail)
    assert open_journal(path, JOB).read() == {0: {"a": 1}}
    assert path.read_bytes() == sound


def test_a_damaged_line_elsewhere_is_an_error(path):
    journal = open_journal(path, JOB)
    journal.append(0, {"a": 1})
    journal.append(1, {"a": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" * 9 + b"\n" + lines[2])
    with pytest.raises(InputError, match=re.escape(f"{path} line 2: not a line of a journal")):
        open_journal(path, JOB)


def test_another_file_is_not_taken_for_a_journal(path):
    path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(InputError, match="line 1: not a line of a journal"):
        open_journal(path, JOB)
    assert path.read_text() == '{"prompt": "mine"}\n'


def test_other_settings_are_an_error_that_says_what_differs(path):
    open_journal(path, JOB).append(0, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        open_journal(path, {"seed": 1, "prompts": "abc", "stop": ("a", "b"), "w": 4})
    message = str(error.value)
    assert "holds 1 finished rows" in message
    assert "seed: 0 there, 1 here, w: None there, 4 here" in message
    assert "delete it to start anew" in message
    assert "\n" not in message
    assert path.read_bytes() == before


def test_a_journal_without_rows_binds_nobody(path):
    open_journal(path, {"seed": 7}).append(0, {"a": 1})
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    journal = open_journal(path, JOB)
    assert not path.exists()
    journal.append(0, {"a": 2})
    header = json.loads(path.read_bytes().splitlines()[0])
    assert header["fingerprint"] == {"seed": 0, "prompts": "abc", "stop": ["a", "b"]}


def test_a_job_that_finished_nothing_leaves_no_journal(path):
    open_journal(path, JOB)
    assert not path.exists()


def test_a_half_written_header_is_no_journal(path):
    path.write_bytes(b'{"w2s_jour')
    assert open_journal(path, JOB).read() == {}


def test_a_foreign_file_is_never_removed(path):
    path.write_text("my notes, without a line's end")
    with pytest.raises(InputError, match="not a journal"):
        open_journal(path, {})
    assert path.read_text() == "my notes, without a line's end"


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        open_journal(tmp_path / "file" / "out.journal", JOB)


WRITER = """
import sys
from w2s_jax.text.rows import open_journal
journal = open_journal(sys.argv[1], {"seed": 0})
for row_id in range(10**6):
    journal.append(row_id, {"text": "x" * 1000})
    print(row_id, flush=True)
"""


def test_what_was_appended_survives_a_kill(path):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(20):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    rows = open_journal(path, {"seed": 0}).read()
    assert len(rows) > told
    assert sorted(rows) == list(range(len(rows)))
