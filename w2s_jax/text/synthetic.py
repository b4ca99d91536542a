"""Two made-up vocabularies of one language, for measuring guides that read another one's texts.

Words are a prefix and a suffix. The policy has a token for each word; the guide has other ids, and
writes one word in four as two tokens, so that its texts are a quarter longer.
"""

import math
from typing import Any

END, UNKNOWN = "[end]", "[unknown]"
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxz"
SPLIT = 4
"""One word in so many is no token of the guide."""


def vocabularies(size: int) -> tuple[Any, Any]:
    """Tokenizers of the policy and of the guide, with at most `size` tokens each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = math.isqrt(size - 1) + 1
    starts, ends = _syllables(rows, "{c}{v}"), _syllables(rows, "{c}{v}x")
    words = [start + end for start in starts for end in ends][: size - 2]
    policy = {word: index for index, word in enumerate([END, UNKNOWN, *words])}
    whole = [word for index, word in enumerate(words) if index % SPLIT]
    pieces = [UNKNOWN, END, *starts, *(f"##{end}" for end in ends), *reversed(whole)]
    guide = {piece: index for index, piece in enumerate(pieces[:size])}
    found = []
    for model in (
        models.WordLevel(policy, unk_token=UNKNOWN),
        models.WordPiece(guide, unk_token=UNKNOWN),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
        found.append(fast)
    return found[0], found[1]


def _syllables(count: int, form: str) -> list[str]:
    """So many distinct syllables, all of one length."""
    short = [form.format(c=c, v=v) for c in CONSONANTS for v in VOWELS]
    if count <= len(short):
        return short[:count]
    return [one[:2] + other for one in short for other in short][:count]
