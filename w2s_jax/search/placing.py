"""Where the models of a search lie: one mesh, and rules for the policy and for what steers it."""

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from w2s_jax.models.config import ModelConfig
from w2s_jax.ops.sharding import SEARCH_RULES, Rules, parse_rules


@dataclass(frozen=True)
class Places:
    """A mesh for all models, or one device; a large policy may be split otherwise than its guides.

    Attributes:
        policy, others: rules of the policy, and of guides and reward models.
        stacked: whether layers are stacked for a scan, so that programs of many layers compile
            quickly; None stacks them on a mesh of several devices.
    """

    mesh: Mesh | None = None
    policy: Rules = SEARCH_RULES
    others: Rules = SEARCH_RULES
    stacked: bool | None = None

    @property
    def scan_layers(self) -> bool:
        """Whether layers are stacked."""
        if self.stacked is not None:
            return self.stacked
        return self.mesh is not None and self.mesh.size > 1

    def notes(self, configs: Mapping[str, ModelConfig]) -> list[str]:
        """A line for each model of which every device holds all key/value heads."""
        lines = []
        for role, config in configs.items():
            rules = self.policy if role == "policy" else self.others
            if self.mesh is None:
                continue
            split = rules.targets("kv_heads", config.kv_heads, self.mesh.shape)
            if rules.mesh_axes("kv_heads") and not split:
                lines.append(
                    f"{role}: every device holds all {config.kv_heads} key/value heads, which are "
                    "fewer than the parts of the mesh"
                )
        return lines


ONE_DEVICE = Places()


def read_places(
    mesh: Mesh | None, policy_rules: str, guide_rules: str, stacked: bool | None = None
) -> Places:
    """The places on a mesh by rules as text (`parse_rules`); InputError for wrong ones."""
    rules = parse_rules(policy_rules), parse_rules(guide_rules)
    return Places(mesh, *rules, stacked)
