"""`w2s convert`: a checkpoint written anew, an adapter merged into it or its dtype changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.models.encoder import Classifier
    from w2s_jax.models.heads import RewardModel
    from w2s_jax.models.model import Model


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint anew, with an adapter merged into it or in another dtype.

    The target is a folder that w2s and transformers load: config.json, safetensors, tokenizer.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Checkpoint: a folder or a Hugging Face id; an adapter brings the base that it names."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Folder to write; what it holds of an earlier checkpoint is replaced."""
    merge_lora: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Adapter in PEFT's format that is merged into SOURCE."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored."""

    def run(self) -> None:
        """Convert; raises InputError, before any weight is read, for what is wrong."""
        from w2s_jax.models.encoder_huggingface import save_classifier
        from w2s_jax.models.heads import RewardModel
        from w2s_jax.models.huggingface import save_model
        from w2s_jax.models.model import Model
        from w2s_jax.models.reward_huggingface import save_reward_model
        from w2s_jax.text.atomic import check_writable

        self._check()
        check_writable(Path(self.target) / "config.json")
        tokenizer = self._tokenizer()
        model = self._load()
        if isinstance(model, Model):
            save_model(model, self.target, tokenizer=tokenizer)
        elif isinstance(model, RewardModel):
            save_reward_model(model, self.target, tokenizer=tokenizer)
        else:
            save_classifier(model, self.target, tokenizer=tokenizer)
        also = "" if tokenizer is not None else "; no tokenizer was found to write beside it"
        print(f"{self.target}: written{also}")

    def _check(self) -> None:
        from w2s_jax.models.huggingface import is_adapter, locate
        from w2s_jax.models.lora_huggingface import base_of

        source, adapter = locate(self.source), self.merge_lora and locate(self.merge_lora)
        read = [source, *([adapter] if adapter else [])]
        if adapter and is_adapter(source):
            raise InputError(f"{source} is an adapter itself; name its base as SOURCE")
        if adapter and not is_adapter(adapter):
            raise InputError(f"--merge-lora {adapter}: it holds no adapter_config.json")
        if is_adapter(source):
            read.append(Path(base_of(source)))
        for folder in read:
            if Path(self.target).expanduser().resolve() == folder.resolve():
                raise InputError(f"TARGET {self.target} is what is read from; name another folder")

    def _tokenizer(self) -> Any:
        from w2s_jax.models.huggingface import is_adapter, locate
        from w2s_jax.models.lora_huggingface import base_folder
        from w2s_jax.text.tokenizer import holds_tokenizer, load_tokenizer

        places = [locate(path) for path in (self.merge_lora, self.source) if path is not None]
        if is_adapter(places[-1]):
            places.append(base_folder(places[-1]))
        return next((load_tokenizer(place) for place in places if holds_tokenizer(place)), None)

    def _load(self) -> "Model | RewardModel | Classifier":
        from w2s_jax.models.huggingface import load_model
        from w2s_jax.models.lora_huggingface import load_adapted
        from w2s_jax.models.reward_huggingface import is_reward_model, load_reward_model

        dtype = None if self.dtype == "auto" else self.dtype
        rewarding = [path for path in (self.source, self.merge_lora) if path is not None]
        if any(is_reward_model(path) for path in rewarding):
            base = self.source if self.merge_lora else None
            return load_reward_model(self.merge_lora or self.source, base=base, dtype=dtype)
        model = load_model(self.source, dtype=dtype)
        return model if self.merge_lora is None else load_adapted(self.merge_lora, model)
