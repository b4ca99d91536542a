"""`w2s bench search`, `generate` and `train`. The measuring is in w2s_jax/bench."""

from dataclasses import dataclass

from w2s_jax.bench.config import GenerateBenchConfig, SearchBenchConfig, TrainBenchConfig


@dataclass(frozen=True)
class BenchSearch(SearchBenchConfig):
    """Measure chunk-level beam search on random weights.

    Prints prompts and tokens per second, the time in prefill, proposing, scoring and selecting,
    compile time, time to the first response, peak memory, and the share of the roofline floor;
    with --compare the ratio to transformers, measured in the same run.
    """

    def run(self) -> None:
        """Run the benchmark and print its figures."""
        from w2s_jax.bench import search

        search.run(self)


@dataclass(frozen=True)
class BenchGenerate(GenerateBenchConfig):
    """Measure plain sampling on random weights, and transformers' in the same run.

    Prints tokens per second, compile time, peak memory, and the share of the roofline floor.
    """

    def run(self) -> None:
        """Run the benchmark and print its figures."""
        from w2s_jax.bench import decoding

        decoding.run(self)


@dataclass(frozen=True)
class BenchTrain(TrainBenchConfig):
    """Measure SFT and DPO steps on random weights, and TRL's in the same run.

    Prints seconds of a step, tokens per second, peak memory, and the share of the matmul rate.
    """

    def run(self) -> None:
        """Run the benchmark and print its figures."""
        from w2s_jax.bench import train

        train.run(self)
