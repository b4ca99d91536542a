"""What a model in training answers to a few prompts, for samples.jsonl."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from w2s_jax.ops.sampling import Sampling
from w2s_jax.search.config import sample
from w2s_jax.search.run import search
from w2s_jax.train.run import Source, Task
from w2s_jax.train.step import TrainState, cast

NEW_TOKENS = 64
OPENING = 8
"""Where a row has no prompt, so many of its first tokens stand for one."""


@dataclass(frozen=True)
class Sampler:
    """Answers the first `prompts` prompts of `data` with the model of a state, at temperature 0.7.

    The draws are the same for every state, so that what changes is the model.
    """

    task: Task
    tokenizer: Any
    data: Source
    prompts: int
    dtype: str

    def __call__(self, state: TrainState) -> list[dict[str, Any]]:
        """Rows of `prompt` and `response`."""
        ids = prompts_of(self.data, self.prompts)
        room = self.task.policy.config.max_positions - max(map(len, ids))
        settings = sample(
            1, sampling=Sampling(0.7), max_new_tokens=min(NEW_TOKENS, room), slots=len(ids)
        )
        params, frozen = cast((state.params, dict(self.task.frozen)), self.dtype)
        model = self.task.policy.model(params, frozen)
        decode = self.tokenizer.decode
        return [
            {
                "prompt": decode(prompt),
                "response": decode(list(result.best.tokens), skip_special_tokens=True),
            }
            for prompt, result in zip(ids, search(model, None, ids, settings), strict=True)
        ]


def prompts_of(data: Source, count: int) -> list[list[int]]:
    """What stands before the first target of each of the first rows, as token ids."""
    found = []
    for index in range(min(count, len(data))):
        batch = data.at([index])
        shape = (-1, batch["tokens"].shape[-1])
        tokens, targets = (batch[name].reshape(shape)[0] for name in ("tokens", "targets"))
        first = int(np.argmax(targets)) if targets.any() else 0
        found.append([int(token) for token in tokens[: first if first > 1 else OPENING]])
    return jax.tree.map(int, found)
