"""Files that Git LFS did not fetch: whoever reads one says so."""

import pytest

from w2s_jax.errors import InputError
from w2s_jax.plan.matrix import open_records
from w2s_jax.reasoning.config import ReasonConfig
from w2s_jax.reasoning.stages import _read
from w2s_jax.text.rows import open_journal, read_rows
from w2s_jax.text.tokenizer import load_tokenizer
from w2s_jax.text.training_data import open_source
from w2s_jax.text.typed_yaml import read_mapping, read_typed
from w2s_jax.train.export import read_record
from w2s_jax.train.watch import read_records

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"
READERS = [
    ("rows.jsonl", read_rows),
    ("rows.parquet", lambda path: open_source(str(path)).rows()),
    ("rows.csv", lambda path: open_source(str(path.parent)).rows()),
    ("flags.yaml", read_mapping),
    ("stages.yaml", lambda path: read_typed(ReasonConfig, path)),
    ("adapter_config.json", lambda path: load_tokenizer(path.parent)),
    ("rows.jsonl.journal", lambda path: open_journal(path, {})),
    ("run.json", lambda path: read_record(path.parent)),
    ("metrics.jsonl", read_records),
    ("done.json", lambda path: _read(path, ())),
    ("plans.md", lambda path: open_records(path, None, "", "")),
    ("plans.json", lambda path: open_records(None, path, "", "")),
]


@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, name, read):
    path = tmp_path / name
    path.write_bytes(POINTER)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == f"{path} is a Git LFS pointer, not the file; run git lfs pull there"
