"""`w2s serve`: an OpenAI-compatible server over a policy and its guide. The server is in serve/."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from w2s_jax.serve import ServeConfig, serve

if TYPE_CHECKING:
    from w2s_jax.plan.meshes import Chosen


@dataclass(frozen=True, kw_only=True)
class Serve(ServeConfig):
    """Answer OpenAI's completions and chat requests with a policy, steered or not.

    Requests may hold more than OpenAI's fields: method, w, k, l, beta, top_k, seed, row_id,
    position, lane, return_token_ids. Flags give what they leave out. SIGTERM ends the server in
    good order.
    """

    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; status 1 where the engine fails."""
        if not serve(self, on_ready=_announce, choose_mesh=self.choose_mesh):
            print("error: the engine has failed, as told above", file=sys.stderr)
            raise SystemExit(1)

    def choose_mesh(self, *looked_at: Any) -> "Chosen":
        """The mesh for --mesh auto."""
        # Not above: jax is not imported before the libraries of a server were looked for.
        from w2s_jax.plan.meshes import choose_search_mesh

        sizes: dict[str, Any] = {"slots": self.slots, "slots_flag": "--slots"}
        return choose_search_mesh(*looked_at, dtype=self.weights_dtype, **sizes)


def _announce(url: str) -> None:
    # Read by those who started the server, possibly through a pipe.
    print(f"w2s serve: listening on {url}", flush=True)
