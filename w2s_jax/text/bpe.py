"""Training a byte-level BPE vocabulary and writing it as a directory that transformers loads.

Holds no model code and no corpus of its own; loading a tokenizer is in text/tokenizer.py.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from w2s_jax.errors import InputError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)
END_ID, PAD_ID = 0, 1
BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Learn a byte-level BPE in which END_OF_TEXT has id END_ID and PADDING id PAD_ID.

    Every string can be encoded and decodes to itself. Encoding with special tokens puts
    END_OF_TEXT in front, so the same ids open a document for a language model and give a
    classifier its first token. Raises InputError when `vocab_size` leaves no room for the 256
    bytes and the special tokens.
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
    """Write `tokenizer.json` and `tokenizer_config.json`, as transformers' AutoTokenizer reads."""
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
