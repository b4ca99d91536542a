"""Tokenizers of checkpoints, loaded so that they do what their own files say.

Returns transformers' tokenizers. transformers is imported on the first load, not with this module.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.typed import check_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More tokens than this on one side make another vocabulary, not an extended one.
_ADDED_TOKENS = 256
_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
]
_KINDS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})


def load_tokenizer(path_or_hub_id: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory, or of a Hugging Face id through its local cache.

    Reads tokenizer.json, else vocab.json with merges.txt, else a SentencePiece tokenizer.model.
    An adapter without one has that of the base it names. Runs no code from the checkpoint.

    Raises InputError when there is no directory, no tokenizer in it, or the files are damaged.
    """
    directory = _locate(path_or_hub_id)
    if not holds_tokenizer(directory) and (directory / "adapter_config.json").is_file():
        return load_tokenizer(_base(directory))
    for path in directory.glob("chat_template*"):  # which are read as they are
        check_fetched(path)
    try:
        tokenizer = _load(directory)
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
    return any(all((Path(path).expanduser() / name).is_file() for name in kind) for kind in _KINDS)


def same_vocabulary(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether every token that both could write has one id, and one map holds the other.

    Sizes do not tell: models pad their embeddings, different tokenizers may have one size, and a
    fine-tuned model often gained a token or two (a padding token, say) behind its origin's.
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


def _load(directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    holds = {path.name for path in directory.iterdir()}
    options = {}
    if "tokenizer_config.json" in holds:
        options = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "tokenizer.json" in holds:
        # Not AutoTokenizer: for Llama it replaces the normaliser of tokenizer.json, and " leading"
        # encodes as "leading". This class keeps to the file, whatever class the config names.
        return PreTrainedTokenizerFast.from_pretrained(str(directory))
    if {"vocab.json", "merges.txt"} <= holds:
        return _load_bpe(directory, options)
    if "tokenizer.model" in holds:
        return _load_spm(directory, options)
    raise InputError(
        f"{directory}: no tokenizer; it takes tokenizer.json, vocab.json with merges.txt, or "
        "tokenizer.model"
    )


def _load_bpe(directory: Path, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """By AutoTokenizer only where a class is to be found: it imports torch where there is one."""
    if options.get("tokenizer_class", "GPT2Tokenizer") in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        from transformers import GPT2Tokenizer

        return GPT2Tokenizer.from_pretrained(str(directory))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def _load_spm(directory: Path, options: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    from w2s_jax.text.spm import read_spm

    backend, special = read_spm(directory / "tokenizer.model", options)
    added = directory / "added_tokens.json"
    if added.is_file():
        ids = json.loads(added.read_text(encoding="utf-8"))
        # Not normalised: they are found inside words too, not only behind a space.
        added_tokens = [AddedToken(token, normalized=False) for token in sorted(ids, key=ids.get)]
        backend.add_tokens(added_tokens)
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = options.get(role)
        if token is not None:
            special[role] = token["content"] if isinstance(token, dict) else token
    kept = {key: options[key] for key in ("chat_template", "model_max_length") if key in options}
    template = directory / "chat_template.jinja"
    if template.is_file():  # which goes before the config's, as in transformers
        kept["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **kept)
