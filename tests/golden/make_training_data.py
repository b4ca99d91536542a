"""Records what TRL's own code makes of rows: training_data/trl.json, and the tokenizer beside it.

    python tests/golden/make_training_data.py

Needs trl and torch. Holds token ids and targets for every case of tests/text/data_cases.py.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent.parent))

from tests.text import trl_data  # noqa: E402
from tests.text.data_cases import CASES  # noqa: E402
from w2s_jax.text.tokenizer import (  # noqa: E402
    load_tokenizer,
    save_bpe,
    train_bpe,
)


def golden(folder):
    """The whole record, as JSON holds it."""
    tokenizer = load_tokenizer(folder)
    cases = {}
    for name, (kind, chat_template, rows, options) in CASES.items():
        tokenizer.chat_template = chat_template
        cases[name] = trl_data.prepared(kind, tokenizer, rows, options)
    return {"trl": version("trl"), "cases": cases}


def main() -> None:
    folder = FOLDER / "training_data"
    if not folder.exists():
        save_bpe(train_bpe(["the sea, and a film of it ."] * 20, 290), folder, max_length=512)
    path = folder / "trl.json"
    path.write_text(json.dumps(golden(folder)) + "\n")
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
