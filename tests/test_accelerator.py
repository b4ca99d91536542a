"""`.ci/accelerator`: parts that fail or hang leave the rest, and what is packed."""

import importlib.util
import json
import subprocess
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def script():
    return module("accelerator")


@pytest.fixture(scope="module")
def wheels():
    return module("wheels")


def fail(rehearse, tell):
    tell({"so far": 1})
    raise ValueError("no luck")


def test_a_part_that_fails_leaves_the_rest(script, tmp_path):
    path = tmp_path / script.TOLD
    record = script.Record(path)
    parts = (script.Part("bad", 9, fail), script.Part("good", 9, lambda rehearse, tell: [rehearse]))
    script.run_parts(parts, record, rehearse=True)
    told = json.loads(path.read_text())["parts"]
    assert told["bad"]["status"] == "failed"
    assert told["bad"]["error"] == "ValueError: no luck"
    assert told["bad"]["figures"] == {"so far": 1}
    assert told["good"]["status"] == "passed"
    assert told["good"]["figures"] == [True]
    assert not record.passed


HANGS = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
parts = (
    script.Part("slow", 0.1, lambda rehearse, tell: time.sleep(60)),
    script.Part("next", 9, lambda rehearse, tell: "done"),
)
script.run_parts(parts, script.Record(script.Path(sys.argv[2])), rehearse=False)
"""


def test_the_next_process_goes_on_behind_a_part_that_hangs(script, tmp_path):
    path = tmp_path / script.TOLD
    words = [sys.executable, "-c", HANGS, str(ROOT / ".ci" / "accelerator.py"), str(path)]
    statuses = [subprocess.run(words, capture_output=True, check=False).returncode for _ in "ab"]
    assert statuses == [1, 0]
    told = json.loads(path.read_text())["parts"]
    assert told["slow"]["status"] == "stopped"
    assert "limit is 0 seconds" in told["slow"]["error"]
    assert told["next"]["figures"] == "done"


def test_limits_leave_room_in_eight_minutes(script):
    assert sum(part.seconds for part in script.PARTS) <= 470


def test_only_what_the_machine_lacks_is_packed(wheels):
    given = [
        "jax>=0.10.0", "tyro>=1.0", "Math_Verify==0.9.0", 'typing; python_version < "3.5"',
        'colorama; sys_platform == "win32"', 'shtab; extra == "dev"',
    ]  # fmt: skip
    assert [one.name for one in wheels._applying(given)] == ["tyro", "Math_Verify"]


def test_only_what_is_missing_is_installed(wheels, tmp_path):
    for name in ("pytest-8.0-py3-none-any.whl", "no_such_thing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert wheels.lacking(tmp_path) == ["no_such_thing"]
    assert wheels.lacking(tmp_path / "none") == []
