"""The two layouts of a decoder's parameters: a subtree per layer, or all layers stacked.

Stacked parameters serve `lax.scan`; per-layer ones decode faster on a single device.
"""

import jax
import jax.numpy as jnp

STACKED = "layers"


def layer_name(layer: int) -> str:
    """The key of one layer's subtree in the per-layer layout."""
    return f"{STACKED}_{layer}"


def stack_layers(params: dict, layers: int) -> dict:
    """The same parameters with the `layers_{i}` subtrees stacked as `layers`, [N, ...] each leaf.

    Stacked parameters are returned as they are.
    """
    if STACKED in params:
        return params
    names = [layer_name(layer) for layer in range(layers)]
    rest = {name: subtree for name, subtree in params.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {STACKED: stacked}


def unstack_layers(params: dict) -> dict:
    """The same parameters with `layers` [N, ...] split into `layers_{i}` subtrees.

    Per-layer parameters are returned as they are.
    """
    if STACKED not in params:
        return params
    rest = {name: subtree for name, subtree in params.items() if name != STACKED}
    layers = jax.tree.leaves(params[STACKED])[0].shape[0]
    split = {
        layer_name(layer): jax.tree.map(lambda leaf, i=layer: leaf[i], params[STACKED])
        for layer in range(layers)
    }
    return rest | split
