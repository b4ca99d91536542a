"""Conversations and templates in short, for tests."""

from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import Conversation, Message

TURNS = (("system", "Be kind."), ("user", "one"), ("assistant", "two"), ("user", "three"))


def text(content):
    return Conversation(text=content)


def chat(*turns):
    return Conversation(messages=tuple(Message(role, content) for role, content in turns))


def template(tokenizer, name="auto"):
    return load_template(tokenizer, name, where="--policy-template")
