"""lm-evaluation-harness: what `w2s lm-eval` does, and the model class `w2s`.

lm_eval comes with the extra `harness` and is imported only here, inside functions. What the class
asks of the models is in `steered.py`.
"""

import fnmatch
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from w2s_jax.errors import InputError
from w2s_jax.evaluate.config import HarnessConfig, SteeredConfig
from w2s_jax.evaluate.steered import (
    CHOOSING,
    Decoding,
    Prompts,
    Question,
    Steered,
    prepare_steered,
)
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.likelihood import ScoredResponse
from w2s_jax.text.chat import read_template_args
from w2s_jax.text.prompts import Conversation, Message, encode_texts
from w2s_jax.text.rows import check_writable, write_whole

NAME = "w2s"
DEFAULT_BATCH = 8
# In place of these names, which --model_args take, SteeredConfig has others.
_RENAMED = {
    "w": "beam_width",
    "k": "successors",
    "l": "chunk_length",
    "n": "samples",
    "max_gen_toks": "max_new_tokens",
}
_TAKEN = (
    "policy", "tuned", "untuned", "policy_template", "guide_template", "untuned_template",
    "template_args", "score_on", "method", "w", "k", "l", "n", "beta", "eft_top_k", "temperature",
    "top_k", "top_p", "max_gen_toks", "seed", "batch_size", "dtype", "mesh", "policy_rules",
    "guide_rules", "scan_layers", "quantise_policy", "policy_cache",
)  # fmt: skip
MODEL_ARGUMENTS = {name: _RENAMED.get(name, name) for name in _TAKEN}
"""The arguments of --model_args, and the fields of SteeredConfig that they set."""
_LEFT_OUT = ("device", "max_batch_size")
# Settings that lm-eval calls as HarnessConfig does.
_HARNESS_SETTINGS = (
    "num_fewshot", "batch_size", "limit", "use_cache", "log_samples", "apply_chat_template",
    "system_instruction", "gen_kwargs",
)  # fmt: skip
_HEEDED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_logger = logging.getLogger(__name__)


def register() -> type:
    """The model class, registered as `w2s`; the same one at every call.

    lm-eval makes it from the arguments that `steered_config` reads.

    Raises:
        InputError: Where lm_eval is not installed.
    """
    try:
        from lm_eval.api import registry
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise InputError(
            f'lm-eval is missing ({error}); pip install "w2s-jax[harness]" brings it'
        ) from None
    if NAME not in registry.MODEL_REGISTRY:
        registry.register_model(NAME)(type(NAME, (HarnessModel, TemplateLM), {}))
    return registry.get_model(NAME)


def lm_eval(
    config: HarnessConfig, *, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run lm-eval's tasks on a policy, alone or steered; with `config.output` write the results.

    Args:
        config: The policy with what steers it, and the tasks.
        tell: Takes lines on how the models are used, before the tasks are run.

    Returns:
        Lm-eval's results.

    Raises:
        InputError: For what is wrong, first for what costs little.
    """
    model_class = register()
    load_steered = prepare_steered(config)
    if config.output:
        check_writable(config.output)
    names = [name for words in config.tasks for name in words.split(",") if name]
    manager = _task_manager(names, config.include_path)
    steered = load_steered()
    for line in steered.notes:
        tell(line)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    results = simple_evaluate(
        model=model_class(steered),
        model_args={name: value for name, value in asdict(config).items() if value},
        tasks=names,
        task_manager=manager,
        fewshot_random_seed=config.seed,
        **{name: getattr(config, name) for name in _HARNESS_SETTINGS},
    )
    results["config"]["model"] = NAME
    if config.output:
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        write_whole(config.output, [text.encode(), b"\n"])
    return results


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
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


def steered_config(arguments: Mapping[str, Any]) -> SteeredConfig:
    """The settings that lm-eval's --model_args name, by the names of w2s's flags.

    temperature, top_k, top_p and max_gen_toks hold where a task does not say otherwise. lm-eval's
    device is left to JAX, and "auto" for a batch size is 8 rows.

    Raises:
        InputError: For an argument that is not known, and for a missing policy.
    """
    given = {name: value for name, value in arguments.items() if name not in _LEFT_OUT}
    for name in given:
        if name not in MODEL_ARGUMENTS:
            known = ", ".join(MODEL_ARGUMENTS)
            raise InputError(f"model argument {name!r}: it takes {known}")
    if given.get("policy") is None:
        raise InputError("model arguments: policy is missing, the checkpoint that writes")
    size = str(given.pop("batch_size", DEFAULT_BATCH))
    given["batch_size"] = int(size) if size.isdecimal() else DEFAULT_BATCH
    if given["batch_size"] < 1:
        raise InputError(f"batch_size is {size}; it must be at least 1")
    args = given.pop("template_args", None) or "{}"
    args = read_template_args(args, "template_args") if isinstance(args, str) else dict(args)
    guided = given.get("method", "sample") != "sample"
    values = {MODEL_ARGUMENTS[name]: value for name, value in given.items() if value is not None}
    for name in ("tuned", "untuned"):
        path = values.pop(name, None)
        values[name] = (str(path),) if guided and path is not None else ()
    for name in values.keys() & {"beta", "temperature", "top_p"}:
        values[name] = float(values[name])
    policy = str(values.pop("policy"))
    return SteeredConfig(policy=policy, template_args=json.dumps(args), **values)


def decoding_of(steered: Steered, arguments: Mapping[str, Any]) -> Decoding:
    """How a task's generation arguments (`until`, `max_gen_toks`, `do_sample` ..) are heeded.

    sample and eft are greedy unless the task samples, as lm-eval's models are. cbs, bon and ivg
    choose among samples, which greedy decoding would make equal: there a greedy task leaves the
    config its temperature. What the task says of top_k, top_p and the length goes before the
    config; its stop strings come after the config's own.

    Raises:
        InputError: For values out of range.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    config, sampling = steered.config, steered.config.sampling
    given = normalize_gen_kwargs(dict(arguments), config.max_new_tokens)
    others = sorted(name for name in given if name not in _HEEDED)
    if others:
        _logger.warning("w2s does not heed the generation arguments %s", ", ".join(others))
    temperature = float(arguments.get("temperature", sampling.temperature))
    if not given["do_sample"]:
        temperature = 0.0
    if temperature == 0 and steered.method in CHOOSING:
        temperature = float(sampling.temperature)
    top_k, top_p = given.get("top_k"), given.get("top_p")
    return Decoding(
        stop=(*config.stop, *(text for text in given["until"] if text)),
        max_new_tokens=given["max_gen_toks"],
        sampling=Sampling(
            temperature,
            sampling.top_k if top_k is None else int(top_k),
            float(sampling.top_p if top_p is None else top_p),
        ),
    )


def rows_of(contexts: Sequence[str]) -> list[int]:
    """A row id for each context: from its text and how often that came before, and unique.

    So the draws of a request depend on nothing else: not on what lm-eval had in its cache, on the
    limit, or on the order of tasks.
    """
    seen: dict[str, int] = {}
    ids: dict[int, None] = {}
    for context in contexts:
        count = seen[context] = seen.get(context, -1) + 1
        row = zlib.crc32(f"{count} {context}".encode(errors="surrogatepass"))
        while row in ids:
            row = (row + 1) % 2**32
        ids[row] = None
    return list(ids)


class HarnessModel:
    """A policy with what steers it, as lm-eval's TemplateLM asks of it; likelihoods are exact.

    Goes before TemplateLM among the bases of the class that `register` makes. A chat that
    `apply_chat_template` has written is remembered, so that guides read it behind templates of
    their own; with lm-eval's cache of requests it is not asked, and all read the policy's text.
    """

    cache_hook: Any

    def __init__(self, steered: Steered) -> None:
        super().__init__()
        self.steered = steered
        self.tokenizer = steered.plan.tokenizer
        self.batch_size = steered.batch_size
        self._chats: dict[str, Conversation] = {}

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """The model of lm-eval's arguments; InputError as `steered_config` and loading raise."""
        return cls(prepare_steered(steered_config(arg_dict | (additional_config or {})))())

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        return self.steered.max_length

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None and self.steered.plan.eos_ids:
            eos = self.steered.plan.eos_ids[0]
        if eos is None:
            raise InputError("neither the tokenizer nor the policy's config has an EOS token")
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.steered.plan.templates["policy"].jinja if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        template = self.steered.plan.templates["policy"]
        turns = tuple(Message(turn["role"], turn["content"]) for turn in chat_history)
        if not add_generation_prompt:
            return template.render_begun(turns)
        conversation = Conversation(messages=turns)
        text = template.render(conversation)
        self._chats[text] = conversation
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            # What a chat template wrote holds its special tokens.
            add_special_tokens = string not in self._chats and not (bos and string.startswith(bos))
        return encode_texts(self.tokenizer, [string], special=add_special_tokens)[0]

    def _prompts(self, context: str, tokens: Sequence[int]) -> Prompts:
        """What the models read for a context whose tokens are the policy's: one prompt, or each."""
        if context in self._chats:
            read = self.steered.plan.prompts(self._chats[context])
            if len(read) > 1:
                return (tuple(tokens), *read[1:])
        return (tuple(tokens),)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context, continuation) token ids, from one encoding of both texts.

        As in lm-eval, a context's last spaces are scored with the continuation – unless guides read
        prompts of their own, which end with spaces of theirs.
        """
        special = False if context in self._chats else None
        before = self.tok_encode(context, special)
        if len(self._prompts(context, before)) == 1:
            stripped = context.rstrip()
            context, continuation = stripped, context[len(stripped) :] + continuation
            before = self.tok_encode(context, special)
        whole = self.tok_encode(context + continuation, special)
        border = len(before)
        if border >= len(whole):
            # The continuation fell into a token that begins in the context.
            same = (a == b for a, b in zip(whole, before, strict=False))
            border = min(next((i for i, s in enumerate(same) if not s), border), len(whole) - 1)
        return whole[:border] or [self.prefix_token_id], whole[border:]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.steered.check_likelihood()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        windows = [
            [self._fit(self._prompts("" if text is None else text[0], context), response)]
            for text, context, response in requests
        ]
        asked = [text for text, *_ in requests]
        return self._score("loglikelihood", asked, windows, lambda found: found[0], disable_tqdm)

    def _fit(self, prompts: Prompts, response: list[int]) -> tuple[Prompts, list[int]]:
        """Prompts cut from the left so that a response fits behind them."""
        room = self.max_length + 1 - len(response)
        if room < 1:
            raise InputError(
                f"a continuation of {len(response)} tokens exceeds the {self.max_length} "
                "positions of the models; use shorter ones or other models"
            )
        return _cut(prompts, room), response

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        self.steered.check_likelihood()
        windows = []
        for request in requests:
            # Without special tokens: each token of the text is predicted once, and no other.
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = map(make_disjoint_window, rolling)
            windows.append([((tuple(context),), response) for context, response in pairs])

        def total(found: list[tuple[float, bool]]) -> float:
            return sum((logprob for logprob, _ in found), 0.0)

        asked = [request.args for request in requests]
        return self._score("loglikelihood_rolling", asked, windows, total, disable_tqdm)

    def _score(
        self,
        name: str,
        asked: Sequence[tuple[str, ...] | None],
        windows: Sequence[Sequence[tuple[Prompts, list[int]]]],
        answer: Callable[[list[tuple[float, bool]]], Any],
        quiet: bool,
    ) -> list[Any]:
        """What `answer` makes of the (log-likelihood, greedy) of each request's windows.

        An answer goes to lm-eval's cache as soon as it is there, by the request's arguments.
        """
        from tqdm import tqdm

        owners = [index for index, own in enumerate(windows) for _ in own]
        found: list[list[tuple[float, bool]]] = [[] for _ in windows]
        with tqdm(total=len(owners), desc=name, disable=quiet or None) as bar:

            def hear(place: int, scored: ScoredResponse) -> None:
                index, total = owners[place], float(scored.logprobs.sum(dtype=np.float64))
                found[index].append((total, bool(scored.greedy.all())))
                bar.update()
                arguments = asked[index]
                if arguments is not None and len(found[index]) == len(windows[index]):
                    self.cache_hook.add_partial(name, arguments, answer(found[index]))

            self.steered.likelihoods([window for own in windows for window in own], hear)
        return [answer(own) for own in found]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        from tqdm import tqdm

        asked = dict(zip(rows_of([r.args[0] for r in requests]), requests, strict=True))
        groups: dict[Decoding, list[Question]] = {}
        for row, request in asked.items():
            context, arguments = request.args
            decoding = decoding_of(self.steered, arguments)
            groups.setdefault(decoding, []).append(self._question(row, context, decoding))
        texts: dict[int, str] = {}
        with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm or None) as bar:

            def keep(row: int, text: str) -> None:
                texts[row] = text
                self.cache_hook.add_partial("generate_until", asked[row].args, text)
                bar.update()

            for decoding, questions in groups.items():
                self.steered.generate(questions, decoding, keep)
        return [texts[row] for row in asked]

    def _question(self, row_id: int, context: str, decoding: Decoding) -> Question:
        """A context as the models read it, cut from the left to leave room for the text."""
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks is {decoding.max_new_tokens}, and the models have "
                f"{self.max_length} positions; a prompt needs at least one of them"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        conversation = self._chats.get(context, Conversation(text=context))
        if len(tokens) > room and conversation.text is not None:
            kept = self.tokenizer.decode(tokens[-room:], skip_special_tokens=True)
            conversation = replace(conversation, text=kept)
        return Question(row_id, _cut(self._prompts(context, tokens), room), conversation)


def _cut(prompts: Prompts, room: int) -> Prompts:
    for prompt in prompts:
        if len(prompt) > room:
            _logger.warning("a context of %d tokens is cut from the left to %d", len(prompt), room)
    return tuple(prompt[-room:] for prompt in prompts)
