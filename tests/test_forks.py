"""Sources that run in forks: what they print comes back, and what fails in them fails here."""

import pytest


def test_a_source_has_its_devices_and_its_output_comes_back(run_python):
    code = "import jax, sys; print(len(jax.devices()), __name__); print('no', file=sys.stderr)"
    assert run_python(code, devices=3) == "3 __main__\n"


def test_what_fails_is_told(run_python):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_python("print(1 / 0)", devices=2)
    with pytest.raises(AssertionError, match="still running after 0.2 s"):
        run_python("import time; time.sleep(60)", devices=2, timeout=0.2)
