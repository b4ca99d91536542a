"""`w2s demo`: a small built-in policy, steered, and what each method gains."""

from dataclasses import dataclass

from w2s_jax.demo import DemoConfig


@dataclass(frozen=True)
class Demo(DemoConfig):
    """Steer a small built-in policy on openings of film reviews, and measure each method's gain.

    Compares plain sampling, best-of-16, emulated fine-tuning and chunk-level beam search by the
    reward of a sentiment classifier that none of them sees while decoding. Writes results.jsonl and
    summary.json.
    """

    def run(self) -> None:
        """Run the demo and print its tables."""
        from w2s_jax.demo.run import run_demo

        run_demo(self)
