from dataclasses import replace

import pytest

from tests.serve.tiny_server import CHAT, POSITIONS, served_at
from w2s_jax.search.scorers import FunctionScorer
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.jobs import Reader, capacity_for, prefix_for
from w2s_jax.serve.schema import ApiError, Chat, Completion
from w2s_jax.text.chat import load_template

CONFIG = ServeConfig(method="cbs", most_rows=16, most_tokens=64, most_prompts=4)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_at(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def reader(served):
    return Reader(served, CONFIG)


def ask(reader, **fields):
    return reader.completion(Completion(**({"model": "m", "prompt": "The sea"} | fields)))


def refused(reader, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(reader, **fields)
    return caught.value


def test_a_prompt_becomes_a_job_of_the_defaults(reader, served):
    (job,) = ask(reader)
    ids = tuple(served.tokenizer("The sea").input_ids)
    assert (job.prompt, job.method, job.choices) == (ids, "cbs", 1)
    request, program = job.request, job.program
    assert (request.limit, request.temperature, request.beta) == (50, 0.7, 1.0)
    config = program.config
    assert (config.beam_width, config.successors, config.length) == (4, 4, 5)
    assert (config.sampling.top_k, config.sampling.top_p) == (50, 1.0)
    assert (config.max_new_tokens, program.prefix) == (64, 64)


def test_numbers_compile_nothing_and_shapes_do(reader):
    (usual,) = ask(reader)
    numbers = {"seed": 3, "temperature": 0.1, "beta": 2.5, "max_tokens": 40, "row_id": 9}
    assert ask(reader, **numbers)[0].program == usual.program
    for shape in ({"w": 2}, {"k": 2}, {"l": 3}, {"method": "bon"}, {"top_p": 0.5}, {"stop": "x"}):
        assert ask(reader, **shape)[0].program != usual.program


def test_prompts_of_every_form(reader, served):
    ids = list(served.tokenizer("The sea").input_ids)
    for prompt, count in (
        ("a", 1),
        (ids, 1),
        (["a", "b"], 2),
        ([ids, ids[:2]], 2),
        (["a", ids], 2),
    ):
        jobs = ask(reader, prompt=prompt)
        assert len(jobs) == count
    assert ask(reader, prompt=ids)[0].prompt == ask(reader)[0].prompt == tuple(ids)
    assert ask(reader, prompt="")[0].prompt


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [["a"]], {}, 3, [1.5], ["a", 3], [True], [[1, "a"]], [-1], [10**9], [2**70]],
)
def test_prompts_of_no_form(reader, prompt):
    assert refused(reader, prompt=prompt).status == 400


def test_draws_of_several_prompts_do_not_overlap(reader):
    jobs = ask(reader, prompt=["a", "b", "a"], method="sample", n=3, lane=2)
    assert [job.request.lane for job in jobs] == [2, 5, 8]
    own = ask(reader, prompt=["a", "b"], row_id=[4, 5], position=[0, 8], lane=[1, 1])
    assert [(j.request.row_id, j.request.position, j.request.lane) for j in own] == [
        (4, 0, 1),
        (5, 8, 1),
    ]
    assert refused(reader, prompt=["a", "b"], row_id=[4]).param == "row_id"


def test_a_seed_is_drawn_where_none_is_given(reader):
    assert len({ask(reader)[0].request.seed for _ in range(8)}) > 1
    assert ask(reader, seed=5)[0].request.seed == 5


def test_seeds_of_64_bits_are_told_apart(reader):
    wide = (-1, -(2**63), 2**32, 2**32 + 1, 2**63 - 1, 2**64 - 1)
    found = {ask(reader, seed=seed)[0].request.seed for seed in (0, 1, 2**32 - 1, *wide)}
    assert len(found) == 9
    assert all(0 <= seed < 2**32 for seed in found)
    assert ask(reader, seed=2**32 - 1)[0].request.seed == 2**32 - 1


def test_streams_come_in_pieces_of_a_few_tokens(reader, served):
    for method in ("sample", "eft"):
        (job,) = ask(reader, method=method, max_tokens=50)
        assert job.program.config.length == 4


def test_methods_and_their_sizes(reader):
    assert ask(reader, method="bon")[0].program.config.beam_width == 16
    assert ask(reader, method="bon", k=6, n=6)[0].program.config.beam_width == 6
    assert ask(reader, method="sample", n=3)[0].program.config.beam_width == 3
    assert refused(reader, method="bon", w=2).param == "w"
    assert refused(reader, n=5).status == 400
    assert refused(reader, w=5, k=5).status == 400
    assert refused(reader, method="eft", n=17).status == 400
    assert refused(reader, best_of=3).param == "best_of"
    assert ask(reader, best_of=1)


@pytest.mark.parametrize("method", ["cbs", "ivg", "bon"])
@pytest.mark.parametrize("field", ["logprobs", "echo"])
def test_methods_without_a_likelihood_say_so(reader, method, field):
    error = refused(reader, method=method, **{field: 1 if field == "logprobs" else True})
    assert (error.status, error.param) == (400, field)
    assert "no likelihood" in error.message
    assert "sample" in error.message


def test_a_server_without_a_guide_samples_only(served):
    alone = replace(served, models=replace(served.models, guides=()))
    reader = Reader(alone, ServeConfig(method="sample"))
    assert ask(reader)[0].method == "sample"
    for method in ("cbs", "ivg", "bon", "eft"):
        assert "needs a guide" in refused(reader, method=method).message


def test_a_guide_of_texts_cannot_mix_logits(served):
    scorer = FunctionScorer(lambda prompts, responses: [0.0] * len(prompts))
    alone = replace(served, models=replace(served.models, guides=()), scorers=(scorer,))
    reader = Reader(alone, ServeConfig(method="cbs"))
    assert ask(reader)[0].method == "cbs"
    assert "vocabulary" in refused(reader, method="eft").message


def test_lengths_are_limited_by_server_and_models(reader):
    assert refused(reader, max_tokens=65).status == 400
    error = refused(reader, prompt=[5] * (POSITIONS - 9), max_tokens=10)
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    # Clients look for these words.
    assert f"maximum context length is {POSITIONS} tokens" in error.message
    assert f"you requested {POSITIONS + 1} tokens" in error.message
    # What was not asked for gives way.
    assert ask(reader, prompt=[5] * (POSITIONS - 9))[0].request.limit == 9
    assert refused(reader, prompt=[5] * POSITIONS).status == 400
    assert refused(reader, prompt=["a"] * 5).status == 400
    assert refused(reader, max_tokens=0).status == 400
    assert refused(reader, max_tokens=0, method="sample").status == 400


def test_scoring_alone_needs_no_program(reader):
    (job,) = ask(reader, max_tokens=0, method="sample", echo=True, logprobs=1)
    assert (job.generates, job.echo, job.logprobs) == (False, "The sea", 1)
    (job,) = ask(reader, prompt=[5, 6], max_tokens=1, method="eft", echo=True, logprobs=1)
    assert job.program.config.max_new_tokens == 1


def test_special_tokens_as_stop_strings_are_ids(reader):
    (job,) = ask(reader, stop=["<|endoftext|>", "<|pad|>", "x"])
    assert job.request.stop == ("x",)
    assert job.program.config.eos_ids == (0, 1)


def test_chats_go_through_the_template(reader, served):
    def chat(**fields):
        messages = [{"role": "user", "content": "Hi {x}"}]
        return reader.chat(Chat(**({"model": "m", "messages": messages} | fields)))

    (job,) = chat(max_completion_tokens=7)
    assert served.tokenizer.decode(job.prompt) == "<user>Hi {x}\n<assistant>"
    assert job.request.limit == 7
    (job,) = chat(
        messages=[{"role": "developer", "content": "b"}, {"role": "user", "content": "c"}]
    )
    assert served.tokenizer.decode(job.prompt).startswith("<system>b\n")
    thinks = {"chat_template_kwargs": {"enable_thinking": False}}
    template = CHAT + "{% if enable_thinking is false %}<quick>{% endif %}"
    quick = replace(served, template=replace(served.template, jinja=template))
    body = Chat(model="m", messages=[{"role": "user", "content": "a"}], **thinks)
    (job,) = Reader(quick, ServeConfig(method="cbs")).chat(body)
    assert served.tokenizer.decode(job.prompt).endswith("<assistant><quick>")
    assert job.request.conversation.template_args == {"enable_thinking": False}
    for wrong in (
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"top_logprobs": 2, "method": "sample"},
        {"messages": [{"role": "assistant", "content": "c"}]},
        {"stream_options": {"include_usage": True}},
    ):
        with pytest.raises(ApiError) as caught:
            chat(**wrong)
        assert caught.value.status == 400
    (job,) = chat(logprobs=True, method="sample")
    assert job.logprobs == 0


def test_a_policy_without_a_chat_template_says_so(served):
    bare = replace(served, template=replace(served.template, jinja=None))
    with pytest.raises(ApiError, match="chat template"):
        Reader(bare, ServeConfig(method="cbs")).chat(
            Chat(model="m", messages=[{"role": "user", "content": "a"}])
        )


def test_guides_may_read_templates_of_their_own(served):
    own = load_template(served.tokenizer, "zephyr", where="test")
    reader = Reader(replace(served, guide_templates=(own, None)), ServeConfig(method="cbs"))
    (job,) = ask(reader)
    policy, tuned, untuned = job.request.prompts
    assert policy == untuned == tuple(served.tokenizer("The sea").input_ids)
    assert "<|user|>\nThe sea" in served.tokenizer.decode(tuned)
    assert refused(reader, method="eft", echo=True, logprobs=1).param == "echo"


@pytest.mark.parametrize(
    ("tokens", "capacity", "prefix"), [(1, 1, 64), (2, 16, 64), (17, 32, 64), (66, 100, 128)]
)
def test_rooms_are_few(tokens, capacity, prefix):
    assert capacity_for(tokens, 100) == capacity
    assert prefix_for(tokens) == prefix
    assert prefix_for(65) == 64
