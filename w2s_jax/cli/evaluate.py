"""`w2s eval`: gold rewards of a file of responses, or what quantising a policy changes."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from w2s_jax.cli.multihost_launch import Hosts
from w2s_jax.errors import InputError
from w2s_jax.evaluate.config import JudgeConfig, QuantisationConfig


@dataclass(frozen=True, kw_only=True)
class Evaluate(JudgeConfig, QuantisationConfig, Hosts):
    """Gold rewards of a file of responses, by a reward model or a classifier.

    Prints the mean with its standard error and the lengths; with --against also the win rate over
    another file that answers the same prompts, with a bootstrap interval. With --output, finished
    rows go to OUTPUT.journal at once, and after a kill the same command goes on where it stopped.
    With --quantisation-report, what quantising a policy changes instead.
    """

    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Reward all rows, or measure the policy, and print the table.

        Raises:
            InputError: Before any weight is read, for what is wrong.
        """
        if self.quantisation_report is not None:
            return self._report_quantisation()
        from w2s_jax.evaluate.judging import judge, print_figures

        print_figures(judge(self))

    def _report_quantisation(self) -> None:
        """Print the table, also of what was finished when a policy failed."""
        from w2s_jax.evaluate.quantisation import print_report, report_quantisation

        if self.results or self.reward_model:
            given = "--results" if self.results else "--reward-model"
            raise InputError(f"{given} has no part in --quantisation-report; leave one out")
        last = None
        try:
            for report in report_quantisation(self):
                last = report
        finally:
            if last is not None:
                print_report(last)
