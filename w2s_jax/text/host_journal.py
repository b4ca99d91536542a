"""The journal of a job that several hosts do: each writes its share of the rows, one the output.

No file system need be shared. On one host it is the plain journal of `journal.py`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s_jax.exchange import gather_values
from w2s_jax.hosts import is_first, own_number
from w2s_jax.text.journal import Journal, check_whole, held, journal_path, open_journal
from w2s_jax.text.rows import Row, write_jsonl


@dataclass(frozen=True)
class HostJournal:
    """What `Journal` is on one host. `own` is this host's, `others` are those of earlier runs.

    Row i is the share of host i modulo their number. But for `append`, all hosts call each method.
    """

    own: Journal
    others: tuple[Journal, ...]
    host: int
    count: int

    @property
    def path(self) -> Path:
        """Where this host's rows go."""
        return self.own.path

    def is_own(self, row_id: int) -> bool:
        """Whether a row is this host's to write."""
        return row_id % self.count == self.host

    def append(self, row_id: int, row: Mapping[str, Any]) -> None:
        """Add a finished row of this host's; it is on the disk when this returns."""
        self.own.append(row_id, row)

    def read(self) -> dict[int, Row]:
        """The finished rows of all hosts by id."""
        rows: dict[int, Row] = {}
        for journal in (*self.others, self.own):
            rows |= journal.read()
        found: dict[int, Row] = {}
        for part in gather_values(list(rows.items())):
            found |= {int(row_id): row for row_id, row in part}
        return dict(sorted(found.items()))

    def merge(
        self,
        output: str | Path,
        count: int,
        write: Callable[[str | Path, Iterable[Row]], None] = write_jsonl,
    ) -> None:
        """As `Journal.merge`: the first host writes, then every host removes its journals."""
        rows = self.read()
        check_whole(self.path, rows, count)
        if is_first():
            write(output, (rows[row_id] for row_id in range(count)))
        gather_values(None)  # the output is there before a journal goes
        for journal in (*self.others, self.own):
            journal.path.unlink(missing_ok=True)


def host_journal_path(output: str | Path, host: int) -> Path:
    """Where a host's journal lies: OUTPUT.journal for the first, OUTPUT.host1.journal and so on."""
    return journal_path(output) if host == 0 else journal_path(f"{output}.host{host}")


@contextlib.contextmanager
def job_journal(
    output: str | Path, fingerprint: Mapping[str, Any]
) -> Iterator[Journal | HostJournal]:
    """The journal beside `output` that this process is to write, held while the block runs.

    On several hosts each has one of its own. Those that an earlier run left here with another
    number of hosts are taken up too. Raises InputError as `held` and `open_journal` do.
    """
    host, count = own_number()
    with contextlib.ExitStack() as stack:
        path = host_journal_path(output, host)
        stack.enter_context(held(path))
        own = open_journal(path, fingerprint)
        left = [at for at in _left_behind(output) if at >= count and at % count == host]
        if count == 1 and not left:
            yield own
            return
        others = []
        for at in left:
            stack.enter_context(held(host_journal_path(output, at)))
            others.append(open_journal(host_journal_path(output, at), fingerprint))
        yield HostJournal(own, tuple(others), host, count)


def _left_behind(output: str | Path) -> list[int]:
    """Numbers of the hosts, but the first, whose journals lie beside an output."""
    output = Path(output)
    start, end = f"{output.name}.host", ".journal"
    names = (path.name for path in output.parent.glob("*.journal"))
    numbers = [name[len(start) : -len(end)] for name in names if name.startswith(start)]
    return sorted(int(number) for number in numbers if number.isdecimal())
