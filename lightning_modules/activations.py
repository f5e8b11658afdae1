"""What a network makes inside while it reads: hidden states of its layers, and their queries, keys and values.

Shape suffixes: B rows, T positions, C width, W width of all heads together.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

LAYER = re.compile(r"\.(layers|layer|h|blocks|block)\.(\d+)\.")
"""In the name of a weight, the layer that it belongs to."""
QKV = (
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj")),
    *(("q_lin", "k_lin", "v_lin"), ("q", "k", "v")),
)
FUSED_QKV = ("c_attn", "Wqkv", "qkv_proj", "query_key_value")
"""The three in one matrix."""
IN_A_ROW = {"dbrx", "gpt2", "modernbert", "modernbert-decoder", "mpt", "openai-gpt", "phi3", "phi4_multimodal"}
"""By a config's model_type: all queries, then all keys, then all values."""
BY_HEAD = {"bloom", "gpt_neox", "gpt_neox_japanese", "persimmon"}
"""Of one head after another its query, key and value."""
CROSS = re.compile(r"encoder_attn|EncDecAttention|crossattention|cross_attn")


class Heads(NamedTuple):
    """What the attention of a layer is made of, before rotary positions and norms."""

    queries_BTW: Tensor
    keys_BTW: Tensor
    """Narrower than the queries where several heads share them; so are the values."""
    values_BTW: Tensor
    size: int
    """Of one head."""


class Stack:
    """Layers, one behind the other."""

    def __init__(self) -> None:
        self.depth = 0
        self.hidden: dict[int, Tensor] = {}
        """(B, T, C): at i what layer i, counted from 0, reads, and at `depth` what the last one makes."""
        self.heads: dict[int, Heads] = {}


class Activations:
    """Made once for a network; what a forward pass inside of `taken()` makes is there until its end. Raises ValueError
    for layers by names that are not known."""

    def __init__(self, network: PreTrainedModel):
        self.stacks: dict[str, Stack] = {}
        """An encoder-decoder has an "encoder" and a "decoder"; others have "layers"."""
        self._on = False
        config = network.config.get_text_config()
        for name, module in network.named_modules():
            found = LAYER.search(f"{name}.")
            if found is None or found.end() != len(name) + 1:  # a layer's part, which may have a number, too
                continue
            two = network.config.is_encoder_decoder
            key = ("decoder" if re.search(r"\bdecoder\.", name) else "encoder") if two else "layers"
            stack, i = self.stacks.setdefault(key, Stack()), int(found[2])
            stack.depth = max(stack.depth, i + 1)
            if i == 0:
                self._watch_input(module, stack)
            self._watch(module, lambda output, stack=stack, i=i: stack.hidden.__setitem__(i + 1, output))
            self._watch_heads(module, stack, i, config)
        if not self.stacks:
            raise ValueError(f"the layers of {type(config).__name__} are not known by name; leave --model.inner out")

    def _watch(self, module: nn.Module, note: Callable[[Tensor], None]) -> None:
        def hook(module, args, output) -> None:
            if self._on:
                note(output if isinstance(output, Tensor) else output[0])

        module.register_forward_hook(hook)

    def _watch_input(self, module: nn.Module, stack: Stack) -> None:
        def hook(module, args, kwargs) -> None:
            if self._on:
                stack.hidden[0] = args[0] if args else kwargs["hidden_states"]

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _watch_heads(self, layer: nn.Module, stack: Stack, i: int, config: PreTrainedConfig) -> None:
        for name, module in layer.named_modules():
            children = {} if CROSS.search(name) else dict(module.named_children())
            for names in QKV:
                if all(part in children for part in names):
                    parts: dict[int, Tensor] = {}
                    for place, part in enumerate(names):
                        self._watch(children[part], self._gatherer(stack, i, place, parts, config))
                    return
            for part in FUSED_QKV:
                if part in children and (is_by_head := has_by_head(config)) is not None:
                    self._watch(children[part], self._splitter(stack, i, config, is_by_head))
                    return

    def _gatherer(self, stack: Stack, i: int, place: int, parts: dict[int, Tensor], config: PreTrainedConfig):
        def note(output: Tensor) -> None:
            parts[place] = output
            if len(parts) == 3:
                queries, keys, values = (parts.pop(place) for place in range(3))
                stack.heads[i] = Heads(queries, keys, values, head_size(config))

        return note

    def _splitter(self, stack: Stack, i: int, config: PreTrainedConfig, is_by_head: bool):
        def note(output: Tensor) -> None:
            size = head_size(config)
            width = size * config.num_attention_heads
            if is_by_head:
                parts = (part.flatten(-2) for part in output.unflatten(-1, (-1, 3 * size)).split(size, -1))
            else:
                shared = (output.shape[-1] - width) // 2
                parts = output.split([width, shared, shared], -1)
            stack.heads[i] = Heads(*parts, size)

        return note

    @contextmanager
    def taken(self) -> Iterator[dict[str, Stack]]:
        self._on = True
        try:
            yield self.stacks
        finally:
            self._on = False
            for stack in self.stacks.values():
                stack.hidden, stack.heads = {}, {}


def has_by_head(config: PreTrainedConfig) -> bool | None:
    """How queries, keys and values lie in one matrix; None where it is not known."""
    if config.model_type == "gpt_bigcode":
        return not config.multi_query
    return config.model_type in BY_HEAD if config.model_type in IN_A_ROW | BY_HEAD else None


def head_size(config: PreTrainedConfig) -> int:
    """Of a config that says it, or whose heads share the width evenly."""
    said = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return said or config.hidden_size // config.num_attention_heads
