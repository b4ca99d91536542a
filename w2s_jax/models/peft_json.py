"""adapter_config.json in both directions: which modules are adapted, and how that is scaled.

Follows PEFT 0.21; what would change the logits in a way not followed here is refused by name.
Opens no file: `peft.py` does, and says where an InputError comes from.
"""

import re
from collections.abc import Mapping
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.models.config import Json, ModelConfig
from w2s_jax.models.lora import LoraConfig

# Fields that change what an adapter computes, when they are set.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Ways to begin that change the base's weights too, which the adapter's files do not hold.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def read_lora(hf: Json) -> LoraConfig:
    """Rank, alpha, dropout and kind of scale; the targets are left at their default.

    Raises:
        InputError: For what is not supported, named, and for a malformed field.
    """
    if hf.get("peft_type") != "LORA":
        raise InputError(f"peft_type {hf.get('peft_type')!r} is not supported; LORA is")
    for field in _REFUSED:
        if hf.get(field):
            raise InputError(f"{field} is not supported")
    start = hf.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
        raise InputError(
            f"init_lora_weights {start!r} changed the base's weights too; convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    _check_kinds(hf)
    try:
        rank, alpha = int(hf.get("r", 8)), float(hf.get("lora_alpha", 8))
        dropout = float(hf.get("lora_dropout", 0.0))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"r, lora_alpha and lora_dropout must be numbers ({error})") from None
    return LoraConfig(rank, alpha, dropout, rslora=bool(hf.get("use_rslora", False)))


def _check_kinds(hf: Json) -> None:
    for field in _NAMES:
        value = hf.get(field)
        names = [value] if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{field} is {value!r}; it takes a list of names or a pattern")
    for field in _PATTERNS:
        value = hf.get(field) or {}
        if not isinstance(value, dict) or not all(
            isinstance(number, int | float) and number > 0 for number in value.values()
        ):
            raise InputError(f"{field} is {value!r}; it maps modules to numbers above 0")
    wanted = hf.get("layers_to_transform")
    if not all(isinstance(layer, int) for layer in _listed(wanted)):
        raise InputError(f"layers_to_transform is {wanted!r}; it takes layers' numbers")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def module_lora(hf: Json, lora: LoraConfig, module: str) -> LoraConfig:
    """The adapter of one module, whose rank or alpha may differ from the others'.

    A pattern's key is a module's name, or the end of one, as in peft.utils.get_pattern_key.

    Raises:
        InputError: For a key that is no pattern.
    """
    found: list[float | None] = []
    for field in _PATTERNS:
        keys = hf.get(field) or {}
        values = [keys[key] for key in keys if _matches(rf"(.*\.)?({key})", module)]
        found.append(values[0] if values else None)
    rank, alpha = found
    return LoraConfig(int(rank or lora.rank), float(alpha or lora.alpha), lora.dropout, lora.rslora)


def is_target(hf: Json, module: str) -> bool:
    """Whether PEFT would adapt a module (peft.tuners.tuners_utils.check_target_module_exists).

    Raises:
        InputError: For a malformed pattern.
    """
    saved = hf.get("modules_to_save") or []
    if _named(hf.get("exclude_modules"), module) or any(
        f".{name}." in f".{module}." for name in saved
    ):
        return False
    targets = hf.get("target_modules")
    if targets != "all-linear" and not _named(targets, module):
        return False
    layer, wanted = re.search(r"\.(\d+)\.", module), _listed(hf.get("layers_to_transform"))
    return not wanted or (layer is not None and int(layer[1]) in wanted)


def _named(names: str | list[str] | None, module: str) -> bool:
    if isinstance(names, str):
        # A model without a head names its modules without their first word.
        return any(_matches(names, form) for form in (module, module.partition(".")[2]))
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _matches(pattern: str, text: str) -> bool:
    try:
        return re.fullmatch(pattern, text) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is no pattern of module names ({error})") from None


def write_lora(
    config: ModelConfig, lora: LoraConfig, base: str, ranks: Mapping[str, int], known: list[str]
) -> dict[str, Any]:
    """The contents of adapter_config.json.

    ranks: of every adapted module, all scaled as `lora` says. known: all that could be adapted.
    """
    named = _shortened(ranks, known)
    odd = {name: rank for name, rank in named.items() if rank != lora.rank}
    power = 0.5 if lora.rslora else 1.0
    alphas = {name: _number(lora.alpha * (rank / lora.rank) ** power) for name, rank in odd.items()}
    return {
        "alpha_pattern": alphas,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": config.architecture == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": odd,
        "target_modules": list(named),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _shortened(ranks: Mapping[str, int], known: list[str]) -> dict[str, int]:
    """Ranks by the last words of modules' names, where all that end so are adapted alike."""
    short: dict[str, int] = {}
    for module, rank in ranks.items():
        words = module.split(".")
        for start in (len(words) - 1, len(words) - 2, 0):
            name = ".".join(words[start:])
            ending = (other for other in known if other.endswith(f".{name}"))
            if short.get(name) == rank or all(ranks.get(other) == rank for other in ending):
                short[name] = rank
                break
    return short
