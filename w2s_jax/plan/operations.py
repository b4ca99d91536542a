"""Matmul operations of a program, counted from its jaxpr: loops by their length, nothing compiled.

Counts are of the whole program, whatever devices share it.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_operations(jaxpr: Any, unknown: int = 1) -> float:
    """Multiplications and additions of all dot products.

    jaxpr: a (closed) jaxpr, as `jax.make_jaxpr` or `traced.jaxpr` gives. A loop whose length is not
    known runs `unknown` times. Of branches the costliest counts. A Pallas kernel is what its own
    estimate says, and a part for one device (`shard_map`) runs on each of its mesh.
    """
    found = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            found += _dot(equation)
            continue
        cost = parameters.get("cost_estimate")
        if name == "pallas_call" and cost is not None:
            found += cost.flops
            continue
        inner = [matmul_operations(one, unknown) for one in _inside(parameters)]
        if name == "scan":
            found += parameters["length"] * sum(inner)
        elif name == "shard_map":
            found += parameters["mesh"].size * sum(inner)
        elif name == "while":
            found += unknown * sum(inner)
        elif name == "cond":
            found += max(inner, default=0.0)
        else:
            found += sum(inner)
    return found


def _dot(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _inside(parameters: Any) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one
