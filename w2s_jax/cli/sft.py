"""`w2s sft`: supervised fine-tuning of a decoder, all of it or by adapters."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from w2s_jax.cli.train import Training

if TYPE_CHECKING:
    from w2s_jax.text.batches import Data
    from w2s_jax.text.training_data import DataConfig
    from w2s_jax.train.objectives import Policy
    from w2s_jax.train.step import LossFunction


@dataclass(frozen=True, kw_only=True)
class SFT(Training):
    """Fine-tune a model on texts, prompts with completions, or conversations.

    The folder of the run gets model/ (a Hugging Face checkpoint, or a PEFT adapter), metrics.jsonl
    and checkpoints/. The same command goes on where it was stopped; SIGTERM saves first and exits
    with status 75.
    """

    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that count: those of completions, of the assistant's turns, or all; auto is
    completions where there are prompts, else all."""
    packing: Literal["none", "best-fit"] = "none"
    """Put several examples in a row of max_length; they do not see one another."""

    name: ClassVar[str] = "sft"
    peak: ClassVar[float] = 2e-5

    def data_options(self) -> dict[str, Any]:
        """What is special to this command's data."""
        return {"loss_on": self.loss_on, "packing": self.packing}

    def load_data(self, config: "DataConfig", tokenizer: Any) -> "Data":
        """The examples of these files."""
        from w2s_jax.text.training_data import load_sequences

        return load_sequences(config, tokenizer)

    def objective(self, policy: "Policy") -> "LossFunction":
        """The loss that is trained."""
        from w2s_jax.train.objectives import sft_loss

        return sft_loss(policy)
