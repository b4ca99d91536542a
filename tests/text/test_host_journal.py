import pytest

from w2s_jax.errors import InputError
from w2s_jax.text.rows import Journal, host_journal_path, job_journal, open_journal, read_jsonl

MARK = {"seed": 1}


def left(output, host, *ids):
    journal = open_journal(host_journal_path(output, host), MARK)
    for row_id in ids:
        journal.append(row_id, {"n": row_id})


def test_one_host_has_the_plain_journal(tmp_path):
    output = tmp_path / "out.jsonl"
    with job_journal(output, MARK) as journal:
        assert (journal.host, journal.count, journal.others) == (0, 1, ())
        assert journal.path == tmp_path / "out.jsonl.journal"
        assert journal.is_own(7)


def test_one_process_goes_on_with_what_several_hosts_left(tmp_path):
    output = tmp_path / "out.jsonl"
    left(output, 0, 0, 4)
    left(output, 1, 1)
    left(output, 12, 2)
    (tmp_path / "other.jsonl.host1.journal").write_text("not ours")
    with job_journal(output, MARK) as journal:
        assert journal.others == tuple(host_journal_path(output, host) for host in (1, 12))
        assert journal.read() == {n: {"n": n} for n in (0, 1, 2, 4)}
        assert journal.is_own(3)
        with pytest.raises(InputError, match="1 of 5 rows are missing, first 3"):
            journal.merge(output, 5)
        journal.append(3, {"n": 3})
        journal.merge(output, 5)
    assert read_jsonl(output) == [{"n": n} for n in range(5)]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "other.jsonl.host1.journal"}


def test_a_journal_of_another_host_and_other_settings_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    left(output, 1, 1)
    with pytest.raises(InputError, match="with other settings"), job_journal(output, {"seed": 2}):
        pass


def test_rows_are_shared_by_their_ids(tmp_path):
    journals = [Journal(tmp_path / "a", MARK, (), host, 3) for host in range(3)]
    assert [[j.is_own(i) for j in journals].index(True) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
