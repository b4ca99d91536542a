"""What TRL's own code makes of rows: token ids, and which of them count.

Needs trl and torch; imported by live parity tests and by tests/golden/make_training_data.py.
"""

from types import SimpleNamespace

from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

LONG = 10_000


def prepared(kind, tokenizer, rows, options):
    """A list of rows; of each, its sides as (ids, which count), and its label if it has one."""
    options = {"max_length": LONG, "truncation": "keep_start", "loss_on": "auto"} | options
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=options["loss_on"] == "assistant",
        max_length=options["max_length"],
        truncation_mode=options["truncation"],
        shuffle_dataset=False,
        per_device_train_batch_size=len(rows) * 2,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss=options["loss_on"] != "all" and "prompt" in rows[0],
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    data = Dataset.from_list(rows)
    return {"sequences": _sequences, "pairs": _pairs, "labelled": _labelled}[kind](
        trainer, data, tokenizer, args
    )


def _sequences(trainer, data, tokenizer, args):
    found = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
    return [
        {"sides": [[row["input_ids"], [label != -100 for label in row["labels"]]]]} for row in found
    ]


def _pairs(trainer, data, tokenizer, args):
    found = DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
    collator = DataCollatorForPreference(0, args.max_length, args.truncation_mode)
    return [{"sides": _rows(collator([row]), "")} for row in found]


def _labelled(trainer, data, tokenizer, args):
    found = KTOTrainer._prepare_dataset(trainer, data, tokenizer, args, "eval")
    collator = DataCollatorForUnpairedPreference(0, args.max_length)
    rows = []
    for row in found:
        batch = collator([row])
        sides = _rows(batch, "") + _rows(batch, "KL_")
        rows.append({"sides": sides, "label": bool(row["label"])})
    return rows


def _rows(batch, prefix):
    """The rows of a collator's batch, without padding."""
    found = []
    for ids, mask, counts in zip(
        *(batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        length = int(mask.sum())
        found.append([ids[:length].tolist(), counts[:length].bool().tolist()])
    return found
