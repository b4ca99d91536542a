"""The OpenAI-compatible server over a policy with or without a guide, and the client policy."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from w2s_jax.errors import InputError
from w2s_jax.serve.config import ServeConfig

if TYPE_CHECKING:
    from w2s_jax.search.file import ChooseMesh

__all__ = ["ServeConfig", "serve"]


def serve(
    config: ServeConfig,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    choose_mesh: "ChooseMesh | None" = None,
) -> bool:
    """Answer OpenAI's completions and chat requests with a policy, steered or not.

    Returns after SIGTERM or Ctrl-C, once requests under way are answered or `config.grace` seconds
    are over. Where something still compiles then, which nothing interrupts, the process ends.

    Args:
        config: What answers and how.
        on_ready: Called with the server's address once it answers.
        choose_mesh: Chooses for the mesh "auto", as of `search.search_file`.

    Returns:
        False where the engine has failed, which is told on stderr.

    Raises:
        InputError: Before any weight is read, for settings, checkpoints, templates and meshes that
            are wrong, an address that is taken, and libraries that are not there.
    """
    libraries = ("starlette", "uvicorn", "pydantic", "prometheus_client")
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise InputError(
            f'w2s serve needs {", ".join(missing)}; install them with pip install "w2s-jax[serve]"'
        )
    # Not above: settings are read, and helped with, without these libraries and without jax.
    from w2s_jax.serve.run import run

    return run(config, on_ready, choose_mesh)
