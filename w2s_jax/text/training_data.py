"""Files of training rows: read, tokenised once, cached, packed.

What a row means is in text/examples.py, its tokens in text/supervised.py, and the batches that are
made of them in text/token_rows.py.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from w2s_jax.errors import InputError, check_fields
from w2s_jax.text.batches import best_fit
from w2s_jax.text.chat import Template, load_template
from w2s_jax.text.examples import Example, Format, Kind, parser
from w2s_jax.text.prompts import tell_left_out
from w2s_jax.text.rows import Source, open_source
from w2s_jax.text.supervised import Encoded, Truncation, encode, shorten
from w2s_jax.text.token_rows import NO_LABEL, Data, Document, TokenStore, read_store, write_store

_logger = logging.getLogger(__name__)
_VERSION = 4  # of what is cached: raise it when the same rows would give other tokens
_BLOCK = 1000
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
    shuffle: bool = True
    """Whether every epoch has an order of its own."""
    seed: int = 0
    """Seed of that order."""
    limit: int | None = None
    """Rows to read, all by default."""
    cache: str | None = None
    """Folder of tokenised data; by default one beside the cache of `datasets`."""

    def __post_init__(self) -> None:
        check_fields(self)


def load_sequences(config: DataConfig, tokenizer: Any) -> Data:
    """Rows to imitate: `text`, `messages`, `prompt` and `completion`, Alpaca's, ShareGPT's; of a
    preference row its chosen response, of labelled rows those that are wanted.

    Raises InputError for files and rows that cannot be read, columns that are missing, and data of
    which nothing is left.
    """  # noqa: D205
    _unweighted(config, "single responses")
    data = _load("sequences", config, tokenizer)
    if config.packing == "none":
        return data
    packing = best_fit(data.store.lengths, config.max_length)
    identity = hashlib.sha256(f"{data.identity} best-fit".encode()).hexdigest()
    figures = data.figures | {"packed_rows": len(packing)}
    return Data(**(vars(data) | {"packing": packing, "identity": identity, "figures": figures}))


def load_pairs(config: DataConfig, tokenizer: Any) -> Data:
    """Rows with a chosen and a rejected response; see text/examples.py for their columns.

    Raises InputError as `load_sequences` does, for pairs whose responses are equal unless these are
    dropped, and for options that are not for pairs.
    """
    _only_responses(config, "pairs")
    return _load("pairs", config, tokenizer)


def load_labelled(config: DataConfig, tokenizer: Any) -> Data:
    """Rows with one response that is wanted or not; a preference row gives two of them.

    Raises InputError as `load_pairs` does.
    """
    _only_responses(config, "labelled rows")
    _unweighted(config, "labelled rows")
    return _load("labelled", config, tokenizer)


def check_positions(config: DataConfig, positions: int) -> None:
    """Raise InputError where sequences may be longer than the model has positions."""
    if config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length}: the model has {positions} positions; take at most "
            "so many"
        )


def _only_responses(config: DataConfig, what: str) -> None:
    if config.loss_on not in ("auto", "completion"):
        raise InputError(f"--loss-on {config.loss_on}: {what} count their responses; leave it out")
    if config.packing != "none":
        raise InputError(f"--packing {config.packing}: {what} are not packed; leave it out")
    if config.truncation == "split":
        raise InputError(f"--truncation split: {what} cannot be split; use keep_start or another")


def _unweighted(config: DataConfig, what: str) -> None:
    if config.weight_column is not None:
        raise InputError(
            f"--weight-column {config.weight_column}: {what} carry none, only pairs do; leave "
            "it out"
        )


def _load(kind: Kind, config: DataConfig, tokenizer: Any) -> Data:
    _check(config)
    tell_left_out(tokenizer, "--model")
    template = load_template(tokenizer, config.template, where="--template")
    sources = [open_source(name, split=config.split) for name in config.data]
    identity = _identity(kind, config, sources, template)
    path = _cache_folder(config) / f"{kind}-{identity[:32]}.arrow"
    store = _read_whole(path)
    if store is None:
        figures: dict[str, int] = {}
        write_store(path, _documents(kind, config, sources, template, figures), figures)
        store = _read_whole(path)
    if store is None:
        raise InputError(f"{path}: cannot be read back; remove it or name another --cache")
    if not len(store):
        raise InputError(
            f"{_all(sources)}: no row is left ({_told(store.notes)}); within --max-length "
            f"{config.max_length} a row needs a token to learn, behind its prompt"
        )
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Data(
        kind, store, tuple(source.unit for source in sources), identity, dict(store.notes),
        pad_id, config.max_length, config.pad_to_multiple_of,
        weighted=config.weight_column is not None,
    )  # fmt: skip


def _read_whole(path: Path) -> TokenStore | None:
    """What `read_store` reads, where its counts are there and are those of its documents.

    A stream that was cut between two blocks reads as a shorter one.
    """
    store = read_store(path)
    if store is None or not isinstance(store.notes, dict) or not store.notes.keys() >= {*_FIGURES}:
        return None
    return store if store.notes["tokens"] == int(store.lengths.sum()) else None


def _check(config: DataConfig) -> None:
    if not config.data:
        raise InputError("--data: name a file or a data set")
    for name, value, least in (
        ("max-length", config.max_length, 2),
        ("pad-to-multiple-of", config.pad_to_multiple_of, 1),
        ("limit", 1 if config.limit is None else config.limit, 1),
    ):
        if value < least:
            raise InputError(f"--{name} {value}: it takes at least {least}")


def _documents(
    kind: Kind,
    config: DataConfig,
    sources: Sequence[Source],
    template: Template,
    figures: dict[str, int],
) -> Iterator[list[Document]]:
    """Blocks of documents of all rows; counts in `figures` as they go."""
    figures.update(dict.fromkeys(_FIGURES, 0))
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
    for number, source in enumerate(sources):
        rows, wanted = source.rows()
        named = _renaming(config.columns, rows[wanted[0]], source.name)
        replaced = _replaced(config.columns)
        first = named(rows[wanted[0]])
        columns = [column for column, value in first.items() if value is not None]
        parse = parser(kind, config.format, columns, source.name)
        told = {f'"{config.weight_column}"'}
        for index in wanted:
            if figures["rows"] == config.limit:
                return
            figures["rows"] += 1
            row, place = named(rows[index]), source.place(index + 1)
            if unread := (parse.unread(row) | replaced(rows[index])) - told:
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


def _replaced(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], set[str]]:
    """What gives the columns of a row in whose place `columns` (NAME=COLUMN) puts others."""
    pairs = dict(column.partition("=")[::2] for column in columns)
    own = {name: old for name, old in pairs.items() if name not in pairs.values()}

    def replaced(row: Mapping[str, Any]) -> set[str]:
        held = [name for name in own if row.get(name) is not None]
        return {f'"{name}", for which --columns takes "{own[name]}"' for name in held}

    return replaced


def _renaming(
    columns: Sequence[str], first: Mapping[str, Any], where: str
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What gives rows the names of `columns` (NAME=COLUMN); InputError if the first lacks one."""
    pairs = [column.partition("=")[::2] for column in columns]
    for column, (name, old) in zip(columns, pairs, strict=True):
        if not name or not old:
            raise InputError(f"--columns {column}: it takes NAME=COLUMN, such as prompt=question")
        if old not in first:
            found = ", ".join(f'"{one}"' for one in first)
            raise InputError(f'--columns {column}: {where} has no "{old}"; found {found}')
    if not pairs:
        return lambda row: row
    taken = {old for _, old in pairs}

    def renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
        rest = {name: value for name, value in row.items() if name not in taken}
        return rest | {name: row.get(old) for name, old in pairs}

    return renamed


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


def _all(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources)


def _told(figures: dict[str, int]) -> str:
    """The counts that are not zero, in a line."""
    return ", ".join(f"{name} {count}" for name, count in figures.items() if count) or "all empty"
