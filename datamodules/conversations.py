"""A conversation as the tokens that a decoder reads, and which of them it learns."""

from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from datamodules.base import IGNORED
from datamodules.chat_template import Message, segments

Learnt = Literal["answers", "last_answer", "all"]


class Encoded(NamedTuple):
    """An example in numbers."""

    input_ids: list[int]
    labels: list[int]
    """Of a decoder: what each input has to predict. Of an encoder-decoder: what is to be written."""
    prompt_length: int
    """Inputs before the last answer."""
    label_bytes: int
    """UTF-8 bytes of the text that the labels stand for."""


class Tokens(NamedTuple):
    """All before the last answer, and the answer with its end of text."""

    prompt: list[int]
    is_answer: list[bool]
    """Of each token of the prompt: whether it belongs to an earlier answer or is its end."""
    answer: list[int]


class Conversations:
    """Encodes them one by one, and counts what had to be cut off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learn: Learnt, max_length: int, max_target_length: int):
        self.tokenizer, self.learn = tokenizer, learn
        self.max_length, self.max_target_length = max_length, max_target_length
        self.prompts_cut = self.answers_cut = 0

    def encoded(self, messages: list[Message], answer: str, room: int = 0) -> Encoded:
        """`room` is kept free behind the prompt, at least. Raises ValueError or jinja2.TemplateError where the
        conversation cannot be read."""
        tokens = self._fitted(messages, answer, room)
        ids = tokens.prompt + tokens.answer
        learnt = [self.learn == "all" or (self.learn == "answers" and is_answer) for is_answer in tokens.is_answer]
        learnt += [True] * len(tokens.answer)
        labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
        text = self.tokenizer.decode([token for token in labels if token != IGNORED], skip_special_tokens=True)
        # The last token, an end of text, predicts nothing, and the first is predicted by nothing.
        return Encoded(ids[:-1], labels[1:], len(tokens.prompt), len(text.encode()))

    def _fitted(self, messages: list[Message], answer: str, room: int) -> Tokens:
        """At most max_length tokens: the longest messages are shortened at their ends, and where that is not enough the
        answer, but for its end."""
        tokens = self._tokens(messages, answer)
        if len(tokens.answer) > self.max_target_length:
            self.answers_cut += 1
            tokens = tokens._replace(answer=shortened(tokens.answer, self.max_target_length))
        needed = max(room, len(tokens.answer))
        self.prompts_cut += len(tokens.prompt) + needed > self.max_length
        messages = list(messages)
        while (excess := len(tokens.prompt) + needed - self.max_length) > 0:
            lengths = [len(message["content"]) for message in messages]
            if not any(lengths):
                break
            i = lengths.index(max(lengths))
            content = self.tokenizer(messages[i]["content"], add_special_tokens=False, verbose=False)["input_ids"]
            kept = self.tokenizer.decode(content[: max(0, len(content) - excess)], skip_special_tokens=True)
            messages[i] = messages[i] | {"content": kept if len(kept) < lengths[i] else ""}
            tokens = self._tokens(messages, answer)._replace(answer=tokens.answer)
        left = self.max_length - len(tokens.prompt)
        if left < 1:
            raise ValueError(
                f"what stands around its {len(messages)} messages alone has {len(tokens.prompt)} tokens, and "
                f"--data.max_length is {self.max_length}"
            )
        if len(tokens.answer) > left:
            self.answers_cut += 1
            tokens = tokens._replace(answer=shortened(tokens.answer, left))
        return tokens

    def _tokens(self, messages: list[Message], answer: str) -> Tokens:
        """The prompt is tokenized as a whole and the answer alone, as it is when the model is asked."""
        pieces = segments(self.tokenizer, [*messages, {"role": "assistant", "content": answer}])
        texts = ["".join(piece.text for piece in pieces[:-1]), pieces[-1].text]
        settings = {"add_special_tokens": False, "verbose": False}
        if not self.tokenizer.is_fast and len(pieces) > 2 and self.learn == "answers":
            raise ValueError("the tokenizer knows no places in the text; pass --data.learn last_answer")
        encoded = self.tokenizer(texts, return_offsets_mapping=self.tokenizer.is_fast, **settings)
        prompt, last = encoded["input_ids"]
        end = self.tokenizer.eos_token_id
        is_answer, begin = [False] * len(prompt), 0
        for piece in pieces[:-1]:
            stop = begin + len(piece.text)
            if piece.is_answer and self.tokenizer.is_fast:
                places = encoded["offset_mapping"][0]
                inside = [i for i, (start, _) in enumerate(places) if begin <= start < stop]
                ends = [i for i in inside if prompt[i] == end]
                for i in inside:  # line ends behind an end of text are nobody's to write
                    is_answer[i] = not ends or i <= ends[-1]
            begin = stop
        while end in last and last[-1] != end:
            last = last[:-1]
        return Tokens(prompt, is_answer, last if last[-1:] == [end] else [*last, end])


def shortened(answer: list[int], most: int) -> list[int]:
    """At most so many tokens, the end of text among them."""
    return answer if len(answer) <= most else [*answer[: most - 1], answer[-1]]
