"""Programs of their own: decoding, search and training with torch, timed on rows of token ids.

`python peers.py JOB_JSON` prints one JSON line. Needs torch and transformers, trl and peft
too for a training, and nothing of this package, so that any interpreter that has those can run it.
"""

import inspect
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def decode(job: dict[str, Any]) -> dict[str, float]:
    """`generate` of transformers, on random weights: all rows repeatedly.

    Returns:
        Seconds of the first run, the median of the further ones, and peak memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(job["config"])
    torch.manual_seed(0)
    with torch.device(job["device"]):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"])).eval()
        prompts = torch.tensor(job["prompts"])
    # Random weights may draw an end, and every row is to have all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def once() -> float:
        start = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=job["temperature"],
            top_k=job["top_k"],
            num_return_sequences=job["samples"],
            max_new_tokens=job["new_tokens"],
        )
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        wanted = (len(prompts) * job["samples"], prompts.shape[1] + job["new_tokens"])
        assert tuple(out.shape) == wanted, f"{tuple(out.shape)} tokens, not {wanted}"
        return seconds

    with torch.inference_mode():
        return timed(once, job)


def timed(once: Callable[[], float], job: dict[str, Any]) -> dict[str, float]:
    """Seconds of the first run, the median of the further ones, and peak memory in bytes."""
    import torch

    first = once()
    seconds = statistics.median(once() for _ in range(job["repeats"]))
    on_gpu = job["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    return {"first_seconds": first, "seconds": seconds, "peak_bytes": peak}


class Reader:
    """A causal model of a checkpoint, with a cache of one row for each row that it reads."""

    def __init__(self, folder: str, job: dict[str, Any]):
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, job["dtype"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(job["device"]).eval()
        # transformers 5.24 renames it.
        known = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in known else "past_key_values"

    def start(self, prefix: Any, hypotheses: int) -> None:
        """Read [P, S] tokens, none or more, into the rows of so many hypotheses each."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        if prefix.shape[1]:
            self.model(prefix, logits_to_keep=1, **{self.name: self.cache})
        self.cache.batch_repeat_interleave(hypotheses)

    def read(self, tokens: Any) -> Any:
        """Logits [rows, n, V] of what follows each of [rows, n] tokens."""
        return self.model(tokens, **{self.name: self.cache}).logits

    def logprobs(self, tokens: Any, following: Any) -> Any:
        """Read tokens [rows, n]: float32 log-probs [rows] of those that follow each, summed."""
        logits = self.read(tokens).float()
        chosen = logits.gather(-1, following[..., None])[..., 0]
        return (chosen - logits.logsumexp(-1)).sum(-1)


def search(job: dict[str, Any]) -> dict[str, Any]:
    """Chunk-level beam search (arXiv 2405.19262), as it is written with transformers' caches.

    All prompts are searched at once, and no token ends a row. The policy reads one token of all
    rows at a time, behind the K-fold cache of the hypotheses; the guides a whole chunk at once.
    Then each cache keeps the rows that were selected.

    Returns:
        As `timed`, and of the last run the tokens [P, W, T] and scores [P, W], best first.
    """
    import torch

    policy, *guides = readers = [Reader(folder, job) for folder in job["checkpoints"]]
    prompts = torch.tensor(job["prompts"], device=job["device"])
    draws = torch.tensor(job.get("draws", []), device=job["device"])
    width, successors = job["beam_width"], job["successors"]
    firsts = torch.arange(len(prompts), device=job["device"])[:, None] * width * successors
    found: dict[str, Any] = {}

    def shortlist(logits: Any) -> tuple[Any, Any]:
        return (logits.float() / job["temperature"]).topk(min(job["top_k"], logits.shape[-1]))

    def draw(values: Any, ids: Any, position: int) -> Any:
        """A token [rows, 1] of each shortlist, by the Gumbel-max trick."""
        given = draws[:, position].flatten(0, 1) if "draws" in job else None
        noise = -torch.empty_like(values).exponential_().log() if given is None else given
        return ids.gather(-1, (values + noise).argmax(-1, keepdim=True))

    def propose(last: Any, position: int, length: int) -> Any:
        """A chunk [rows, length] of K rows for each hypothesis; its last token is not read."""
        # Read before the cache is repeated, once for all successors.
        lists = shortlist(policy.read(last)[:, -1])
        lists = tuple(one.repeat_interleave(successors, 0) for one in lists)
        policy.cache.batch_repeat_interleave(successors)
        chunk = [draw(*lists, position)]
        for step in range(1, length):
            chunk.append(draw(*shortlist(policy.read(chunk[-1])[:, -1]), position + step))
        return torch.cat(chunk, 1)

    def score(last: Any, chunk: Any) -> Any:
        """The log-ratio [rows] of each row's chunk."""
        read = torch.cat([last.repeat_interleave(successors, 0), chunk[:, :-1]], 1)
        for guide in guides:
            guide.cache.batch_repeat_interleave(successors)
        tuned, untuned = (guide.logprobs(read, chunk) for guide in guides)
        return tuned - untuned

    def once() -> float:
        start = time.perf_counter()
        for reader in readers:
            reader.start(prompts[:, :-1], width)
        last = prompts[:, -1:].repeat_interleave(width, 0)
        tokens, scores = last[:, :0], torch.zeros(len(last), device=job["device"])
        for position in range(0, job["new_tokens"], job["chunk_length"]):
            length = min(job["chunk_length"], job["new_tokens"] - position)
            chunk = propose(last, position, length)
            totals = scores.repeat_interleave(successors) + score(last, chunk)
            best, kept = totals.view(len(prompts), -1).topk(width)
            rows, scores = (kept + firsts).flatten(), best.flatten()
            tokens = torch.cat([tokens[rows // successors], chunk[rows]], 1)
            last = tokens[:, -1:]
            if position + length < job["new_tokens"]:
                for reader in readers:
                    reader.cache.batch_select_indices(rows)
        found["tokens"] = tokens.view(len(prompts), width, -1).tolist()
        found["scores"] = scores.view(len(prompts), width).tolist()
        return time.perf_counter() - start

    with torch.inference_mode():
        return timed(once, job) | found


def train(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on a checkpoint, for the job's steps.

    Returns:
        Seconds, CPU seconds and losses by step, and peak memory.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu_seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.started[0])
            self.cpu_seconds.append(time.process_time() - self.started[1])

    class Pairs(DPOTrainer):
        """Rows come as token ids."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    dpo, narrow = job["objective"] == "dpo", job["dtype"] == "bfloat16"
    on_gpu = torch.cuda.is_available()
    # Packing marks documents by their positions alone, which attention reads them from.
    texts = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": job["packed"]}
    options = {"beta": 0.1} if dpo else texts
    lora = None
    if job["lora_rank"]:
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=job["lora_rank"], lora_alpha=2 * job["lora_rank"],
            target_modules="all-linear", fan_in_fan_out=job["config"]["model_type"] == "gpt2",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args: Any = (DPOConfig if dpo else SFTConfig)(
            output_dir=folder, max_steps=job["steps"], max_length=job["length"],
            per_device_train_batch_size=job["batch_size"] // (2 if dpo else 1),
            learning_rate=job["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch", bf16=narrow, gradient_checkpointing=False,
            use_cpu=not on_gpu, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        clock = Clock()
        trainer = (Pairs if dpo else SFTTrainer)(
            model=AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32,
                                                       **job["no_dropout"]),
            args=args,
            train_dataset=Dataset.from_list(job["rows"]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(job["tokenizer"]),
            callbacks=[clock],
            peft_config=lora,
        )  # fmt: skip
        trainer.train()
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
    }


def peak_memory() -> int:
    """As `w2s_jax.train.estimate.peak_memory`."""
    status = Path("/proc/self/status")
    told = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text() if status.exists() else "", re.M)
    if told:
        return int(told[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    run = train if "objective" in job else search if "checkpoints" in job else decode
    sys.stdout.write(json.dumps(run(job)) + "\n")
