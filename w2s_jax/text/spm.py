"""SentencePiece BPE models (tokenizer.model) as fast tokenizers, exact in their ids.

Only for directories without a tokenizer.json. transformers 5.23 converts such files too, but ranks
merges by token id instead of by score and drops the dummy prefix, so "a  b" gets other ids.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from w2s_jax.errors import InputError

_SPACE = "▁"
_BPE = 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type


def read_spm(path: Path, options: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a SentencePiece file, and its special tokens by role ("bos_token", ...).

    `options` are those of tokenizer_config.json: add_bos_token (default true, as in Llama) and
    add_eos_token (default false). Raises InputError for a file that is no SentencePiece BPE model.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    with contextlib.suppress(DecodeError):  # what is left unread fails the next test
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
    _set_spaces(tokenizer, model.normalizer_spec.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    roles = {f"{role}_token": pieces[index].piece for role, index in ids.items() if index >= 0}
    _set_template(tokenizer, roles, options)
    return tokenizer, roles


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the third's score descending."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((score, piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _set_spaces(tokenizer: Tokenizer, dummy_prefix: bool) -> None:
    """Spaces become ▁ and back; a dummy prefix is one more ▁ in front, stripped in decoding."""
    prepend = [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _set_template(
    tokenizer: Tokenizer, roles: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    first = (
        [roles["bos_token"]] if options.get("add_bos_token", True) and "bos_token" in roles else []
    )
    last = (
        [roles["eos_token"]] if options.get("add_eos_token", False) and "eos_token" in roles else []
    )
    used = [(token, tokenizer.token_to_id(token)) for token in {*first, *last}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *last],
        special_tokens=used,
    )
