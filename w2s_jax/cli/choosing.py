"""What a command is about to run, as shapes, so that `--mesh auto` chooses before weights are read.

The choosing is in w2s_jax/plan/here.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from w2s_jax.plan.programs import SearchShapes
    from w2s_jax.search.checkpoints import SteeringPlan
    from w2s_jax.search.config import SearchConfig
    from w2s_jax.search.models import Places

MESH = "mesh.txt"
"""Where a training run's folder says, in words, on which mesh it last ran."""


def search_shapes(
    plan: "SteeringPlan",
    config: "SearchConfig",
    places: "Places",
    *,
    prompt_tokens: int,
    slots: int,
    dtype: str | None,
    slots_flag: str = "--batch-size",
) -> "SearchShapes":
    """The shapes of a search with the models of a plan, by the rules of `places`.

    dtype: of the weights, None is what loading takes. A checkpoint that is named twice counts
    twice.
    """
    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.huggingface import locate
    from w2s_jax.models.model import STORED, quickest_dtype
    from w2s_jax.models.reward import load_reward_config
    from w2s_jax.plan.programs import GuideShapes, SearchShapes

    checkpoints = plan.sources.checkpoints
    guiding = iter([role for role in plan.configs if "tuned" in role])
    pairs = zip(guiding, guiding, plan.on_device, strict=True)
    bases = {path: adapted.base for path, adapted in plan.adapters.items()}
    rewards = (path for role, path in checkpoints.items() if role.startswith("reward-model"))
    judges = [load_reward_config(bases.get(path, path)) for path in rewards]
    dtype = dtype or quickest_dtype()
    return SearchShapes(
        policy=plan.configs["policy"],
        guides=tuple(
            GuideShapes(plan.configs[tuned], plan.configs[untuned], on_tokens=here)
            for tuned, untuned, here in pairs
        ),
        config=config,
        prompt_tokens=prompt_tokens,
        slots=slots,
        slots_flag=slots_flag,
        dtype=stored_dtype(locate(checkpoints["policy"])) if dtype == STORED else dtype,
        policy_rules=places.policy,
        guide_rules=places.others,
        quantize=plan.sources.quantize,
        # Encoders stay whole on every device.
        judges=tuple(judge for judge in judges if isinstance(judge, ModelConfig)),
    )


def mesh_before(directory: Path) -> str | None:
    """The mesh that a training run's folder had last, in words; None where it does not say."""
    try:
        return (directory / MESH).read_text(errors="replace").strip()
    except OSError:
        return None


def stored_dtype(checkpoint: Path) -> str:
    """The dtype that a checkpoint's config.json, or its base's, says its weights have."""
    from w2s_jax.models.huggingface import CONFIG, is_adapter, read_json
    from w2s_jax.models.lora_huggingface import base_folder

    if is_adapter(checkpoint):
        return stored_dtype(base_folder(checkpoint))
    config = read_json(checkpoint / CONFIG)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
