"""What is told when a host's process ends before it has met the others."""

import pytest

CODE = """
import os, sys
from w2s_jax import distributed
from w2s_jax.cli.multihost_launch import _await_child
from w2s_jax.distributed import HostConfig
distributed.START_SECONDS = {seconds}
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.close(2)
    os.abort()
os.close(write_end)
sys.stderr = sys.stdout
print(_await_child(child, read_end, HostConfig(2, 1, "localhost:2345", "--hosts")))
"""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (300, "host 1: refused by the other hosts; perhaps two have the number 1; "),
        (0.5, "host 1: not all 2 hosts came within 0.5 s; "),
    ],
)
def test_a_host_that_is_refused_is_not_said_to_have_waited(run_python, seconds, told):
    line, status = run_python(CODE.format(seconds=seconds)).splitlines()
    assert line.startswith(told)
    assert status == "75"
