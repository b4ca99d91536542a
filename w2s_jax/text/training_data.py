"""Files of training rows: read, tokenised once, cached, packed.

What a row means is in text/examples.py, its tokens in text/supervised.py, and the batches that are
made of them in text/batches.py. Token ids and targets of all documents lie in one memory-mapped
Arrow file, written once, in the stream format that `datasets.Dataset.from_file` opens.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from w2s_jax.errors import InputError, check_fields
from w2s_jax.text.batches import Data, Kind, Side, TokenStore, best_fit
from w2s_jax.text.chat import Template, load_template
from w2s_jax.text.examples import Example, Format, parser
from w2s_jax.text.prompts import tell_left_out
from w2s_jax.text.rows import Source, open_source, sync_folder
from w2s_jax.text.supervised import Encoded, Truncation, encode, shorten

_logger = logging.getLogger(__name__)
_VERSION = 4  # of what is cached: raise it when the same rows would give other tokens
_BLOCK = 1000
NO_LABEL = -1
_FIGURES = (
    "rows", "kept", "dropped", "undesirable", "truncated", "equal", "merged_borders", "tokens",
    "targets",
)  # fmt: skip


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
    """The rows of files and data sets, as token ids.

    Sequences, to imitate, are of rows with `text`, `messages`, `prompt` and `completion`, Alpaca's
    or ShareGPT's columns; of a preference row the chosen response is read, of labelled rows those
    that are wanted. Pairs have a chosen and a rejected response (text/examples.py has their
    columns). Labelled rows have one response that is wanted or not; a preference row gives two.

    Args:
        kind: what is made of the rows.
        config: what to read, and how rows become tokens.
        tokenizer: any transformers tokenizer.

    Raises:
        InputError: for files and rows that cannot be read, columns that are missing, options that
            are not for this kind, pairs whose responses are equal unless these are dropped, and
            data of which nothing is left.
    """
    data = _load(kind, config, tokenizer)
    if config.packing == "none":
        return data
    packing = best_fit(data.store.lengths, config.max_length)
    identity = hashlib.sha256(f"{data.identity} best-fit".encode()).hexdigest()
    figures = data.figures | {"packed_rows": len(packing)}
    return replace(data, packing=packing, identity=identity, figures=figures)


def _check(kind: Kind, config: DataConfig) -> None:
    """Raise InputError for options that cannot be, or not for rows of this kind."""
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


def _load(kind: Kind, config: DataConfig, tokenizer: Any) -> Data:
    _check(kind, config)
    tell_left_out(tokenizer, "--model")
    template = load_template(tokenizer, config.template, where="--template")
    sources = [open_source(name, split=config.split) for name in config.data]
    identity = _identity(kind, config, sources, template)
    path = _cache_folder(config) / f"{kind}-{identity[:32]}.arrow"
    store = read_store(path)
    if store is None:
        figures = dict.fromkeys(_FIGURES, 0)
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
    return Data(
        kind, store, tuple(source.unit for source in sources), identity, dict(store.notes),
        pad_id, config.max_length, config.pad_to_multiple_of,
        weighted=config.weight_column is not None,
    )  # fmt: skip


# Rows


@dataclass(frozen=True)
class Document:
    """One side of an example: from row `row` of source `source`; `label` is −1, 0 or 1.

    `weight` says how much the example counts beside others.
    """

    side: Side
    source: int
    row: int
    label: int = NO_LABEL
    weight: float = 1.0


def _documents(
    kind: Kind,
    config: DataConfig,
    sources: Sequence[Source],
    template: Template,
    figures: dict[str, int],
) -> Iterator[list[Document]]:
    """Blocks of documents of all rows; counts in `figures` as they go."""
    examples = _examples(kind, config, sources, figures)
    told: set[str] = set()
    while block := list(islice(examples, _BLOCK)):
        places = [sources[source].place(row) for _, source, row in block]
        encoded = encode(
            template,
            [one for one, _, _ in block],
            places,
            config.loss_on,
            append_eos=config.append_eos,
        )
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
    """Raise InputError for a NAME=COLUMN that is none, or whose column the first row lacks."""
    for column in columns:
        name, _, old = column.partition("=")
        if not name or not old:
            raise InputError(f"--columns {column}: it takes NAME=COLUMN, such as prompt=question")
        if old not in first:
            found = ", ".join(f'"{one}"' for one in first)
            raise InputError(f'--columns {column}: {where} has no "{old}"; found {found}')


def _named(row: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    """A row whose columns have the names of the format: pairs of name and column."""
    if not pairs:
        return row
    taken = {old for _, old in pairs}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {name: row.get(old) for name, old in pairs}


def _replaced(row: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> set[str]:
    """The columns of a row in whose place `pairs` put others, as they are told."""
    used = {old for _, old in pairs}
    return {
        f'"{name}", for which --columns takes "{old}"'
        for name, old in pairs
        if name not in used and row.get(name) is not None
    }


def _weight(row: Mapping[str, Any], column: str, place: str) -> float:
    value: Any = row.get(column)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # In float32, which holds it, a weight is neither lost nor without end.
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
    """A digest of all that decides on tokens and targets: never of names or of the library."""
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
    """Of the tokenizer's own rules; padding and truncation, which calls set, are left out."""
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


def write_store(
    path: Path, blocks: Iterable[list[Document]], notes: Mapping[str, Any]
) -> None:  # fmt: skip
    """Write blocks of documents; the file appears whole, with `notes` as they are at the end.

    Raises:
        InputError: where it cannot be written; whatever `blocks` raises leaves no file.
    """
    import pyarrow as pa

    lists = {"tokens": pa.list_(pa.int32()), "targets": pa.list_(pa.int8())}
    numbers = dict.fromkeys(("prompt", "source", "row", "label"), pa.int64())
    schema = pa.schema(lists | numbers | {"weight": pa.float32()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _appearing(path) as file, pa.ipc.new_stream(file, schema) as writer:
            for block in blocks:
                columns = {
                    "tokens": [document.side.tokens for document in block],
                    "targets": [document.side.targets.astype(np.int8) for document in block],
                    "prompt": [document.side.prompt for document in block],
                }
                for name in ("source", "row", "label", "weight"):
                    columns[name] = [getattr(document, name) for document in block]
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            with _appearing(_notes_of(path)) as told:
                told.write(json.dumps(notes).encode())
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that is there when all is written; several processes may write the same one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def read_store(path: Path) -> TokenStore | None:
    """The documents of a file; None where it is not there or damaged.

    A stream that was cut between two blocks reads as a shorter one: the notes beside it tell how
    many tokens there are.
    """
    import pyarrow as pa

    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        notes = json.loads(_notes_of(path).read_text())
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        tokens, targets = (
            [(part.values.to_numpy(), part.offsets.to_numpy()) for part in table[name].chunks]
            for name in ("tokens", "targets")
        )
        numbers = ("prompt", "source", "row", "label", "weight")
        columns: Any = [*(table[name].to_numpy() for name in numbers), notes]
        store = TokenStore(tokens, targets, *columns)
        whole = isinstance(notes, dict) and notes.keys() >= {*_FIGURES}
        return store if whole and notes["tokens"] == int(store.lengths.sum()) else None
    return None


def _notes_of(path: Path) -> Path:
    return path.with_suffix(".json")
