"""Files of training rows: read, tokenised once, cached, packed.

The meaning of a row is in text/examples.py, its tokens in text/supervised.py, and the file of
tokens and its batches in text/batches.py.
"""

import glob
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError, check_fetched, check_fields
from w2s_jax.text.batches import (
    FIGURES,
    NO_LABEL,
    Data,
    Document,
    Kind,
    best_fit,
    read_store,
    write_store,
)
from w2s_jax.text.chat import Template, load_template
from w2s_jax.text.examples import Example, Format, parser
from w2s_jax.text.rows import read_rows
from w2s_jax.text.supervised import Encoded, Truncation, encode, shorten
from w2s_jax.text.tokenizer import tell_left_out

_logger = logging.getLogger(__name__)
_VERSION = 4  # of the cache: raise it when the same rows would give other tokens
_BLOCK = 1000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how rows become tokens."""

    data: tuple[str, ...]
    """Files (.jsonl, .json, also .gz and .xz; .parquet), folders, or hub ids as ID or ID:CONFIG."""
    split: str = "train"
    """Split of hub data sets and folders; of files too the part, such as train[:90%]."""
    format: Format = "auto"
    """Columns of the rows; auto takes the first format that they hold."""
    columns: tuple[str, ...] = ()
    """NAME=COLUMN: the column that is read under the name which the format has for it."""
    template: str = "auto"
    """Chat template: auto is the tokenizer's own for messages, and none for texts."""
    max_length: int = 1024
    """Tokens of a sequence, prompt and response together, at most."""
    truncation: Truncation = "keep_start"
    """What becomes of longer ones: which end is kept, or drop, error, split."""
    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that count in the loss; auto is what the format's own trainer does."""
    append_eos: bool = True
    """Whether EOS is put behind texts and responses; chat templates end their turns themselves."""
    equal_pairs: Literal["error", "drop"] = "error"
    """What becomes of pairs whose chosen and rejected responses are equal."""
    weight_column: str | None = None
    """Column of pairs that says how much each counts in the loss; without it, all the same."""
    packing: Literal["none", "best-fit"] = "none"
    """Whether several short sequences share a row of max_length tokens."""
    pad_to_multiple_of: int = 64
    """Rows are padded to a multiple of so many tokens, so that few programs are compiled."""
    limit: int | None = None
    """Rows to read, all by default."""
    cache: str | None = None
    """Folder of tokenised data; by default one beside the cache of `datasets`."""

    def __post_init__(self) -> None:
        check_fields(self)


def load(kind: Kind, config: DataConfig, tokenizer: Any) -> Data:
    """Read files and data sets as token ids.

    Rows for sequences have `text`, `messages`, `prompt` and `completion`, or Alpaca's or ShareGPT's
    columns; of a preference row the chosen response is read, of labelled rows only desirable ones.
    Pairs have a chosen and a rejected response (text/examples.py lists the columns). Labelled rows
    have one response that is desirable or not; a preference row gives two of them.

    Args:
        kind: Kind of the examples.
        config: What to read, and how rows become tokens.
        tokenizer: Any transformers tokenizer.

    Raises:
        InputError: For files and rows that cannot be read, missing columns, options that do not
            apply to this kind, pairs with equal responses unless they are dropped, and data of
            which nothing is left.
    """
    data = _tokenised(kind, config, tokenizer)
    if config.packing == "none":
        return data
    packing = best_fit(data.store.lengths, config.max_length)
    identity = hashlib.sha256(f"{data.identity} best-fit".encode()).hexdigest()
    figures = data.figures | {"packed_rows": len(packing)}
    return replace(data, packing=packing, identity=identity, figures=figures)


def _check(kind: Kind, config: DataConfig) -> None:
    """Raise InputError for options that are invalid, or do not apply to rows of this kind."""
    what = {"sequences": "single responses", "labelled": "labelled rows"}.get(kind, "pairs")
    if kind != "sequences":
        if config.loss_on not in ("auto", "completion"):
            raise InputError(
                f"--loss-on {config.loss_on}: {what} count their responses; leave it out"
            )
        if config.packing != "none":
            raise InputError(f"--packing {config.packing}: {what} are not packed; leave it out")
        if config.truncation == "split":
            raise InputError(
                f"--truncation split: {what} cannot be split; use keep_start or another"
            )
    if kind != "pairs" and config.weight_column is not None:
        raise InputError(
            f"--weight-column {config.weight_column}: {what} carry none, only pairs do; leave "
            "it out"
        )
    if not config.data:
        raise InputError("--data: name a file or a data set")
    for name, value, least in (
        ("max-length", config.max_length, 2),
        ("pad-to-multiple-of", config.pad_to_multiple_of, 1),
        ("limit", 1 if config.limit is None else config.limit, 1),
    ):
        if value < least:
            raise InputError(f"--{name} {value}: it takes at least {least}")


def _tokenised(kind: Kind, config: DataConfig, tokenizer: Any) -> Data:
    _check(kind, config)
    tell_left_out(tokenizer, "--model")
    template = load_template(tokenizer, config.template, where="--template")
    sources = [open_source(name, split=config.split) for name in config.data]
    identity = _identity(kind, config, sources, template)
    path = _cache_folder(config) / f"{kind}-{identity[:32]}.arrow"
    store = read_store(path)
    if store is None:
        figures = dict.fromkeys(FIGURES, 0)
        write_store(path, _documents(kind, config, sources, template, figures), figures)
        store = read_store(path)
    if store is None:
        raise InputError(f"{path}: cannot be read back; remove it or name another --cache")
    if not len(store):
        counts = ", ".join(f"{name} {count}" for name, count in store.notes.items() if count)
        raise InputError(
            f"{', '.join(source.name for source in sources)}: no row is left "
            f"({counts or 'all empty'}); within --max-length {config.max_length} a row needs a "
            "token to learn, behind its prompt"
        )
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    places = tuple(f"{source.name} {source.unit}" for source in sources)
    return Data(
        kind, store, places, identity, dict(store.notes), pad_id, config.max_length,
        config.pad_to_multiple_of, weighted=config.weight_column is not None,
    )  # fmt: skip


# Files, folders and data sets of the hub


_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.xz", ".json.xz")
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TAKES = ".jsonl, .json (also .gz and .xz) or .parquet"
_SPLIT = re.compile(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One file or data set.

    Attributes:
        name: As the user wrote it.
        unit: What the number of a row counts: "line" or "row".
        digest: Changes with the content.
        read: Returns all rows in order, as a sequence of mappings; raises InputError.
        first, last: Range of the rows in use, as numbers or in percent.
    """

    name: str
    unit: str
    digest: str
    read: Callable[[], Any]
    first: str = "0"
    last: str = "100%"

    def rows(self) -> tuple[Any, range]:
        """All rows, and the indices of those in use.

        Raises:
            InputError: If there are none.
        """
        rows = self.read()
        first, last = (_index(bound, len(rows)) for bound in (self.first, self.last))
        if first >= last:
            part = f" from {self.first} to {self.last}" if len(rows) else ""
            raise InputError(f"{self.name}: no rows{part}")
        return rows, range(first, last)

    def place(self, number: int) -> str:
        """The place of a row, counted from 1."""
        return f"{self.name} {self.unit} {number}"


def open_source(name: str, *, split: str = "train") -> Source:
    """The file, folder or data set of this name.

    Args:
        name: A path, or the id of a data set on the hub as ID or ID:CONFIG.
        split: Split of a data set or folder. It may select a part of the rows, of files too:
            train[:90%], train[500:].

    Raises:
        InputError: For a name that is none of these, and for a split that does not exist.
    """
    path = Path(name).expanduser()
    asked = _SPLIT.fullmatch(split)
    if asked is None:
        raise InputError(f"--split {split}: it takes a name such as train, or train[:90%]")
    bounds = (asked[2] or "0", asked[3] or "100%")
    read = partial(_load, name, asked[1])
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            if file.name.endswith((*_JSON, *_BUILDERS)):
                check_fetched(file)
        rows = partial(read, **_folder(path, files))
        return Source(name, "row", f"{asked[1]} {_digest(files)}", rows, *bounds)
    if not path.is_file():
        if path.name.endswith((*_JSON, ".parquet")) or not _HUB.fullmatch(name):
            raise InputError(f"{name}: no such file; it takes {_TAKES}, or an id on the hub")
        identity, _, config = name.partition(":")
        found = read(identity, name=config or None)
        return Source(name, "row", f"{asked[1]} {found._fingerprint}", lambda: found, *bounds)
    check_fetched(path)
    digest = _digest([path])
    if path.name.endswith(_JSON):
        unit = "row" if path.name.endswith((".json", ".json.gz", ".json.xz")) else "line"
        return Source(name, unit, digest, lambda: read_rows(path)[0], *bounds)
    if path.suffix != ".parquet":
        raise InputError(f"{name}: not one of the files that can be read: {_TAKES}")
    rows = partial(_load, name, "train", "parquet", data_files=glob.escape(str(path)))
    return Source(name, "row", digest, rows, *bounds)


def _folder(path: Path, files: Sequence[Path]) -> dict[str, str]:
    """Arguments of `datasets` for a folder.

    It reads names as glob patterns; a name with [, * or ? must be escaped, and the file kind given.
    """
    if glob.escape(str(path)) == str(path):
        return {"kind": str(path)}
    endings = (ending for file in files for ending in file.suffixes if ending in _BUILDERS)
    return {"kind": _BUILDERS[next(endings, ".json")], "data_dir": glob.escape(str(path))}


def _index(bound: str, rows: int) -> int:
    """The number of a bound; percents are rounded as in `datasets`."""
    share = bound.endswith("%")
    return min(round(int(bound[:-1]) * rows / 100) if share else int(bound), rows)


def _load(shown: str, split: str, kind: str, **options: Any) -> Any:
    """A split read by `datasets`; error messages name it `shown`."""
    import datasets

    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, split=split, **options)
    except Exception as error:  # its readers raise many types
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).split("\n")[0]
        raise InputError(f"{shown}: cannot be read ({type(cause).__name__}: {reason})") from None
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _digest(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()


# Rows


def _documents(
    kind: Kind,
    config: DataConfig,
    sources: Sequence[Source],
    template: Template,
    figures: dict[str, int],
) -> Iterator[list[Document]]:
    """The documents of all rows, in blocks; counts are added to `figures` on the way."""
    examples = _examples(kind, config, sources, figures)
    told: set[str] = set()
    while block := list(islice(examples, _BLOCK)):
        of, numbers, rows = zip(*block, strict=True)
        places = [sources[number].place(row) for number, row in zip(numbers, rows, strict=True)]
        encoded = encode(template, of, places, config.loss_on, append_eos=config.append_eos)
        found = []
        for (example, source, row), whole, place in zip(block, encoded, places, strict=True):
            for name in sorted(whole.unwritten - told):
                _tell_unread(place, [f'"{name}" of a message, which the template does not write'])
            told |= whole.unwritten
            label = NO_LABEL if example.label is None else int(example.label)
            for one in _shortened(whole, config, place, figures):
                found += [Document(side, source, row, label, example.weight) for side in one.sides]
        figures["tokens"] += sum(len(document.side) for document in found)
        figures["targets"] += sum(int(document.side.targets.sum()) for document in found)
        if found:
            yield found


def _examples(
    kind: Kind, config: DataConfig, sources: Sequence[Source], figures: dict[str, int]
) -> Iterator[tuple[Example, int, int]]:
    """Examples with the numbers of their source and row."""
    pairs = [(name, old) for name, _, old in (one.partition("=") for one in config.columns)]
    for number, source in enumerate(sources):
        rows, wanted = source.rows()
        _check_columns(config.columns, rows[wanted[0]], source.name)
        first = _named(rows[wanted[0]], pairs)
        columns = [column for column, value in first.items() if value is not None]
        parse = parser(kind, config.format, columns, source.name)
        told = {f'"{config.weight_column}"'}
        for index in wanted:
            if figures["rows"] == config.limit:
                return
            figures["rows"] += 1
            row, place = _named(rows[index], pairs), source.place(index + 1)
            if unread := (parse.unread(row) | _replaced(rows[index], pairs)) - told:
                _tell_unread(place, sorted(unread))
                told |= unread
            examples = parse(row, place)
            figures["undesirable"] += not examples
            for example in examples:
                if kind == "pairs" and example.responses[0] == example.responses[1]:
                    if config.equal_pairs == "error":
                        raise InputError(
                            f"{place}: chosen and rejected are equal; remove the row, or leave "
                            "such rows out with --equal-pairs drop"
                        )
                    figures["equal"] += 1
                    continue
                if config.weight_column is not None:
                    weight = _weight(row, config.weight_column, place)
                    example = replace(example, weight=weight)
                yield example, number, index + 1


def _tell_unread(place: str, names: Sequence[str]) -> None:
    _logger.warning("%s: no part of the training: %s", place, ", ".join(names))


def _check_columns(columns: Sequence[str], first: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a malformed NAME=COLUMN, or a column that the first row lacks."""
    for column in columns:
        name, _, old = column.partition("=")
        if not name or not old:
            raise InputError(f"--columns {column}: it takes NAME=COLUMN, such as prompt=question")
        if old not in first:
            found = ", ".join(f'"{one}"' for one in first)
            raise InputError(f'--columns {column}: {where} has no "{old}"; found {found}')


def _named(row: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    """A row with columns renamed to the format's names, by pairs of (name, column)."""
    if not pairs:
        return row
    taken = {old for _, old in pairs}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {name: row.get(old) for name, old in pairs}


def _replaced(row: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> set[str]:
    """Columns of a row that `pairs` replace by others, as told in a message."""
    used = {old for _, old in pairs}
    return {
        f'"{name}", for which --columns takes "{old}"'
        for name, old in pairs
        if name not in used and row.get(name) is not None
    }


def _weight(row: Mapping[str, Any], column: str, place: str) -> float:
    value: Any = row.get(column)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Weights are kept in float32, which underflows or overflows beyond these bounds.
    if not number or not 1e-30 < value < 1e30:
        raise InputError(
            f'{place}: "{column}" is {value!r}; as --weight-column it takes a number above 0'
        )
    return float(value)


def _shortened(
    whole: Encoded, config: DataConfig, place: str, figures: dict[str, int]
) -> list[Encoded]:
    longest = max(map(len, whole.sides))
    if longest > config.max_length and config.truncation == "error":
        raise InputError(
            f"{place}: {longest} tokens, and --max-length is {config.max_length}; raise it, or "
            "choose another --truncation"
        )
    kept = shorten(whole, config.max_length, config.truncation)
    figures["kept"] += len(kept)
    figures["dropped"] += not kept
    figures["truncated"] += bool(kept) and longest > config.max_length
    figures["merged_borders"] += bool(kept) and whole.merged
    return kept


# The cache


def _identity(
    kind: Kind, config: DataConfig, sources: Sequence[Source], template: Template
) -> str:  # fmt: skip
    """A digest of everything that determines tokens and targets, except names and versions."""
    parts = [
        _VERSION,
        kind,
        [(source.digest, source.first, source.last) for source in sources],
        [config.format, config.columns, config.max_length, config.truncation, config.loss_on],
        [config.equal_pairs, config.append_eos, config.limit, config.weight_column],
        [template.describe(), template.eos_id, _tokenizer_digest(template.tokenizer)],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    """A digest of the tokenizer's rules, without padding and truncation, which calls may set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, special, tokenizer.pad_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_folder(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache).expanduser()
    from datasets import config as settings

    return Path(settings.HF_DATASETS_CACHE) / "w2s_jax"
