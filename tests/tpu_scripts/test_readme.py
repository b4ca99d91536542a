"""What the README tells a new user to type is what the scripts take."""

import re
import subprocess

from tests.tpu_scripts.conftest import SCRIPTS


def blocks() -> list[str]:
    text = (SCRIPTS / "README.md").read_text()
    return [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]


def test_every_line_runs_with_the_slice_it_describes(cloud):
    (slice_env,) = [block for block in blocks() if block.startswith("W2S_TPU_NAME=")]
    (cloud.work / "slice.env").write_text(slice_env)
    (cloud.work / "secrets.env").write_text("HF_TOKEN=x\n")
    lines = [line for b in blocks() for line in b.splitlines() if line.startswith("tpu_scripts/")]
    assert {line.split()[0].removeprefix("tpu_scripts/") for line in lines} >= {
        *("create.sh", "setup.sh", "run.sh", "watch.sh", "copy.sh", "delete.sh"),
    }
    for line in lines:
        script, _, rest = line.partition(" ")
        typed = f'set -a; . ./slice.env; set +a; bash "$ROOT/{script}" --dry-run {rest}'
        done = subprocess.run(
            ["bash", "-c", typed],
            cwd=cloud.work,
            env=cloud.env | {"ROOT": str(SCRIPTS.parent), "PROJECT": "mine", "BUCKET": "bucket"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "gcloud" in done.stdout
    assert not cloud.calls


def test_every_script_and_its_variables_are_told():
    readme = (SCRIPTS / "README.md").read_text()
    for path in SCRIPTS.iterdir():
        if path.name not in ("README.md", "common.sh", "worker.sh"):
            assert f"`{path.name}`" in readme
    told = "".join(path.read_text() for path in SCRIPTS.glob("*.sh"))
    assert set(re.findall(r"W2S_TPU_\w+", readme)) <= set(re.findall(r"W2S_TPU_\w+", told))
