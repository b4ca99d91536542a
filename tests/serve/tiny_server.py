"""Tiny checkpoints for the server, in the process or on disk, and a real server process."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.tiny import tiny_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model
from w2s_jax.search.models import Guide, search_models
from w2s_jax.serve.jobs import Served
from w2s_jax.text.chat import load_template
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe

ROOT = Path(__file__).parents[2]
POSITIONS = 128
VOCABULARY = 300
TEXT = "a film of the sea, seen by one who was there. " * 50
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROLES = ("policy", "tuned", "untuned")


def tiny(seed: int, **changes) -> Model:
    shape = {"layers": 1, "vocab_size": VOCABULARY, "max_positions": POSITIONS, "eos_ids": (0,)}
    return tiny_model(seed, **(shape | changes))


def tokenizer_at(directory: Path, *, text: str = TEXT):
    save_bpe(train_bpe([text], VOCABULARY), directory, max_length=POSITIONS)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = CHAT
    return tokenizer


def served_at(directory: Path, *, guided: bool = True, **fields) -> Served:
    """Everything that answers, without a checkpoint."""
    tokenizer = tokenizer_at(directory)
    policy, tuned, untuned = (tiny(seed) for seed in range(3))
    models = search_models(policy, Guide(tuned, untuned) if guided else None)
    return Served(models, tokenizer, load_template(tokenizer, where="test"), **fields)


def checkpoints_at(directory: Path) -> dict[str, str]:
    """Folders of a policy, a tuned and an untuned model of one vocabulary, by role."""
    for seed, role in enumerate(ROLES):
        save_model(tiny(seed), directory / role, tokenizer=tokenizer_at(directory / role))
    return {role: str(directory / role) for role in ROLES}


COMMAND = "import sys; from w2s_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def server(checkpoints: dict[str, str], *flags: str, **environment: str):
    """A `w2s serve` process; gives (process, its address) once it is ready."""
    models = [word for role, path in checkpoints.items() for word in (f"--{role}", path)]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", *models, "--port", "0", *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("w2s serve: listening on http://"), line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()
