"""A really trained Llama (stories260K of llama2.c) tells the story that its author published."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.load import load_model
from w2s_jax.models.model import Model
from w2s_jax.models.save import save_model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def folder(shared_data):
    folder = shared_data / "weights" / "stories260K"
    if not (folder / "stories260K.bin").is_file():
        pytest.skip(f"no stories260K.bin in {folder}")
    return folder


def read_model(path):
    """A llama2.c version 0 file: seven int32 sizes, then float32 tensors, all layers of each."""
    raw = path.read_bytes()
    width, mlp_width, layers, heads, kv_heads, vocab_size, positions = struct.unpack_from("7i", raw)
    values, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    head_width = width // heads

    def halves(rows):
        # The file rotates neighbouring pairs of components; ours rotates the halves of a head.
        pairs = rows.reshape(layers, -1, head_width // 2, 2, width)
        return pairs.swapaxes(2, 3).reshape(layers, -1, head_width, width)

    embedding = take(vocab_size, width)
    attention_norm = take(layers, width)
    query = halves(take(layers, width, width))
    key = halves(take(layers, kv_heads * head_width, width))
    value = take(layers, kv_heads, head_width, width)
    out = take(layers, width, heads, head_width)
    mlp_norm = take(layers, width)
    gate, down = take(layers, mlp_width, width), take(layers, width, mlp_width)
    up, final_norm = take(layers, mlp_width, width), take(width)
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=mlp_width,
        max_positions=positions,
        tied_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
    )
    stacked = {
        "attention_norm": {"scale": attention_norm},
        "attention": {
            "query": {"kernel": query.transpose(0, 3, 1, 2)},
            "key": {"kernel": key.transpose(0, 3, 1, 2)},
            "value": {"kernel": value.transpose(0, 3, 1, 2)},
            "out": {"kernel": out.transpose(0, 2, 3, 1)},
        },
        "mlp_norm": {"scale": mlp_norm},
        "mlp": {
            "gate": {"kernel": gate.swapaxes(1, 2)},
            "up": {"kernel": up.swapaxes(1, 2)},
            "down": {"kernel": down.swapaxes(1, 2)},
        },
    }
    params = {
        "embed": {"embedding": embedding},
        "final_norm": {"scale": final_norm},
        "layers": stacked,
    }
    return Model(config, jax.tree.map(jnp.asarray, params))


def read_pieces(path):
    """The tokens of a llama2.c file: int32 longest, then (float32 score, int32 length, bytes)."""
    raw, at, pieces = path.read_bytes(), 4, []
    while at < len(raw):
        _, length = struct.unpack_from("fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return pieces


def test_greedy_decoding_tells_the_published_story(folder, tmp_path):
    save_model(read_model(folder / "stories260K.bin"), tmp_path)
    model = load_model(tmp_path)
    pieces = read_pieces(folder / "tok512.bin")
    assert len(pieces) == model.config.vocab_size
    capacity, text = 128, ""
    tokens = np.zeros((1, capacity), np.int32)
    tokens[0, 0] = model.config.bos_id
    for length in range(1, capacity):
        logits = model(jnp.asarray(tokens))  # causal: what follows `length` is not seen
        tokens[0, length] = int(jnp.argmax(logits[0, length - 1]))
        text = "".join(pieces[token] for token in tokens[0, 1 : length + 1]).lstrip()
        if len(text) >= len(STORY):
            break
    assert text[: len(STORY)] == STORY
