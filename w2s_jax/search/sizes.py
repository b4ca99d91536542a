"""The few sizes that programs are compiled for."""

from collections.abc import Sequence

from w2s_jax.text.batches import power_of_two

SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The prefix capacity for a prompt of so many tokens: a power of two from 16.

    It holds all of the prompt but its last token.
    """
    return power_of_two(length - 1, SMALLEST_BUCKET)


def buckets(lengths: Sequence[int], *, slots: int = 1) -> dict[int, list[int]]:
    """Indices of the prompts by the prefix capacity they get; a program is compiled for each.

    Prompts too few to fill the slots go with the next longer ones, whose programs serve them too.
    """
    grouped: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        grouped.setdefault(bucket(length), []).append(index)
    joined: dict[int, list[int]] = {}
    few: list[int] = []
    for capacity, members in sorted(grouped.items()):
        few = sorted(few + members)
        if len(few) >= slots or capacity == max(grouped):
            joined[capacity], few = few, []
    return joined
