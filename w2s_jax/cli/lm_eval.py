"""`w2s lm-eval`: tasks of lm-evaluation-harness on a steered policy."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from w2s_jax.evaluate.config import HarnessConfig


@dataclass(frozen=True, kw_only=True)
class LMEval(HarnessConfig):
    """Measure a policy, alone or steered by small models, on lm-eval's tasks.

    Likelihoods are those of the policy (sample) or of the mixture that is sampled from (eft);
    methods that choose among samples have none and take tasks that generate. Prints lm-eval's
    table.
    """

    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Run the tasks and print their tables; InputError for what is wrong."""
        from w2s_jax.evaluate.harness import lm_eval

        results = lm_eval(self, tell=print)
        from lm_eval.utils import make_table

        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
