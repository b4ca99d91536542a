"""The shapes that a plan is made for: of published models, or of a folder or config.json."""

from pathlib import Path

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.published import KNOWN


def shape_of(name: str) -> ModelConfig:
    """The config of a folder, a config.json, a published model of `KNOWN`, or another hub id.

    No weights are read or fetched. Raises InputError for what is none of them.
    """
    from w2s_jax.models.huggingface import CONFIG, GENERATION_CONFIG, load_config, locate

    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        shown = name if len(name) <= 80 else f"{name[:40]}..."
        raise InputError(f"{shown}: no such file or directory ({why})") from None
    if is_file:
        return _from_file(path)
    if name in KNOWN and not is_folder:
        return ModelConfig.from_hf(KNOWN[name])
    return load_config(locate(name, (CONFIG, GENERATION_CONFIG)))


def _from_file(path: Path) -> ModelConfig:
    from w2s_jax.models.huggingface import read_json

    found = read_json(path)
    try:
        return ModelConfig.from_hf(found)
    except InputError as error:
        raise InputError(f"{path}: not a config.json ({error})") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: a field has the wrong type ({error})") from None
