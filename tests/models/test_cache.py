"""What a selection does to the committed part, beside plain NumPy."""

import jax
import numpy as np
import pytest

from w2s_jax.models import cache as caches
from w2s_jax.models.cache import KV, KVCache, commit_chunk

SLOTS, WIDTH, ROWS, LAYERS, COUNT = 2, 3, 6, 2, 3


def stacked(layers):
    return jax.tree.map(lambda *own: np.stack(own), *layers)


def head_major(layers):
    """Keys [.., G, C, J] and values [.., G, J, C] of arrays [.., J, G, C]."""
    return tuple(
        KV(np.moveaxis(kv.keys, -3, -1), np.moveaxis(kv.values, -3, -2), head_major=True)
        for kv in layers
    )


def usual(name, held):
    """An array of a head-major layer as [.., J, G, C]."""
    return np.moveaxis(held, -1 if name == "keys" else -2, -3)


@pytest.mark.parametrize("capacity", [7, 16, 19])
@pytest.mark.parametrize("layout", [tuple, stacked, head_major])
def test_winners_follow_their_parents(capacity, layout, monkeypatch):
    """In fewer entries than move at a time, in whole blocks of them, and with some left."""
    monkeypatch.setattr(caches, "MOVED", 8)
    draw = np.random.default_rng(capacity)

    def part(*shape):
        return tuple(
            KV(*draw.normal(size=(2, *shape, 2, 3)).astype(np.float32)) for _ in range(LAYERS)
        )

    prefix, committed = part(SLOTS, 4), part(SLOTS, WIDTH, capacity)
    chunk = part(SLOTS, ROWS, COUNT)
    lengths = np.repeat([[2], [capacity - COUNT]], WIDTH, axis=1).astype(np.int32)
    parents, rows = np.array([[2, 0, 0], [1, 1, 2]]), np.array([[5, 0, 1], [2, 3, 5]])
    given = KVCache(layout(prefix), layout(committed), np.full(SLOTS, 3, np.int32), lengths)
    run = jax.jit(commit_chunk, static_argnames="count")
    found = run(given, layout(chunk), parents=parents, rows=rows, count=COUNT)
    np.testing.assert_array_equal(found.committed_length, lengths + COUNT)
    for layer in range(LAYERS):
        for name in ("keys", "values"):
            old, new = (getattr(whole[layer], name) for whole in (committed, chunk))
            held = found.committed if layout is stacked else found.committed[layer]
            held = np.asarray(getattr(held, name))
            held = held[layer] if layout is stacked else held
            held = usual(name, held) if layout is head_major else held
            for slot, w in np.ndindex(SLOTS, WIDTH):
                length = lengths[slot, w]
                behind = new[slot, rows[slot, w]]
                wanted = np.concatenate([old[slot, parents[slot, w], :length], behind])
                np.testing.assert_array_equal(held[slot, w, : length + COUNT], wanted)
