"""Makes the golden checkpoints of this folder with transformers and torch.

    python tests/golden/make_golden.py [CASE ..]

Each folder holds a tiny random checkpoint as transformers 5 writes it, its config.json as the
versions of 2023-24 would have written it (config_2024.json), and what transformers makes of fixed
tokens (expected.safetensors: tokens [B, X], logits [B, X, V]).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent.parent))

from tests.models.checkpoints import as_of_2024, build, logits_of  # noqa: E402

GOLDEN = (
    "gpt2",
    "llama_grouped",
    "llama_3_1",
    "mistral",
    "gpt_neox",
    "opt_projected",
    "phi3_long",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo",
    "olmo3",
    "smollm3",
    "mixtral",
    "qwen3_moe",
)
SHARDED = "mistral"


def main() -> None:
    for case in sys.argv[1:] or GOLDEN:
        folder = FOLDER / case
        shutil.rmtree(folder, ignore_errors=True)
        model = build(case)
        model.save_pretrained(folder, max_shard_size="20KB" if case == SHARDED else "1GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        hf = json.loads((folder / "config.json").read_text())
        (folder / "config_2024.json").write_text(json.dumps(as_of_2024(hf), indent=2) + "\n")
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
        expected = {"tokens": tokens.astype(np.int32), "logits": logits_of(model, tokens)}
        save_file(expected, folder / "expected.safetensors")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{size / 1e3:.0f} kB in all")


if __name__ == "__main__":
    main()
