"""Programs of their own: other packages' decoding and training, timed on rows of token ids.

`python peers.py JOB_JSON` prints one JSON line. Needs torch and transformers, trl too for a
training, and nothing of this package, so that any interpreter that has those can run it.
"""

import json
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def decode(job: dict[str, Any]) -> dict[str, float]:
    """`generate` of transformers, on random weights: all rows repeatedly.

    Returns:
        Seconds of the first run, and the median of the further ones.
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
        first = once()
        return {
            "first_seconds": first,
            "seconds": statistics.median(once() for _ in range(job["repeats"])),
        }


def train(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on a checkpoint, for the job's steps.

    Returns:
        Seconds, CPU seconds and losses by step, and peak memory.
    """
    import torch
    from datasets import Dataset
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
    options = {"beta": 0.1} if dpo else {"dataset_kwargs": {"skip_prepare_dataset": True}}
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
    sys.stdout.write(json.dumps((train if "objective" in job else decode)(job)) + "\n")
