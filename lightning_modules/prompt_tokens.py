"""Learning a few vectors in front of every input instead of weights: prompt tuning, https://arxiv.org/abs/2104.08691.

Shape suffixes: B rows, T tokens, P prompt tokens, C width, V vocabulary.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.adapter import TASKS

if TYPE_CHECKING:
    from peft import PeftModel


class PromptedEmbedding(nn.Module):
    """Vectors of ids: below V the model's own, from V on the prompt's. So the network reads a prompt like words, with
    its cache and its positions, and its head, which may share the own vectors, never writes one."""

    def __init__(self, own: nn.Embedding, prompt_P: Tensor):
        """`prompt_P` are the ids that the prompt begins as."""
        super().__init__()
        self.own = own
        self.prompt = nn.Embedding.from_pretrained(own(prompt_P).detach().clone(), freeze=False)

    @property
    def weight(self) -> nn.Parameter:
        return self.own.weight

    @property
    def num_embeddings(self) -> int:
        return self.own.num_embeddings

    @property
    def padding_idx(self) -> int | None:
        return self.own.padding_idx

    def forward(self, ids_BT: Tensor) -> Tensor:
        first = self.own.num_embeddings
        prompt_BTC = self.prompt((ids_BT - first).clamp(min=0))
        return torch.where((ids_BT >= first)[..., None], prompt_BTC, self.own(ids_BT.clamp(max=first - 1)))


def first_ids(asked: int | str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(P,) ids that a prompt begins as: those of a text, or so many that are drawn from the vocabulary."""
    if isinstance(asked, str):
        return torch.tensor(tokenizer(asked, add_special_tokens=False)["input_ids"])
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    return words[torch.randint(len(words), (asked,))]


def put_before(network: PreTrainedModel, prompt_P: Tensor) -> None:
    """Freezes a network and gives it a prompt, which is then all that learns."""
    network.requires_grad_(False)
    network.set_input_embeddings(PromptedEmbedding(network.get_input_embeddings(), prompt_P))


def prompted(network: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network with a prompt reads in place of these inputs."""
    embedding = network.get_input_embeddings()
    rows, count = len(inputs["input_ids"]), embedding.prompt.num_embeddings
    ids_P = torch.arange(count, device=inputs["input_ids"].device) + embedding.num_embeddings
    before = {"input_ids": ids_P.expand(rows, -1), "attention_mask": torch.ones_like(ids_P).expand(rows, -1)}
    return inputs | {name: torch.cat([part, inputs[name]], 1) for name, part in before.items() if name in inputs}


def as_peft(network: PreTrainedModel, auto_class: type) -> "PeftModel":
    """The same as a model of the peft library, whose save_pretrained leaves the prompt alone."""
    from peft import PromptTuningConfig, get_peft_model

    base = copy.deepcopy(network).float()
    embedding = base.get_input_embeddings()
    base.set_input_embeddings(embedding.own)
    config = PromptTuningConfig(
        task_type=TASKS[auto_class.__name__],
        num_virtual_tokens=embedding.prompt.num_embeddings,
        num_transformer_submodules=1,  # of an encoder-decoder the encoder alone
    )
    model = get_peft_model(base, config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(embedding.prompt.weight)
    return model
