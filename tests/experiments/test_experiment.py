import json

import numpy as np
import pytest

from tests.demo.test_run import stand_in
from tests.tiny import tiny_model
from w2s_jax.errors import InputError
from w2s_jax.experiments.sentiment import (
    EvaluationConfig,
    best_of_n_bound,
    decode_all,
    draw_experiment,
    draw_prompts,
    experiment_methods,
    responses_path,
    result_table,
    summarise_experiment,
    summed_logprobs,
)
from w2s_jax.search.likelihood import Response
from w2s_jax.search.methods import EFTProposer, PolicyProposer
from w2s_jax.search.models import Guide
from w2s_jax.text.prompts import encode_prompt

METHODS = ("base", "bon", "eft", "cbs", "tuned_policy")
HEADINGS = {name: f"<{name}>" for name in METHODS}
CONFIG = EvaluationConfig(
    prompts=3, new_tokens=4, beam_width=2, successors=2, chunk_length=2, samples=3, slots=2, block=2
)
PROMPTS = ["A film", "We saw the sea", "The film of"]


def rows(gold, logprobs, lengths, ratios=None):
    return [
        {
            "prompt": "x", "response": "y", "tokens": [0] * length, "score": 0.0,
            "gold_reward": reward, "logprob": logprob, "log_ratio": ratio,
        }
        for reward, logprob, length, ratio in zip(
            gold, logprobs, lengths, ratios or [None] * len(gold), strict=True
        )
    ]  # fmt: skip


def three_methods():
    return {
        "base": rows([0.0, 2.0], [-4.0, -6.0], [2, 2], [0.0, 0.0]),
        "bon": rows([1.0, 3.0], [-4.0, -8.0], [4, 2]),
        "tuned_policy": rows([4.0, 4.0], [-10.0, -30.0], [5, 5], [2.0, 6.0]),
    }


def test_figures_are_means_over_prompts_with_their_standard_errors():
    summary = summarise_experiment(three_methods(), HEADINGS, samples=16)
    assert (summary["prompts"], summary["samples"]) == (2, 16)
    assert list(summary["methods"]) == ["base", "bon", "tuned_policy"]
    base, bon, direct = summary["methods"].values()
    assert base["gold_reward"] == {"mean": 1.0, "stderr": pytest.approx(1.0)}
    assert base["kl"] == {"mean": 0.0, "stderr": 0.0}
    # By hand: (−4/4 − 8/2)/2, and half the difference of the two.
    assert bon["logprob_per_token"] == {"mean": -2.5, "stderr": pytest.approx(1.5)}
    assert bon["logprob"] == {"mean": -6.0, "stderr": pytest.approx(2.0)}
    assert bon["tokens"] == {"mean": 3.0, "stderr": pytest.approx(1.0)}
    assert bon["kl"] is None
    assert bon["kl_bound"] == pytest.approx(1.8351, abs=1e-4)
    assert direct["kl"] == {"mean": 4.0, "stderr": pytest.approx(2.0)}
    assert "kl_bound" not in base
    assert "kl_bound" not in direct


def test_differences_are_paired_by_prompt_with_base_and_best_of_n():
    paired = summarise_experiment(three_methods(), HEADINGS, samples=16)["paired"]
    assert list(paired) == ["bon-base", "tuned_policy-base", "tuned_policy-bon"]
    figures = {
        name: (row["difference"], row["difference_stderr"], row["win_rate"])
        for name, row in paired.items()
    }
    assert figures == {
        "bon-base": (1.0, 0.0, 1.0),
        "tuned_policy-base": (3.0, pytest.approx(1.0), 1.0),
        "tuned_policy-bon": (2.0, pytest.approx(1.0), 1.0),
    }


def test_the_bound_of_best_of_n_is_the_exact_divergence_of_a_continuous_choice():
    # The best of N uniform draws has the density N·u^(N−1): its KL from the uniform one.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 4, 16):
        density = n * u ** (n - 1)
        assert best_of_n_bound(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_the_table_holds_every_method_with_its_errors():
    table = result_table(summarise_experiment(three_methods(), HEADINGS, samples=16))
    head, rule, *lines = table.splitlines()
    assert head.split(" | ")[3] == "over best-of-16"
    assert rule.count("---") == 7
    assert lines == [
        "| <base> | +1.00 ± 1.00 |  |  | -2.50 ± 0.50 | -5.0 ± 1.0 | 0 |",
        "| <bon> | +2.00 ± 1.00 | +1.00 ± 0.00 |  | -2.50 ± 1.50 | -6.0 ± 2.0 | ≤ 1.8 |",
        "| <tuned_policy> | +4.00 ± 0.00 | +3.00 ± 1.00 | +2.00 ± 1.00 | -4.00 ± 2.00 "
        "| -20.0 ± 10.0 | 4.0 ± 2.0 |",
    ]


def test_the_figure_has_two_panels_of_bars_and_the_upper_line(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    saved = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), saved(self, *a, **k))
    )
    summary = summarise_experiment(three_methods(), HEADINGS, samples=16)
    assert draw_experiment(summary)[:8] == b"\x89PNG\r\n\x1a\n"
    left, right = kept[0].axes
    assert [bar.get_width() for bar in left.patches] == [1.0, 2.0, 4.0]
    assert [bar.get_width() for bar in right.patches] == [-2.5, -2.5, -4.0]
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "<base>",
        "<bon>",
        "<tuned_policy>",
    ]
    assert 4.0 in [line.get_xdata()[0] for line in left.lines]
    assert left.yaxis_inverted()
    assert right.yaxis_inverted()


def test_prompts_are_openings_of_reviews_drawn_by_the_seed():
    texts = [f"review {i} says this of it" for i in range(50)]
    config = EvaluationConfig(prompts=20, words=3)
    prompts = draw_prompts(config, texts)
    assert prompts == draw_prompts(config, texts)
    assert len(set(prompts)) == 20
    assert all(prompt in {f"review {i} says" for i in range(50)} for prompt in prompts)
    numbers = [int(prompt.split()[1]) for prompt in prompts]
    assert numbers != sorted(numbers)
    assert max(numbers) > 30
    with pytest.raises(InputError, match="prompts is 51, and there are 50 test reviews"):
        draw_prompts(EvaluationConfig(prompts=51), texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 1}, "prompts is 1; it must be at least 2"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ],
)
def test_settings_out_of_range_are_told(change, message):
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**change)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def logprobs_by_hand(logits, tokens, start):
    """log p of `tokens`, the first predicted at `start`, from logits [X, V]."""
    return sum(log_softmax(logits)[place, token] for place, token in enumerate(tokens, start))


def test_log_probs_are_those_of_the_tempered_mixture():
    shape = {"vocab_size": 300, "eos_ids": (0,), "max_positions": 64, "layers": 1}
    policy, tuned, untuned = (tiny_model(seed, sharpness=6.0, **shape) for seed in range(3))
    prompt, tokens = (5, 6, 7), (8, 9, 0)
    read = np.array([[*prompt, *tokens[:-1]]])
    p, t, u = (log_softmax(model(read)[0]) for model in (policy, tuned, untuned))
    asked = [Response((prompt,), tokens)]
    guide = Guide(tuned, untuned)
    for temperature in (1.0, 0.7):
        found = summed_logprobs(policy, None, PolicyProposer(), asked, temperature)
        assert found == pytest.approx([logprobs_by_hand(p / temperature, tokens, 2)], abs=1e-4)
        found = summed_logprobs(policy, guide, EFTProposer(1.5), asked, temperature)
        mixed = (p + 1.5 * (t - u)) / temperature
        assert found == pytest.approx([logprobs_by_hand(mixed, tokens, 2)], abs=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def decoded(models, tmp_path_factory):
    """(folder, journals and rows by method), the directly tuned policy being the tuned model."""
    folder = tmp_path_factory.mktemp("evaluation")
    methods = experiment_methods(CONFIG, models, models.tuned)
    return folder, decode_all(CONFIG, models, methods, PROMPTS, folder, {"weights": "a"})


@pytest.mark.slow
def test_every_method_answers_every_prompt_and_is_measured(models, decoded):
    _, found = decoded
    assert tuple(found) == METHODS
    for name, (_, answers) in found.items():
        assert [row["prompt"] for row in answers] == PROMPTS
        for row in answers:
            assert 1 <= len(row["tokens"]) <= 4
            assert row["logprob"] < 0
            if name in ("bon", "cbs"):
                assert row["log_ratio"] is None
            asked = [
                Response(
                    (tuple(encode_prompt(models.tokenizer, row["prompt"])),), tuple(row["tokens"])
                )
            ]
            plain = PolicyProposer()
            at = {
                model: summed_logprobs(getattr(models, model), None, plain, asked, temperature)[0]
                for model, temperature in (("policy", 0.7), ("tuned", 0.7))
            }
            if name == "base":
                assert row["log_ratio"] == 0.0
            if name == "tuned_policy":
                assert row["log_ratio"] == pytest.approx(at["tuned"] - at["policy"], abs=1e-4)
    summary = summarise_experiment(
        {name: answers for name, (_, answers) in found.items()}, HEADINGS, samples=3
    )
    assert len(summary["paired"]) == 4 + 3
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.slow
def test_decoding_goes_on_where_it_was_killed_and_refuses_other_weights(models, decoded):
    folder, found = decoded
    journals = [journal.path for journal, _ in found.values()]
    whole = [path.read_bytes() for path in journals]
    # Two rows of CBS are left, and half of a third; the directly tuned policy has none.
    lines = whole[3].splitlines(keepends=True)
    journals[3].write_bytes(b"".join(lines[:3]) + lines[3][:20])
    journals[4].unlink()
    methods = experiment_methods(CONFIG, models, models.tuned)
    again = decode_all(CONFIG, models, methods, PROMPTS, folder, {"weights": "a"})
    for name in METHODS:
        for row, other in zip(again[name][1], found[name][1], strict=True):
            assert row["tokens"] == other["tokens"]
            assert row["gold_reward"] == pytest.approx(other["gold_reward"], abs=1e-5)
    with pytest.raises(InputError, match="weights: 'a' there, 'b' here"):
        decode_all(CONFIG, models, methods, PROMPTS, folder, {"weights": "b"})
    assert responses_path(folder, "cbs") == folder / "responses" / "cbs.jsonl"
