"""Files that hold one mapping: YAML, of which JSON is a part."""

from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError, check_fetched


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML or JSON file.

    Raises InputError for a file that cannot be read, is neither, or holds something else.
    """
    import yaml

    check_fetched(Path(path))
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a mapping of names to values")
    return values
