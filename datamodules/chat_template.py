"""Conversations as the text that a decoder reads: by the tokenizer's own template, or a plain one."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""Its role (system, user, assistant) and its content."""

PLAIN = (
    "{{ bos_token }}{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""For a tokenizer without a template of its own. It is saved with the tokenizer, so pipelines write the same."""


class Segment(NamedTuple):
    """A piece of a conversation's text that is tokenized by itself, as it is when the model is asked."""

    text: str
    is_answer: bool


def with_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Gives a tokenizer the template of a file, or the plain one where it has none."""
    if asked is not None:
        path = Path(asked).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such file: --data.chat_template {asked}; pass a Jinja template")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--data.chat_template {asked} is not UTF-8 at byte {error.start}; convert it") from None
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN


def prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """What stands before the next answer."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def segments(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Segment]:
    """A conversation that ends with an answer, cut before and after each answer. Raises jinja2.TemplateError where the
    template refuses it.

    What stands between two answers is not rendered alone but cut out of the whole text, whatever the template does. Of
    a template that rewrites earlier turns only the last answer is an answer.
    """
    before_last = prompt(tokenizer, messages[:-1])
    found, done = [], ""
    for i, message in enumerate(messages[:-1]):
        if message["role"] != "assistant" or i == 0:  # a greeting answers nothing
            continue
        before, after = prompt(tokenizer, messages[:i]), _rendered(tokenizer, messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before) and before_last.startswith(after)):
            found, done = [], ""
            break
        found += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    whole = _rendered(tokenizer, messages)
    # A template may open the answer with what it writes only where it asks for one.
    answer = whole[len(before_last) :] if whole.startswith(before_last) else messages[-1]["content"]
    return [*found, Segment(before_last[len(done) :], False), Segment(answer, True)]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)
