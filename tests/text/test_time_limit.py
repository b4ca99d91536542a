import gc
import sys
import threading
from functools import partial

import pytest

from tests.text.chats import chat, template
from w2s_jax.errors import InputError
from w2s_jax.text import chat as chat_module
from w2s_jax.text.chat import TimeUp, within
from w2s_jax.text.tokenizer import train_bpe

LONG = "range(99999)"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a film"], 258))


@pytest.mark.parametrize(
    "jinja",
    [
        f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{% endfor %}}{{% endfor %}}",
        f"{{% for a in {LONG} %}}{{{{ {LONG} | map('string') | join }}}}{{% endfor %}}",
        "{% macro again() %}{% for a in 'ab' %}{{ a }}{% endfor %}{% endmacro %}"
        f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{{{ again() }}}}"
        "{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_an_error(tokenizer, monkeypatch, jinja):
    monkeypatch.setattr(chat_module, "TEMPLATE_SECONDS", 0.05)
    tokenizer.chat_template = jinja
    found = []

    def render():
        with pytest.raises(InputError, match="the chat template fails: it takes longer than 0.05"):
            template(tokenizer).render(chat(("user", "hi")))
        found.append(True)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    render()
    assert found == [True, True]


def test_the_watch_outlasts_the_garbage_collector():
    """Its callbacks are called first once the time is up, and what they raise is ignored."""

    def callback(phase, info):
        return None

    lines = "for again in range(60):\n    sum(range(1_000_000)); collect()"
    body = compile(lines, "<template>", "exec")
    gc.callbacks.append(callback)
    try:
        with pytest.raises(TimeUp), within(0.1):
            exec(body, {"collect": partial(gc.collect, 0)})
    finally:
        gc.callbacks.remove(callback)


def test_a_power_which_nothing_breaks_off_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}\n{{ (9 ** (9 ** 9)) % 7 }}"
    with pytest.raises(InputError, match=r"takes a power \(\*\*\) in line 2, which may not end"):
        template(tokenizer)
    tokenizer.chat_template = "{{ dict(**{'a': messages[0]['content']})['a'] }}"
    assert template(tokenizer).render(chat(("user", "hi"))) == "hi"


def test_what_watched_before_watches_again():
    seen = []

    def tracer(frame, event, argument):
        seen.append(frame.f_code.co_name)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with pytest.raises(TimeUp), within(-1.0):
            sorted([2, 1], key=lambda one: one)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
