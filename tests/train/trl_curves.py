"""Runs TRL's trainers on a checkpoint and a file, one logged row a step, in the file's order.

Needs trl and torch. `python tests/train/trl_curves.py sft|dpo MODEL FILE OUTPUT OPTIONS_JSON`
writes the logged rows to OUTPUT; OPTIONS_JSON are further fields of SFTConfig or DPOConfig.
"""

import json
import sys
from pathlib import Path


def curve(kind, model, rows, folder, **options):
    """TRL's log, a row a step: plain float32 training on the CPU, rows in order, no dropout."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]
    torch.manual_seed(0)
    args = config(
        output_dir=str(folder), logging_steps=1, report_to="none", save_strategy="no", bf16=False,
        gradient_checkpointing=False, use_cpu=True, optim="adamw_torch", disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


if __name__ == "__main__":
    kind, model, source, output, options = sys.argv[1:]
    lines = Path(source).read_text().splitlines()
    found = curve(kind, model, [json.loads(line) for line in lines], Path(output).parent / "trl",
                  **json.loads(options))  # fmt: skip
    Path(output).write_text(json.dumps(found))
