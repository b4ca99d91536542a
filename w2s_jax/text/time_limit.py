"""A limit on the time of programs that checkpoints bring along: chat templates."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, no_type_check

TEMPLATE_SECONDS = 5.0
"""What a chat template may take; those of models take milliseconds."""


class TimeUp(Exception):
    """The time is up."""


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """The tokenizer's apply_chat_template within TEMPLATE_SECONDS.

    Raises TimeUp, and whatever the template raises, which is a program and may raise anything.
    """
    with within(TEMPLATE_SECONDS):
        return tokenizer.apply_chat_template(list(turns), **options)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeUp in what this thread runs inside once it took so many seconds of a processor.

    Calls are watched, and of code without a file, as jinja makes of templates, each line; a single
    long operation in C is seen when it ends. Works in every thread, and other threads' load, or the
    machine's, does not count.
    """
    start = time.thread_time()

    @no_type_check  # it is called for every line
    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        # Callbacks of the garbage collector and of weak references lose what is raised in them, and
        # the watch ends with it: elsewhere than in templates and jinja it is raised later.
        limit = seconds if not file.endswith(".py") or "jinja2" in file else 2 * seconds
        if time.thread_time() - start > limit:
            raise TimeUp(f"it takes longer than {seconds:g} seconds")
        return None if file.endswith(".py") else watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
