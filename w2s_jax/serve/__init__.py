"""The OpenAI-compatible server of a policy with or without a guide, and the client policy."""

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
    """Answer OpenAI's completions and chat requests with a policy, guided or not.

    Returns after SIGTERM or Ctrl-C, once requests in progress are answered or `config.grace`
    seconds have passed. If something is still compiling then, which cannot be interrupted, the
    process ends.

    Args:
        config: What answers, and how.
        on_ready: Called with the server's address once it answers.
        choose_mesh: Chooses the mesh for "auto", as in `search.search_file`.

    Returns:
        False if the engine has failed, which is reported on stderr.

    Raises:
        InputError: For wrong settings, checkpoints, templates and meshes, an address in use, and
            missing libraries, before any weight is read.
    """
    libraries = ("starlette", "uvicorn", "pydantic", "prometheus_client")
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise InputError(
            f'w2s serve needs {", ".join(missing)}; install them with pip install "w2s-jax[serve]"'
        )
    # Imported here: settings and their help need neither these libraries nor jax.
    from w2s_jax.serve.run import run

    return run(config, on_ready, choose_mesh)
