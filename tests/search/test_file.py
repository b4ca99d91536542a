"""What is said of a row in several places is one thing."""

from tests.cli.test_search import tiny
from w2s_jax.search import FunctionScorer
from w2s_jax.search.checkpoints import GuideSource, Sources, load, plan
from w2s_jax.search.config import cbs
from w2s_jax.search.file import SteeredPolicy, encode_questions, search_rows
from w2s_jax.text.prompts import INCOMPLETE
from w2s_jax.text.rows import open_journal

ROWS = [{"prompt": "A film of Ω"}, {"prompt": "the sea é"}, {"prompt": "We"}]


def lineage(chunks):
    """The texts that the chunks added to the best hypothesis, first to last."""
    texts, place = [], 0
    for chunk in reversed(chunks):
        one = next(one for one in chunk["candidates"] if one["kept"] == place)
        texts.append(one["text"])
        place = one["parent"]
    return texts[::-1]


def test_a_response_has_one_text_wherever_it_is_read(tmp_path):
    """In the output, to scorers of texts, in chunks of the trace, and in its tokens."""
    folders = [tiny(tmp_path / role, seed) for seed, role in enumerate(("policy", "up", "down"))]
    planned = plan(Sources(folders[0], (GuideSource(*folders[1:]),)))
    seen = set()

    def watch(prompts, responses):
        seen.update(zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    steering = load(planned, dtype="float32").beside([FunctionScorer(watch)], ["watch"])
    config = cbs(2, 2, 3, max_new_tokens=12, stop=("q",), eos_ids=planned.eos_ids)
    questions = encode_questions(planned, ROWS, "row", max_new_tokens=12)
    journal = open_journal(tmp_path / "rows.journal", {})
    search_rows(SteeredPolicy(planned, steering, config), questions, journal, traced=True)
    for index, row in journal.read().items():
        response, trace = row["response"], row["trace"]
        assert (ROWS[index]["prompt"], response) in seen
        assert trace["response"] == response
        assert "".join(lineage(trace["chunks"])) == response
        tokens = "".join(text for text, _ in trace["tokens"])
        assert tokens.partition("q")[0].rstrip(INCOMPLETE) == response.rstrip(INCOMPLETE)
    assert response
