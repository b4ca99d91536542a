"""Stop strings: the one hop of a search through text. Ends at token ids are found on the device."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from w2s_jax.search.state import SearchState
from w2s_jax.search.step import Proposal
from w2s_jax.text.prompts import cut, text_behind


def kept_tokens(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> int | None:
    """How many leading tokens hold the text before the first stop string; None where there is none.

    The fewest whose text begins with all that is kept: a token that holds the end of the kept text
    and the start of the stop string counts, one that holds only the stop string does not.
    """
    kept = cut(decode(tokens), stop)
    if kept is None:
        return None
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if decode(tokens[:middle]).startswith(kept):
            high = middle
        else:
            low = middle + 1
    return low


def apply_stops(
    state: SearchState,
    proposal: Proposal,
    prompts: Mapping[int, Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> tuple[np.ndarray, np.ndarray]:
    """The proposal's lengths and finished flags, [P, R] on the host, with stop strings heeded.

    prompts holds the prompt of every slot in use; responses are read behind theirs.
    """
    arrays = (state.tokens, state.base, state.active, state.finished, proposal.tokens)
    before, base, active, over, new = (np.asarray(array) for array in arrays)
    lengths, finished = np.array(proposal.lengths), np.array(proposal.finished)
    for slot in np.flatnonzero(active).tolist():
        text = partial(text_behind, decode, prompts[slot])
        for row in range(lengths.shape[1]):
            parent = row // state.config.successors
            if over[slot, parent]:
                continue
            response = np.concatenate([before[slot, parent, : base[slot]], new[slot, row]])
            response = response[: lengths[slot, row]].tolist()
            kept = kept_tokens(response, text, state.config.stop)
            if kept is not None:
                lengths[slot, row], finished[slot, row] = kept, True
    return lengths, finished
