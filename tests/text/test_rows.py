import gzip
import json
import lzma
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2s_jax.errors import InputError
from w2s_jax.text.rows import check_writable, json_line, locked, read_jsonl, read_rows, write_jsonl

ROWS = [{"prompt": "A film of β and 電影", "n": 1}, {"prompt": "two\nlines", "a": {"b": [1, None]}}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz"])
def test_rows_come_back_as_they_were_written(tmp_path, name):
    write_jsonl(tmp_path / name, ROWS)
    assert read_jsonl(tmp_path / name) == ROWS
    assert os.listdir(tmp_path) == [name]


def test_the_suffix_says_how_a_file_is_compressed(tmp_path):
    for name, opener in (("a.gz", gzip.open), ("a.xz", lzma.open)):
        write_jsonl(tmp_path / name, ROWS)
        with opener(tmp_path / name) as file:
            assert json.loads(file.readline()) == ROWS[0]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_row_is_one_line(row):
    line = json_line(row)
    assert line.count(b"\n") == 1
    assert json.loads(line) == row


def test_text_without_a_utf8_form_survives():
    assert json.loads(json_line({"text": "\ud800"})) == {"text": "\ud800"}


@pytest.mark.parametrize("content", [json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))])
def test_a_byte_order_mark_in_front_does_not_matter(tmp_path, content):
    path = tmp_path / "in.json"
    path.write_text(content, encoding="utf-8-sig")
    assert read_rows(path)[0] == ROWS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n  \n"])
def test_line_endings_and_blank_ends_do_not_matter(tmp_path, ending, tail):
    path = tmp_path / "in.jsonl"
    path.write_bytes((ending.join(json.dumps(row) for row in ROWS) + tail).encode())
    assert read_jsonl(path) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2}\n{"a": \n', "line 3: not JSON: Expecting value at column 6"),
        (b'{"a": 1}\n\n{"a": 2}\n', "line 2: an empty line"),
        (b'{"a": 1}\n[1, 2]\n', "line 2: not a JSON object but list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8 (invalid start byte at byte 8)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"", "no rows; one JSON object a line is needed"),
        (b"\n \n", "no rows"),
    ],
)
def test_a_malformed_file_names_its_line(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_jsonl(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_jsonl(tmp_path)
    sound = gzip.compress(b'{"a": 1}\n' * 1000)
    for name, content in (("cut.gz", sound[:20]), ("plain.gz", b"{}\n"), ("plain.xz", b"{}\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(name)):
            read_jsonl(tmp_path / name)


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "out.jsonl", "file is not a folder"),
        (tmp_path / "file" / "deep" / "out.jsonl", "deep is not a folder"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path)
    assert (tmp_path / "file").read_text() == "kept"


def test_checking_makes_the_folder_and_leaves_nothing_else(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "out.jsonl")
    assert os.listdir(tmp_path / "new" / "deep") == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, ROWS)
    with pytest.raises(TypeError):
        write_jsonl(path, [{"not json": {1, 2}}])
    assert read_jsonl(path) == ROWS
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_rows_are_lines_or_one_array(tmp_path):
    rows = [{"instruction": "a"}, {"instruction": "b"}]
    write_jsonl(tmp_path / "lines.jsonl.gz", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    assert read_rows(tmp_path / "lines.jsonl.gz") == (rows, f"{tmp_path}/lines.jsonl.gz line")
    assert read_rows(tmp_path / "array.json") == (rows, f"{tmp_path}/array.json row")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "the array is empty"), ("[{}, 3]", "row 2: not a JSON object"), ("[{}", "not a JSON")],
)
def test_wrong_arrays_are_refused(tmp_path, text, message):
    (tmp_path / "array.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "array.json")


def test_one_run_at_a_time_holds_an_output(tmp_path, run_python):
    path = tmp_path / "out.journal"
    code = f"from w2s_jax.text.rows import locked\nwith locked({str(path)!r}): print('held')"
    with locked(path):
        with pytest.raises(AssertionError, match="another run is writing this output"):
            run_python(code)
        link = path.with_name("link")
        link.symlink_to(path)
        with pytest.raises(InputError, match="another run is writing this output"), locked(link):
            pass
        link.unlink()
    assert run_python(code) == "held\n"
    assert not list(path.parent.iterdir())
