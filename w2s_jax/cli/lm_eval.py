"""`w2s lm-eval`: tasks of lm-evaluation-harness on a steered policy.

The model class is in w2s_jax/evaluate/harness.py; the tasks and their metrics are lm-eval's.
"""

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError
from w2s_jax.search.settings import GuidanceConfig, MethodConfig


@dataclass(frozen=True, kw_only=True)
class LMEval(MethodConfig, GuidanceConfig):
    """Measure a policy, alone or steered by small models, on lm-eval's tasks.

    Likelihoods are those of the policy (sample) or of the mixture that is sampled from (eft);
    methods that choose among samples have none and take tasks that generate. Prints lm-eval's
    table.
    """

    tasks: UseAppendAction[tuple[str, ...]]
    """A task, group or pattern of names; several with commas, or by giving the flag again."""
    method: Literal["cbs", "bon", "eft", "ivg", "sample"] = "sample"
    """The policy alone (sample) or emulated fine-tuning; for tasks that generate also chunk-level
    beam search, best-of-N and integrated value guidance."""
    max_new_tokens: int = 256
    """Tokens of a generated text where a task names no number."""
    temperature: float = 0.7
    """Sampling temperature where a task samples and names none, and of all methods that choose
    among samples."""
    include_path: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder of further task files (YAML); theirs go before lm-eval's of the same name."""
    num_fewshot: int | None = None
    """Examples in front of each question; a task's own number where it is not given."""
    limit: float | None = None
    """Rows of each task, or a share of them below 1; for trying out."""
    apply_chat_template: bool = False
    """Write prompts by the policy's chat template, and those of the guides by theirs."""
    system_instruction: str | None = None
    """A system message in front of every prompt."""
    gen_kwargs: str | None = None
    """Generation arguments that go before the tasks' own: name=value, separated by commas."""
    use_cache: Annotated[str | None, arg(metavar="FILE")] = None
    """lm-eval's cache of answers; a run that was stopped goes on from it."""
    log_samples: bool = False
    """Put every prompt and answer into the output as well."""
    output: Annotated[str | None, arg(metavar="FILE")] = None
    """JSON of lm-eval's results."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Run the tasks; raises InputError for what is wrong, first for what costs little."""
        from w2s_jax.evaluate.harness import NAME, register
        from w2s_jax.evaluate.steered import load_steered
        from w2s_jax.text.rows import check_writable

        model_class = register()
        places = self.places()
        config = replace(self.search_config(), policy_cache=self.policy_cache)
        sources = self.sources(guided=self.method != "sample")
        if self.output:
            check_writable(self.output)
        names = [name for words in self.tasks for name in words.split(",") if name]
        manager = task_manager(names, self.include_path)
        steered = load_steered(
            sources,
            self.method,
            config,
            batch_size=self.batch_size,
            dtype=self.weights_dtype,
            places=places,
        )
        for line in (*steered.plan.notes(), *places.notes(steered.plan.configs)):
            print(line)

        import lm_eval
        from lm_eval.utils import make_table

        results = lm_eval.simple_evaluate(
            model=model_class(steered),
            model_args={name: value for name, value in asdict(self).items() if value},
            tasks=names,
            task_manager=manager,
            num_fewshot=self.num_fewshot,
            batch_size=self.batch_size,
            limit=self.limit,
            use_cache=self.use_cache,
            log_samples=self.log_samples,
            apply_chat_template=self.apply_chat_template,
            system_instruction=self.system_instruction,
            gen_kwargs=self.gen_kwargs,
            fewshot_random_seed=self.seed,
        )
        results["config"]["model"] = NAME
        if self.output:
            write_results(self.output, results)
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))


def task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's TaskManager that knows these tasks; its own are read only where they are needed.

    Raises InputError for a folder that is not there and for names that no task has.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise InputError("--tasks names no task")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"--include-path {include_path}: no such folder")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if not _unknown(names, own.all_tasks):
            return own
    manager = TaskManager(include_path=include_path)
    unknown = _unknown(names, manager.all_tasks)
    if unknown:
        raise InputError(
            f"--tasks: lm-eval knows no task {', '.join(unknown)}; name one of its own, or give "
            "the folder of yours with --include-path"
        )
    return manager


def _unknown(names: Sequence[str], known: Sequence[str]) -> list[str]:
    files = {name for name in names if name.endswith((".yaml", ".yml")) and Path(name).is_file()}
    return [name for name in names if name not in files and not fnmatch.filter(known, name)]


def write_results(path: str, results: dict[str, Any]) -> None:
    """Write lm-eval's results as JSON. Raises InputError where the file cannot be written."""
    from lm_eval.utils import handle_non_serializable

    from w2s_jax.text.rows import write_whole

    text = json.dumps(results, indent=2, default=handle_non_serializable)
    write_whole(path, [text.encode(), b"\n"])
