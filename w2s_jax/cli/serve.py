"""`w2s serve`: an OpenAI-compatible server over a policy and its guide. The server is in serve/."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from w2s_jax.serve import ServeConfig, serve

if TYPE_CHECKING:
    from w2s_jax.plan.meshes import Chosen
    from w2s_jax.search import SearchConfig
    from w2s_jax.search.checkpoints import SteeringPlan
    from w2s_jax.search.models import Places


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

    def choose_mesh(
        self, plan: "SteeringPlan", config: "SearchConfig", places: "Places", longest: int
    ) -> "Chosen":
        """The mesh for --mesh auto."""
        from w2s_jax.plan.meshes import choose_mesh, search_shapes

        sizes: dict[str, Any] = {"prompt_tokens": longest, "slots": self.slots}
        sizes |= {"slots_flag": "--slots", "dtype": self.weights_dtype}
        return choose_mesh(search_shapes(plan, config, places, **sizes))


def _announce(url: str) -> None:
    # Read by those who started the server, possibly through a pipe.
    print(f"w2s serve: listening on {url}", flush=True)
