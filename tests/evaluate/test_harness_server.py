"""lm-eval's own `local-completions` client against a `w2s serve` process, on local tasks."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.evaluate.harness_files import (
    CHOICES,
    OPENINGS,
    PAGES,
    POSITIONS,
    greedy,
    likelihood,
    rolling,
    tiny_checkpoint,
    write_tasks,
)
from w2s_jax.models.load import load_model
from w2s_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.harness
ROOT = Path(__file__).parents[2]
BETA = 0.6
ROLES = ("policy", "tuned", "untuned")
COMMAND = "import sys; from w2s_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("OPENAI_API_KEY", "x")
        # A proxy of the machine's must not stand before a server on it.
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {role: tiny_checkpoint(root / role, seed) for seed, role in enumerate(ROLES)}


@pytest.fixture(scope="module")
def loaded(folders):
    models = [load_model(folders[role], dtype="float32") for role in ROLES]
    return models, load_tokenizer(folders["policy"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@contextmanager
def serving(folders, *flags):
    """The address of a `w2s serve` process."""
    models = [word for role, path in folders.items() for word in (f"--{role}", path)]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", *models, "--port", "0", *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("w2s serve: listening on http://"), line + process.stderr.read()
        yield line.split()[-1]
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def evaluate(folders, tasks, address, names, **changes):
    """lm-eval's results of its own client, and the answers by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments = {
        "model": "policy",
        "tokenizer": folders["policy"],
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "huggingface",
        "max_length": POSITIONS,
        "num_concurrent": 3,
        "max_retries": 1,
    }
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments | changes.pop("model_args", {}),
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        **changes,
    )
    return {name: [row["resps"] for row in results["samples"][name]] for name in names}


def check_choices(loaded, found, beta):
    models, tokenizer = loaded
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    for row, answers in zip(CHOICES, found, strict=True):
        context = ids(row["question"])
        for choice, ((value, is_greedy),) in zip(row["choices"], answers, strict=True):
            response = ids(f"{row['question']} {choice}")[len(context) :]
            expected = likelihood(models, context, response, beta)
            assert value == pytest.approx(expected[0], abs=1e-3)
            assert is_greedy == expected[1]


def check_pages(loaded, found, beta):
    models, tokenizer = loaded
    for row, ((value,),) in zip(PAGES, found, strict=True):
        tokens = tokenizer(row["page"], add_special_tokens=False).input_ids
        # The client keeps a position for the one token it must ask for, and one for the context.
        expected = rolling(models, tokenizer.bos_token_id, tokens, POSITIONS - 2, beta)
        assert value == pytest.approx(expected, abs=1e-2, rel=1e-5)


def check_texts(loaded, found, beta):
    models, tokenizer = loaded
    for row, ((text,),) in zip(OPENINGS, found, strict=True):
        prompt = tokenizer(row["question"], add_special_tokens=False).input_ids
        assert text == greedy(models, tokenizer, prompt, 12, "e", beta)


@pytest.mark.parametrize(("method", "beta"), [("eft", BETA)])
def test_all_kinds_of_task_give_direct_numbers(folders, loaded, tasks, method, beta):
    names = ["tiny_choice", "tiny_pages", "tiny_write"]
    roles = {"policy": folders["policy"]} if beta is None else folders
    with serving(roles, "--method", method, "--beta", str(BETA)) as address:
        found = evaluate(folders, tasks, address, names)
        check_choices(loaded, found["tiny_choice"], beta)
        check_pages(loaded, found["tiny_pages"], beta)
        check_texts(loaded, found["tiny_write"], beta)
        # Prompts may come as text, and several in one request.
        batched = {"tokenized_requests": False, "batch_size": 4, "num_concurrent": 1}
        texts = evaluate(folders, tasks, address, ["tiny_write"], model_args=batched)
        assert [text for ((text,),) in texts["tiny_write"]] == [
            greedy(loaded[0], loaded[1], loaded[1](row["question"]).input_ids, 12, "e", beta)
            for row in OPENINGS
        ]
        several = {"batch_size": 4, "num_concurrent": 1}
        again = evaluate(folders, tasks, address, ["tiny_choice"], model_args=several)
        np.testing.assert_allclose(
            [value for row in again["tiny_choice"] for ((value, _),) in row],
            [value for row in found["tiny_choice"] for ((value, _),) in row],
            atol=1e-4,
        )


def test_searches_generate_and_refuse_likelihoods(folders, tasks, caplog):
    with serving(folders, "--method", "cbs", "--w", "2", "--k", "2", "--l", "3") as address:
        found = evaluate(
            folders, tasks, address, ["tiny_write"], gen_kwargs="temperature=0.7,do_sample=true"
        )
        assert not any("e" in text for ((text,),) in found["tiny_write"])
        # The method rides in the request's body.
        steered = "method=eft,temperature=0,do_sample=false"
        assert evaluate(folders, tasks, address, ["tiny_write"], gen_kwargs=steered)
        with pytest.raises(Exception, match="likelihood|400|422") as told:
            evaluate(folders, tasks, address, ["tiny_choice"])
    assert "likelihood" in caplog.text + str(told.value)
