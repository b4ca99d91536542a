"""`w2s demo`: the flags of the demo. What it does is in w2s_jax/demo/run.py."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg


@dataclass(frozen=True)
class Demo:
    """Steer a small built-in policy on openings of film reviews, and measure each method's gain.

    Compares plain sampling, best-of-16, emulated fine-tuning and chunk-level beam search by the
    reward of a sentiment classifier that none of them sees while decoding. Writes results.jsonl and
    summary.json.
    """

    output: Annotated[str, arg(metavar="DIR")] = "demo"
    """Folder of results.jsonl and summary.json."""
    prompts: int = 64
    """Openings to continue, 80 at most."""
    seed: int = 0
    """Decides the draws."""
    max_new_tokens: int = 50
    """Tokens in a response."""

    def run(self) -> None:
        """Run the demo and print its tables."""
        from w2s_jax.demo.run import run_demo

        run_demo(
            self.output, prompts=self.prompts, seed=self.seed, max_new_tokens=self.max_new_tokens
        )
