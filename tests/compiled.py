"""What is compiled, told by jax itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from jax import monitoring

_COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations(*, here: bool = False) -> Iterator[list[str]]:
    """Grows by an entry for each program that is compiled inside, or read from the disk's cache.

    `here` leaves out what other threads compile.
    """
    found: list[str] = []
    own = get_ident()

    def note(event: str, seconds: float, **settings: str | int) -> None:
        if event == _COMPILATION and (not here or get_ident() == own):
            found.append(str(settings.get("fun_name", event)))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(note)
