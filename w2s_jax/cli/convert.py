"""`w2s convert`: a checkpoint written anew: an adapter merged, a run's step, a GGUF file."""

from dataclasses import dataclass

from w2s_jax.train.config import ConvertConfig


@dataclass(frozen=True)
class Convert(ConvertConfig):
    """Write a checkpoint anew: an adapter merged, a run's step, a GGUF file, another dtype.

    The target is a folder that w2s and transformers load: config.json, safetensors, tokenizer.
    """

    def run(self) -> None:
        """Convert; raises InputError, before any weight is read, for what is wrong."""
        from w2s_jax.train.export import convert

        convert(self, tell=print)
