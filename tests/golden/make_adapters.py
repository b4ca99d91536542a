"""Makes the golden adapters of this folder with PEFT on torch.

    python tests/golden/make_adapters.py

Each folder of adapters/ holds an adapter as PEFT writes it, on the golden checkpoint that it names,
and PEFT's logits of fixed tokens (expected.safetensors: tokens [B, X], logits [B, X, V]).
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent.parent))

from tests.models.adapters import ADAPTERS, adapt  # noqa: E402
from tests.models.checkpoints import logits_of  # noqa: E402

GOLDEN = ("gpt2_fused", "qwen2", "gemma", "gemma_embedding")
MODEL = "model.safetensors"


def main() -> None:
    for name in GOLDEN:
        folder, golden = FOLDER / "adapters" / name, FOLDER / ADAPTERS[name][0]
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as base:
            model = adapt(name, Path(base), folder)
            ours, theirs = load_file(golden / MODEL), load_file(Path(base) / MODEL)
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours), "bases differ"
        (folder / "README.md").unlink(missing_ok=True)
        config = folder / "adapter_config.json"
        hf = json.loads(config.read_text()) | {"base_model_name_or_path": f"../../{golden.name}"}
        config.write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
        tokens = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
        expected = {"tokens": tokens, "logits": logits_of(model, tokens)}
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
