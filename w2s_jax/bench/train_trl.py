"""A program of its own: times TRL's trainer on a checkpoint and rows of token ids.

`python train_trl.py JOB_JSON` prints one JSON line. Needs trl, torch and transformers, and nothing
of this package, so that any interpreter that has those can run it.
"""

import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train for the job's steps; seconds, CPU seconds and losses by step, and peak memory."""
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
    options = {"beta": 0.1} if dpo else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with tempfile.TemporaryDirectory() as folder:
        args: Any = (DPOConfig if dpo else SFTConfig)(
            output_dir=folder, max_steps=job["steps"], max_length=job["length"],
            per_device_train_batch_size=job["batch_size"] // (2 if dpo else 1),
            learning_rate=job["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch", bf16=narrow, gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(), logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", **options,
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
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "losses": logged,
        "peak_bytes": peak,
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
    with open(sys.argv[1]) as file:
        job = json.load(file)
    sys.stdout.write(json.dumps(run(job)) + "\n")
