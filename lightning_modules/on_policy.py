"""Rows that a student writes itself, for its teacher to judge: GKD, https://arxiv.org/abs/2306.13649.

Shape suffixes: B rows, U positions that are written, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lightning_modules.exact_step import micro_batch_seed


@dataclass
class OnPolicy:
    """What is drawn follows from the run's seed and the row's number, however a step is cut.

    Args:
        share: Of the rows, 0 to 1, that the student writes; the others are the data's.
        prompt_tokens: Tokens of a row of text that are given. Left out: a quarter of the row. Examples have prompts.
        temperature: Of the student's sampling.
    """

    share: float = 0.5
    prompt_tokens: int | None = None
    temperature: float = 1.0

    def require_range(self, tokens: int) -> None:
        """Raises ValueError for what cannot be drawn in rows of so many tokens."""
        if not 0 < self.share <= 1 or not self.temperature > 0:
            raise ValueError(
                f"--model.on_policy.share {self.share}, .temperature {self.temperature}: pass a share up to 1, T > 0"
            )
        if self.prompt_tokens is not None and not 0 < self.prompt_tokens < tokens:
            raise ValueError(f"--model.on_policy.prompt_tokens is {self.prompt_tokens}; a row has {tokens} tokens")

    def numbers(self, seed: int, rows_B: Tensor, count: int) -> Tensor:
        """(B, 1 + count) uniform random numbers of each row: the first decides who writes it."""
        generator, drawn = torch.Generator(), []
        for row in rows_B.tolist():
            generator.manual_seed(micro_batch_seed(~seed, row))
            drawn.append(torch.rand(1 + count, generator=generator, dtype=torch.float64))
        return torch.stack(drawn)


@torch.no_grad()
def write(
    network: PreTrainedModel,
    prompts: dict[str, Tensor],
    numbers_BU: Tensor,
    words: int,
    temperature: float,
    settings: GenerationConfig,
) -> Tensor:
    """(B, …) ids: prompts and what the network writes after them, drawn by one random number a place, in eval mode."""
    was_training, own = network.training, network.generation_config
    drawn = LogitsProcessorList([ByNumbers(numbers_BU, words, temperature)])
    network.eval()
    network.generation_config = settings  # by which generate() would fill what is left open, such as where to end
    try:
        return network.generate(**prompts, generation_config=settings, logits_processor=drawn)
    finally:
        network.generation_config = own
        network.train(was_training)


class ByNumbers(LogitsProcessor):
    """Leaves one word: where the cumulated probability passes the row's next number. Draws that are a row's own, which
    torch's generator does not have."""

    def __init__(self, numbers_BU: Tensor, words: int, temperature: float):
        self.numbers_BU, self.words, self.temperature = numbers_BU, words, temperature
        self.place = 0

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        scaled_BV = scores_BV[:, : self.words].double() / self.temperature
        cumulated_BV = scaled_BV.softmax(-1).cumsum(-1)
        number_B1 = self.numbers_BU[:, self.place : self.place + 1].to(cumulated_BV.device)
        word_B1 = torch.searchsorted(cumulated_BV, number_B1 * cumulated_BV[:, -1:], right=True)
        self.place += 1
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, word_B1.clamp_(max=self.words - 1), 0.0)
