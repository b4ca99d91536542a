"""GGUF files, llama.cpp's format, written anew as checkpoints that `load_model` reads.

The package `gguf` reads and dequantises them, one tensor at a time, and transformers makes the
tokenizer. What llama.cpp changes of a checkpoint is undone: its names, the order of Llama's rotary
entries, and Gemma's norms, which it stores with their offset.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.config_json import config_from_hf, config_to_hf
from w2s_jax.models.parameters import decoder_parameters
from w2s_jax.models.save import SHARD_BYTES, write_checkpoint
from w2s_jax.ops.attention import Rope, inverse_frequencies

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
TYPES = (*_PLAIN, *_QUANTISED)
"""The types of tensors that are read."""

_MODEL_TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2")}
# By what llama.cpp calls a field, behind the architecture's name.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_LLAMA3_FACTORS = "rope_freqs.weight"
_LARGEST_OF_GEMMA2 = 46


@dataclass(frozen=True)
class GGUF:
    """An open file.

    Attributes:
        path: Where it is.
        fields: Its metadata, by their names.
        tensors: What its package has of each tensor, by its name in the file.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture."""
        return str(self.fields.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the architecture's own."""
        return self.fields.get(f"{self.architecture}.{name}", default)


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).endswith(".gguf")


def open_gguf(path: str | Path) -> GGUF:
    """Open a file and read its metadata, no tensors.

    Raises:
        InputError: If it is missing, cut off or no GGUF file, or holds tensors of unknown types.
    """
    place = Path(path).expanduser()
    try:
        from gguf import GGUFReader
        from transformers.integrations import gguf  # noqa: F401
    except ImportError:
        raise InputError(f"{place}: GGUF files need gguf; pip install 'w2s-jax[gguf]'") from None

    if not place.is_file():
        raise InputError(f"{place}: no such file")
    try:
        reader = GGUFReader(place)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise InputError(f"{place} is no GGUF file, or is cut off ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in TYPES:
            raise InputError(
                f"{place}: tensor {name} is of type {tensor.tensor_type.name}, which is not "
                f"supported; supported: {', '.join(TYPES)}"
            )
    return GGUF(place, fields, tensors)


def read_config(file: GGUF) -> ModelConfig:
    """The config of the model in a file.

    Raises:
        InputError: If its architecture or its rope is not supported, or a field is missing.
    """
    if file.architecture not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise InputError(
            f"{file.path}: architecture {file.architecture!r} is not supported; supported: {known}"
        )
    if file.get("expert_count"):
        raise InputError(f"{file.path}: mixtures of experts are not read from GGUF files")
    hf: dict[str, Any] = {
        "model_type": _MODEL_TYPES[file.architecture],
        "vocab_size": int(_tensor(file, "token_embd.weight").shape[-1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    for name, stored in _FIELDS.items():
        value = file.get(name)
        if value is not None:
            # Their numbers are float32: 1e-05 is 9.999999747378752e-06.
            hf[stored] = float(f"{value:.7g}") if isinstance(value, float) else value
    rotated = file.get("rope.dimension_count")
    if file.architecture == "llama" and rotated:
        hf.setdefault("head_dim", rotated)
    for name, stored in _TOKENS.items():
        hf[f"{stored}_token_id"] = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    missing = [name for name in _NEEDED if name not in hf]
    if missing:
        raise InputError(f"{file.path}: its metadata has no {missing[0]}")
    if file.architecture == "gemma2":
        heads = hf["hidden_size"] // hf["num_attention_heads"]
        largest = hf["num_hidden_layers"] == _LARGEST_OF_GEMMA2
        hf["query_pre_attn_scalar"] = heads if largest else hf.get("head_dim", heads)
    try:
        config = config_from_hf(hf | {"rope_scaling": _rope_scaling(file, hf)})
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None
    if rotated not in (None, config.head_width):
        raise InputError(f"{file.path}: {rotated} of {config.head_width} entries of a head rotate")
    return config


def _tensor(file: GGUF, name: str) -> Any:
    if name not in file.tensors:
        raise InputError(f"{file.path}: tensor {name} is missing")
    return file.tensors[name]


def _rope_scaling(file: GGUF, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rope_scaling of a config.json, from fields or from Llama 3's factors of frequencies."""
    kind, factor = file.get("rope.scaling.type"), file.get("rope.scaling.factor")
    original = file.get("rope.scaling.original_context_length")
    if kind not in (None, "none"):
        named = {"rope_type": kind, "factor": factor}
        return named | ({"original_max_position_embeddings": original} if original else {})
    if _LLAMA3_FACTORS not in file.tensors:
        return None
    held = np.array(file.tensors[_LLAMA3_FACTORS].data, np.float32)
    base = Rope(theta=hf.get("rope_theta", 10000.0))
    for factor in (8.0, 32.0):
        rope = Rope(base.theta, "llama3", factor, original_max_positions=8192)
        plain, scaled = (inverse_frequencies(one, 2 * held.size)[0] for one in (base, rope))
        if np.allclose(plain / scaled, held, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": rope.low_frequency_factor,
                "high_freq_factor": rope.high_frequency_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }
    raise InputError(f"{file.path}: {_LLAMA3_FACTORS} is that of neither Llama 3.1 nor 3.2")


def read_gguf_tokenizer(file: GGUF) -> Any:
    """The file's tokenizer, with its chat template.

    Raises:
        InputError: If the file has none, or one of an unknown kind.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    held = {
        group: {
            ours: file.fields[f"tokenizer.{name}"]
            for name, ours in names.items()
            if f"tokenizer.{name}" in file.fields
        }
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    told, options = held["tokenizer"], held["tokenizer_config"]
    if "tokens" not in told:
        raise InputError(f"{file.path} holds no tokenizer")
    try:
        made, more = convert_gguf_tokenizer(file.architecture, told)
    except (ValueError, KeyError) as error:
        raise InputError(f"{file.path}: its tokenizer cannot be read ({error})") from None
    if told.get("pre_tokenizer_type") == "smollm":
        # llama.cpp's rule of it, which transformers does not know: each digit is a word.
        made.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    if told.get("tokenizer_type") == "llama":
        options.setdefault("add_bos_token", True)
    for name, ours in _TOKENS.items():
        number = file.fields.get(f"tokenizer.ggml.{name}_token_id")
        options[f"{ours}_token"] = None if number is None else told["tokens"][number]
    return PreTrainedTokenizerFast(tokenizer_object=made, **options, **more)


def convert_gguf(
    path: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = SHARD_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the model in a GGUF file as config.json, safetensors and tokenizer.

    Args:
        path: The file.
        target: The folder to write.
        dtype: Of the weights; auto is as stored, and float32 for what is quantised.
        max_shard_bytes: Of a safetensors file.
        tell: Called with lines on what was read and written.

    Raises:
        InputError: For anything that is not supported, before any weight is read.
    """
    file = open_gguf(path)
    config = read_config(file)
    tokenizer = read_gguf_tokenizer(file)
    sources, shapes = _sources(file, config), _shapes(config)
    kinds = sorted({tensor.tensor_type.name for tensor in file.tensors.values()})
    tell(f"{file.path}: {file.architecture}, tensors of {', '.join(kinds)}")
    # Norms are float32 in every file.
    wide = [kind for kind in kinds if kind != "F32"] or ["F32"]
    stored = _PLAIN.get(wide[0], "float32") if len(wide) == 1 else "float32"
    made = np.dtype(_numpy_dtype(stored if dtype == "auto" else dtype))
    sizes = {name: math.prod(shape) * made.itemsize for name, shape in shapes.items()}
    hf = config_to_hf(config) | {"torch_dtype": made.name}

    def fetch(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = sources[name]().astype(made)
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{file.path}: {made.name} does not hold all weights of {name}")
        return values

    write_checkpoint(target, hf, sizes, fetch, tokenizer, max_shard_bytes)
    tell(f"{target}: written in {made.name}")


def _numpy_dtype(name: str) -> Any:
    import ml_dtypes

    return getattr(ml_dtypes, name) if name == "bfloat16" else name


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint and their shapes."""
    rows = decoder_parameters(config).values()
    return {row.stored.name: row.stored.shape(row.shape) for row in rows}


def _sources(file: GGUF, config: ModelConfig) -> dict[str, Callable[[], np.ndarray]]:
    """What reads each tensor of a checkpoint from the file.

    Raises:
        InputError: If a tensor is missing, misshapen or not the model's.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(kind, config.layers)
    found: dict[str, Callable[[], np.ndarray]] = {}
    left = dict(file.tensors)
    left.pop(_LLAMA3_FACTORS, None)
    for name, shape in _shapes(config).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = _tensor(file, str(stored))
        left.pop(str(stored), None)
        held = tuple(int(size) for size in reversed(tensor.shape))
        if held != shape:
            raise InputError(f"{file.path}: tensor {stored} is {held}, not {shape}")
        found[name] = partial(_read, tensor, _undo(file.architecture, config, str(stored)))
    if left:
        raise InputError(
            f"{file.path}: tensor {next(iter(left))} is not one of {kind.name.lower()}"
        )
    return found


def _read(tensor: Any, undo: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    from gguf import dequantize

    return undo(np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32))


def _undo(architecture: str, config: ModelConfig, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a tensor of a checkpoint of the file's."""
    if architecture == "llama" and ".attn_q." in name:
        return partial(_halves, heads=config.heads)
    if architecture == "llama" and ".attn_k." in name:
        return partial(_halves, heads=config.kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return lambda values: values - np.float32(1)
    return lambda values: values


def _halves(values: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows of each head with the pairs that rotate half a head apart, from side by side."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
