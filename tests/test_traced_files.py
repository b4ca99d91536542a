"""A prompt, weights and a pair of responses cross few files on their way."""

import pytest

MOST = {"search": 29, "logits": 11, "dpo": 36}


@pytest.mark.slow
def test_few_files_are_entered_by_a_job(run_python):
    told = run_python("from tests.traced_files import main\nmain()").splitlines()
    files = {line.split(":")[0]: line.split("files: ")[1].split() for line in told}
    assert files.keys() == MOST.keys()
    for job, most in MOST.items():
        assert len(files[job]) <= most, (job, files[job])
