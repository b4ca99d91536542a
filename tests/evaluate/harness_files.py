"""Tiny checkpoints, small local task files for lm-eval, and what its numbers must be."""

import json
from pathlib import Path

import jax
import numpy as np

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model, init_model
from w2s_jax.models.save import save_model
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe

POSITIONS, VOCABULARY = 96, 300
TEXT = "the old ship sails far over a cold sea and home again before the long night falls"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CHOICES = [
    {"question": "The ship", "choices": ["sails", "falls far", "over the old sea"], "answer": 0},
    {"question": "A cold", "choices": ["night", "ship again"], "answer": 1},
    {"question": "Before", "choices": ["the", "a", "home", "far"], "answer": 2},
]
OPENINGS = [
    {"question": "The old", "answer": " ship"},
    {"question": "Over a cold sea and home", "answer": " again"},
    {"question": "Far", "answer": " over"},
]
PAGES = [{"page": "the old ship"}, {"page": " ".join([TEXT] * 9)}, {"page": "é far ☂ sea"}]

TASKS = {
    "tiny_choice": (
        CHOICES,
        """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    ),
    "tiny_pages": (
        PAGES,
        """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    ),
    "tiny_write": (
        OPENINGS,
        """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    ),
}


def tiny_checkpoint(directory: Path, seed: int, text: str = TEXT) -> str:
    """A random llama with a byte-level tokenizer, trained on `text`, and a chat template."""
    config = ModelConfig(
        architecture="llama",
        eos_ids=(0,),
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=24,
        vocab_size=VOCABULARY,
        max_positions=POSITIONS,
    )
    save_bpe(train_bpe([text] * 50, VOCABULARY), directory, max_length=POSITIONS)
    model = init_model(config, jax.random.key(seed))
    # Larger weights than a fresh model's, so that its distributions are far from uniform.
    params = jax.tree.map(lambda leaf: leaf * 8, model.params)
    save_model(Model(config, params), directory, tokenizer=load_tokenizer(directory))
    options = directory / "tokenizer_config.json"
    options.write_text(json.dumps(json.loads(options.read_text()) | {"chat_template": CHAT}))
    return str(directory)


def write_tasks(folder: Path) -> str:
    """A folder of task files that read the rows above; for --include-path."""
    folder.mkdir()
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + task)
    return str(folder)


def distribution(models: list[Model], tokens: list[int], beta: float | None) -> np.ndarray:
    """Float64 log-probs [X, V] behind each token: the policy's, or the EFT mixture's at beta."""
    policy, *guide = (_log_softmax(_logits(model, tokens)) for model in models)
    return policy if beta is None else _log_softmax(policy + beta * (guide[0] - guide[1]))


def apart(
    models: list[Model], contexts: list[list[int]], response: list[int], beta: float
) -> float:
    """The EFT mixture's log-likelihood of a response behind a context of each model's own."""
    read = [
        _log_softmax(_logits(model, [*context, *response[:-1]])[len(context) - 1 :])
        for model, context in zip(models, contexts, strict=True)
    ]
    mixed = _log_softmax(read[0] + beta * (read[1] - read[2]))
    return float(mixed[np.arange(len(response)), response].sum())


def _logits(model: Model, tokens: list[int]) -> np.ndarray:
    padded = np.zeros((1, POSITIONS), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(model(padded))[0, : len(tokens)]


def likelihood(
    models: list[Model], context: list[int], response: list[int], beta: float | None
) -> tuple[float, bool]:
    """(log-likelihood, greedy) of a response behind a context, token ids."""
    after = distribution(models, [*context, *response[:-1]], beta)[len(context) - 1 :]
    picked = after[np.arange(len(response)), response]
    return float(picked.sum()), bool((after.argmax(-1) == response).all())


def rolling(
    models: list[Model], start: int, tokens: list[int], window: int, beta: float | None
) -> float:
    """The log-likelihood of a long text in lm-eval's windows.

    Each token counts once, behind as many as a window of this many inputs holds; the first window
    opens with `start`.
    """
    first = min(window, len(tokens))
    total, _ = likelihood(models, [start], tokens[:first], beta)
    while first < len(tokens):
        end = min(first + window, len(tokens))
        total += likelihood(models, tokens[end - window - 1 : first], tokens[first:end], beta)[0]
        first = end
    return total


def greedy(
    models: list[Model], tokenizer, prompt: list[int], count: int, stop: str, beta: float | None
) -> str:
    """The likeliest tokens' text, up to EOS, `count` tokens or the stop string.

    A character that `count` cuts short is left out.
    """
    response: list[int] = []
    while len(response) < count and stop not in tokenizer.decode(response):
        after = distribution(models, [*prompt, *response], beta)[-1]
        response.append(int(after.argmax()))
        if response[-1] in models[0].config.eos_ids:
            break
    text = tokenizer.decode(response, skip_special_tokens=True)
    is_ended = response[-1] in models[0].config.eos_ids or stop in text
    return text.split(stop)[0] if is_ended else text.rstrip("\ufffd")


def _log_softmax(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
