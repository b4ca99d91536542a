"""`w2s convert`: a checkpoint written anew: an adapter merged, a run's step, or another dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.models.encoder import Classifier
    from w2s_jax.models.model import Model
    from w2s_jax.models.reward import RewardModel


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint anew: with an adapter merged, a step of a training run, or another dtype.

    The target is a folder that w2s and transformers load: config.json, safetensors, tokenizer.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Checkpoint: a folder or a Hugging Face id; an adapter brings the base that it names. Or the
    folder of a training run, of which a checkpoint is written, its adapters merged."""
    target: Annotated[Positional[str], arg(metavar="TARGET")]
    """Folder to write; what it holds of an earlier checkpoint is replaced."""
    merge_lora: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Adapter in PEFT's format that is merged into SOURCE."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, and float32 for what was trained: adapters, runs."""
    step: int | None = None
    """Step of a run's checkpoints, by default the newest."""

    def run(self) -> None:
        """Convert; raises InputError, before any weight is read, for what is wrong."""
        from w2s_jax.models.model import Model
        from w2s_jax.models.reward import RewardModel
        from w2s_jax.models.save import save_classifier, save_model, save_reward_model
        from w2s_jax.text.rows import check_writable

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
        from w2s_jax.train.export import is_run

        source, adapter = locate(self.source), self.merge_lora and locate(self.merge_lora)
        read = [source, *([adapter] if adapter else [])]
        if is_run(source) and adapter:
            raise InputError(f"{source} is a run's folder; name {source / 'model'} as SOURCE")
        if self.step is not None and not is_run(source):
            raise InputError(f"--step {self.step}: {source} is not the folder of a training run")
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
        from w2s_jax.train.export import is_run, read_record

        places = [locate(path) for path in (self.merge_lora, self.source) if path is not None]
        if is_run(places[-1]):
            places[-1] = locate(read_record(places[-1]).base)
        if is_adapter(places[-1]):
            places.append(base_folder(places[-1]))
        return next((load_tokenizer(place) for place in places if holds_tokenizer(place)), None)

    def _load(self) -> "Model | RewardModel | Classifier":
        from w2s_jax.models.huggingface import is_adapter, locate
        from w2s_jax.models.load import is_reward_model, load_adapted, load_model, load_reward_model
        from w2s_jax.models.lora_huggingface import base_of
        from w2s_jax.models.model import STORED
        from w2s_jax.train.export import export, is_run

        source = locate(self.source)
        adapter = self.source if is_adapter(source) else self.merge_lora
        dtype: str | None = None if self.dtype == "auto" else self.dtype
        if adapter is None:  # what one adds is lost in the few bits that a base may be stored in
            dtype = dtype or STORED
        if is_run(source):
            step, model, start = export(source, self.step)
            print(f"step {step} of {source}")
            return self._in_dtype(model, start)
        rewarding = [path for path in (self.source, self.merge_lora) if path is not None]
        if any(is_reward_model(path) for path in rewarding):
            base = self.source if self.merge_lora else None
            return load_reward_model(self.merge_lora or self.source, base=base, dtype=dtype)
        if adapter is None:
            return load_model(self.source, dtype=dtype)
        start = load_model(self.source if self.merge_lora else base_of(source), dtype="float32")
        return self._in_dtype(load_adapted(adapter, start), start)

    def _in_dtype(self, trained: "Model", start: "Model | None") -> "Model":
        """A trained model in --dtype, with a line on what that loses of its way from the start."""
        from w2s_jax.models.model import Model
        from w2s_jax.train.export import measure_rounding, rounded

        if self.dtype in ("auto", "float32"):
            return trained
        if start is not None:
            print(f"--dtype {measure_rounding(start.params, trained.params, self.dtype)}")
        return Model(trained.config, rounded(trained.params, self.dtype))
