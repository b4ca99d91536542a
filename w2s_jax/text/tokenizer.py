"""Tokenizers: loaded from checkpoints as their files define them, trained BPE, and made-up ones.

transformers is imported on the first load, not with this module. A SentencePiece model
(tokenizer.model) without a tokenizer.json becomes a fast tokenizer with exactly its ids:
transformers 5.23 converts such files too, but ranks merges by token id instead of by score and
drops the dummy prefix, so that "a  b" gets other ids.
"""

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from w2s_jax.errors import InputError, check_fetched, check_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)
_SPACE = "▁"
_BPE = 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type


def read_spm(path: Path, options: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Read a SentencePiece BPE model.

    Args:
        path: The file.
        options: Those of tokenizer_config.json: add_bos_token (default true, as in Llama) and
            add_eos_token (default false).

    Returns:
        The tokenizer, and its special tokens by role ("bos_token", ...).

    Raises:
        InputError: For a file that is not a SentencePiece BPE model.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    with contextlib.suppress(DecodeError):  # a file that is not read fails the next test
        model.ParseFromString(path.read_bytes())
    trainer, pieces = model.trainer_spec, model.pieces
    if trainer.model_type != _BPE or not pieces:
        raise InputError(f"{path} is not a SentencePiece BPE model; convert it to tokenizer.json")
    scores = {piece.piece: piece.score for piece in pieces}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_merges(scores),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    # Spaces become ▁ and back. A dummy prefix is a further ▁ in front, which decoding strips.
    dummy = model.normalizer_spec.add_dummy_prefix
    prepend = [normalizers.Prepend(_SPACE)] if dummy else []
    strip = [decoders.Strip(" ", 1, 0)] if dummy else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    added = [piece for piece in pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(a.piece, normalized=False, special=a.type == _CONTROL) for a in added]
    )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    roles = {f"{role}_token": pieces[index].piece for role, index in ids.items() if index >= 0}
    _set_template(tokenizer, roles, options)
    return tokenizer, roles


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to join two pieces into a third one, by descending score of the third."""
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]


def _set_template(
    tokenizer: Tokenizer, roles: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    asked = {"bos": options.get("add_bos_token", True), "eos": options.get("add_eos_token", False)}
    first, last = (
        [roles[f"{role}_token"]] if asked[role] and f"{role}_token" in roles else []
        for role in ("bos", "eos")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *last],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)
END_ID, PAD_ID = 0, 1
BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Train a byte-level BPE in which END_OF_TEXT has id END_ID, and PADDING has id PAD_ID.

    Every string can be encoded, and decodes to itself. Encoding with special tokens adds
    END_OF_TEXT in front, so that the same ids open a document for a language model and give a
    classifier its first token.

    Raises:
        InputError: If `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size {vocab_size} is too small: byte-level BPE needs at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def save_bpe(tokenizer: Tokenizer, directory: str | Path, *, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for transformers' AutoTokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# With more added tokens than this a vocabulary counts as another one, not as an extended one.
_ADDED_TOKENS = 256
_PATTERNS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json",
    "merges.txt", "adapter_config.json",
]  # fmt: skip


def load_tokenizer(path_or_hub_id: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint's folder, or of a Hugging Face id through the local cache.

    Reads tokenizer.json, else vocab.json with merges.txt, else a SentencePiece tokenizer.model. An
    adapter without one has the tokenizer of the base it names. Runs no code from the checkpoint.

    Raises:
        InputError: If there is no such folder, no tokenizer in it, or the files are damaged.
    """
    directory = _locate(path_or_hub_id)
    if not holds_tokenizer(directory) and (directory / "adapter_config.json").is_file():
        return load_tokenizer(_base(directory))
    for path in directory.glob("chat_template*"):  # read without a check of their own
        check_fetched(path)
    try:
        load = _loader(directory)
        config = directory / "tokenizer_config.json"
        options = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if load is None:
            raise InputError(
                f"{directory}: no tokenizer; it takes tokenizer.json, vocab.json with merges.txt, "
                "or tokenizer.model"
            )
        tokenizer = load(directory, options)
    except Exception as error:  # the parsers of tokenizers raise bare Exception
        for path in sorted(file for pattern in _PATTERNS for file in directory.glob(pattern)):
            check_fetched(path)
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{directory}: the tokenizer cannot be read ({reason})") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{directory}: the tokenizer's vocabulary is empty")
    return tokenizer


def holds_tokenizer(path: str | Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return _loader(Path(path).expanduser()) is not None


def same_vocabulary(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether all tokens have the same ids in both, except for a few added at the end of one.

    Sizes say nothing: models pad their embeddings, different tokenizers may have equal sizes, and a
    fine-tuned model often has an additional token or two, such as padding.
    """
    smaller, larger = sorted((one.get_vocab(), other.get_vocab()), key=len)
    return smaller.items() <= larger.items() and len(larger) - len(smaller) <= _ADDED_TOKENS


def _locate(path_or_hub_id: str | Path) -> Path:
    check_kind("a tokenizer's place", path_or_hub_id, str | Path, "a folder or a hub id")
    path, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the directory that holds the tokenizer")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name}: no such directory, and as a Hugging Face id it is neither cached nor "
            f"reachable ({type(error).__name__}: {reason})"
        ) from None


def _base(directory: Path) -> str:
    """The base that an adapter names; a folder may be relative to the adapter's."""
    check_fetched(directory / "adapter_config.json")
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        name = str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory}: no tokenizer, and no base named that has one") from None
    return str(directory / name) if (directory / name).is_dir() else name


def _loader(directory: Path) -> Callable[..., "PreTrainedTokenizerBase"] | None:
    """What loads a folder's tokenizer: the first set of files that is complete; None if none is."""
    known = (
        (("tokenizer.json",), _load_json),
        (("vocab.json", "merges.txt"), _load_bpe),
        (("tokenizer.model",), _load_spm),
    )
    found = (load for names, load in known if all((directory / n).is_file() for n in names))
    return next(found, None)


def _load_json(directory: Path, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
    # Not AutoTokenizer: for Llama it replaces the normaliser of tokenizer.json, and " leading"
    # encodes as "leading". This class follows the file, whatever class the config names.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))


def _load_bpe(directory: Path, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """Uses AutoTokenizer only if a class has to be looked up: it imports torch if there is one."""
    if options.get("tokenizer_class", "GPT2Tokenizer") in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        from transformers import GPT2Tokenizer

        return GPT2Tokenizer.from_pretrained(str(directory))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def _load_spm(directory: Path, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    backend, special = read_spm(directory / "tokenizer.model", options)
    added = directory / "added_tokens.json"
    if added.is_file():
        ids = json.loads(added.read_text(encoding="utf-8"))
        # Not normalised: they are found inside words too, not only after a space.
        backend.add_tokens([AddedToken(one, normalized=False) for one in sorted(ids, key=ids.get)])
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = options.get(role)
        if token is not None:
            special[role] = token["content"] if isinstance(token, dict) else token
    kept = {key: options[key] for key in ("chat_template", "model_max_length") if key in options}
    template = directory / "chat_template.jinja"
    if template.is_file():  # takes precedence over the config's, as in transformers
        kept["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **kept)


def tokens_behind(tokenizer: Any) -> int:
    """Number of special tokens that the tokenizer adds at the end of a text; 1 for an EOS."""
    whole, text = _probed(tokenizer)
    starts = range(len(whole) - len(text) + 1 if text else 0)
    found = (start for start in starts if whole[start : start + len(text)] == text)
    return next((len(whole) - start - len(text) for start in found), 0)


def tell_left_out(tokenizer: Any, where: str) -> None:
    """Warn of special tokens that the tokenizer adds at the end of texts and prompts leave out.

    `where` begins the message.
    """
    behind = tokens_behind(tokenizer)
    if behind:
        whole, _ = _probed(tokenizer)
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(whole[-behind:])))
        _logger.warning(
            "%s: the tokenizer puts %s behind every text; prompts are read without", where, names
        )


def _probed(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a probing text, with and without the tokenizer's special tokens.

    The text is a letter or, as none is in every vocabulary, the text of the first token that
    encodes to tokens other than special ones. Both lists are empty if the tokenizer adds no special
    tokens.
    """
    added = {*tokenizer([""], add_special_tokens=True).input_ids[0]}
    if not added:
        return [], []
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    own = (tokenizer.decode([token], **plain) for token in range(len(tokenizer)))
    for text in chain("a", own):
        try:
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        except Exception:  # tokenizers raise it for text that they cannot encode
            continue
        if ids and not added.intersection(ids):
            return list(tokenizer(text, add_special_tokens=True).input_ids), ids
    return [], []


# Made up


_END, _UNKNOWN = "[end]", "[unknown]"
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxz"
_SPLIT = 4  # one word in four is two tokens of the guide


def vocabularies(size: int) -> "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]":
    """Two made-up vocabularies of one language, to measure guides with a vocabulary of their own.

    A word is a prefix and a suffix. The policy has a token for each word. The guide has other ids
    and writes every fourth word as two tokens, so that its texts are a quarter longer.

    Args:
        size: Maximum tokens of each.

    Returns:
        The tokenizers of the policy and of the guide.
    """
    from transformers import PreTrainedTokenizerFast

    rows = math.isqrt(size - 1) + 1
    starts, ends = _syllables(rows, "{c}{v}"), _syllables(rows, "{c}{v}x")
    words = [start + end for start in starts for end in ends][: size - 2]
    policy = {word: index for index, word in enumerate([_END, _UNKNOWN, *words])}
    whole = [word for index, word in enumerate(words) if index % _SPLIT]
    pieces = [_UNKNOWN, _END, *starts, *(f"##{end}" for end in ends), *reversed(whole)]
    guide = {piece: index for index, piece in enumerate(pieces[:size])}

    def of(model: models.Model) -> "PreTrainedTokenizerBase":
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END, unk_token=_UNKNOWN)

    return (
        of(models.WordLevel(policy, unk_token=_UNKNOWN)),
        of(models.WordPiece(guide, unk_token=_UNKNOWN)),
    )


def _syllables(count: int, form: str) -> list[str]:
    """`count` distinct syllables, all of the same length."""
    short = [form.format(c=c, v=v) for c in _CONSONANTS for v in _VOWELS]
    if count <= len(short):
        return short[:count]
    return [one[:2] + other for one in short for other in short][:count]


# Padding to few shapes


def power_of_two(count: int, least: int) -> int:
    """The smallest power of two that is at least `count` and `least`, itself a power of two.

    Padding to such sizes gives few shapes, and so few programs.
    """
    return max(least, 1 << (max(count, 1) - 1).bit_length())


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], width: int, pad_id: int
) -> tuple[Int32[np.ndarray, "B X"], Bool[np.ndarray, "B X"]]:
    """Right-pad rows to `width`, cutting longer ones; the mask is True on real tokens."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        row = row[:width]
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return tokens, mask


SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The prefix capacity for a prompt of `length` tokens: a power of two, at least 16.

    It holds all tokens of the prompt but the last.
    """
    return power_of_two(length - 1, SMALLEST_BUCKET)


def buckets(lengths: Sequence[int], *, slots: int = 1) -> dict[int, list[int]]:
    """Indices of the prompts by their prefix capacity, each of which takes a compiled program.

    Prompts that are too few to fill the slots join those of the next capacity.
    """
    capacities = [bucket(length) for length in lengths]
    joined: dict[int, list[int]] = {}
    few: list[int] = []
    for capacity in sorted({*capacities}):
        few = sorted([*few, *(i for i, one in enumerate(capacities) if one == capacity)])
        if len(few) >= slots or capacity == max(capacities):
            joined[capacity], few = few, []
    return joined
