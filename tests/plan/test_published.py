"""Models of published sizes fit the slices that plan/README.md names; no weight is gathered whole.

A search and a training with adapters, the two whose programs differ most: each takes minutes.
"""

import json

import pytest

from tests.plan.conftest import NEEDS_LIBTPU

pytestmark = NEEDS_LIBTPU

GUIDES = ["--tuned=HuggingFaceH4/zephyr-7b-beta", "--untuned=HuggingFaceH4/mistral-7b-sft-beta"]
LLAMA = "meta-llama/Meta-Llama-3"
PLANS = {
    "search of 8B": ["search", *GUIDES, f"--policy={LLAMA}-8B-Instruct", "--topology=v5e:4x4"],
    "dpo of adapters on 70B": [
        *("dpo", f"--model={LLAMA}-70B-Instruct", "--topology=v5p:4x4x4"),
        *("--lora-rank=16", "--batch-size=64"),
    ],
}
# Mesh, and GiB that a device holds: what plan/README.md prints but for the temporaries.
TOLD = {
    "search of 8B": ("fsdp=2,tensor=8", 5.79),
    "dpo of adapters on 70B": ("data=32,tensor=2", 67.28),
}


@pytest.fixture(scope="module")
def planned(run_together, module_path):
    def path(name):
        return module_path / f"{name}.json"

    sources = {
        name: "from w2s_jax.cli.main import main\n"
        f"assert main({['plan', *flags, f'--json={path(name)}']!r}) == 0"
        for name, flags in PLANS.items()
    }
    printed = run_together(sources)

    def read(name):
        printed(name)
        return json.loads(path(name).read_text())

    return read


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_the_readme_fits(planned, name):
    plan = planned(name)
    assert plan["fits"], plan["resident_bytes"]
    # No loop gathers a whole weight or cache.
    gathered = {one["name"]: one["gathered"] for one in plan["programs"] if one["gathered"]}
    assert not gathered
    mesh, held = TOLD[name]
    assert plan["mesh"] == mesh
    assert sum(plan["resident_bytes"].values()) / 2**30 == pytest.approx(held, abs=0.02)
