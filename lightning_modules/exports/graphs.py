"""Models as flat graphs: named tensors in, named tensors out, a batch and lengths of any size.

What remembers the tokens read so far (keys and values of each layer, or the state of an LSTM) goes in as
`past_key_values.*` and comes out as `present.*`, so that a runtime without Python can write token by token. A model is
one graph, an encoder-decoder two: the encoder ends with the keys and values that the decoder's layers look up in it.

Shape suffixes: B rows, T new tokens, P tokens read before, S tokens of a source, H heads, K head size, D width.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from lightning_modules.lstm import LSTMForCausalLM, LSTMState
from lightning_modules.model_folder import LoadedModel

ALL = "past + tokens"
ROWS, PAST, TOKENS = 2, 5, 3
"""Sizes of the example that is traced: all differ, and none is 0 or 1, which tracing takes for constants."""


@dataclass
class Graph:
    """A module over tensors alone, with an example of its inputs and the names of the axes that vary."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: list[str]


class WithoutPast(nn.Module):
    """An encoder, or a head that says labels or spans."""

    def __init__(self, model: PreTrainedModel, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


class WithPast(nn.Module):
    """A decoder whose layers keep keys and values (B, H, P, K)."""

    def __init__(self, model: PreTrainedModel, inputs: list[str]):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        read = dict(zip(self.inputs, tensors, strict=False))
        cache = filled_cache(tensors[len(self.inputs) :])
        found = self.model(**read, past_key_values=cache, use_cache=True)
        return found.logits, *flat(found.past_key_values)


class Recurrent(nn.Module):
    """Our LSTM, which has a state in place of a cache. Without padding: where a row begins is not in the graph."""

    def __init__(self, model: LSTMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, hidden_LBH: Tensor, cell_LBH: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids, past_key_values=LSTMState(hidden_LBH, cell_LBH, tokens=0), use_cache=True)
        return found.logits, found.past_key_values.hidden_LBH, found.past_key_values.cell_LBH


class Encoder(nn.Module):
    """The encoder, as far as the decoder's layers see it: the keys and values (B, H, S, K) that each looks up."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> tuple[Tensor, ...]:
        # One token of the decoder makes them; what else it computes is in no output and falls out of the graph.
        begin_B1 = torch.full_like(input_ids_BS[:, :1], self.model.config.decoder_start_token_id)
        found = self.model(input_ids_BS, attention_mask_BS, decoder_input_ids=begin_B1, use_cache=True)
        return tuple(flat(found.past_key_values.cross_attention_cache))


class Decoder(nn.Module):
    """The decoder of an encoder-decoder, after its encoder."""

    def __init__(self, model: PreTrainedModel, layers: int):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cross, past = tensors[: 2 * self.layers], tensors[2 * self.layers :]
        cache = EncoderDecoderCache(filled_cache(past), filled_cache(cross))
        cache.is_updated = dict.fromkeys(range(self.layers), True)
        # The layers look up keys and values alone; of what those were made of, only the shape is asked.
        unread_BSD = cross[0].new_zeros(*attention_mask_BS.shape, self.model.config.hidden_size)
        found = self.model(
            encoder_outputs=(unread_BSD,),
            attention_mask=attention_mask_BS,
            decoder_input_ids=input_ids_BT,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, *flat(found.past_key_values.self_attention_cache)


def filled_cache(keys_and_values: tuple[Tensor, ...]) -> DynamicCache:
    """Of key, value, key, value … of the layers. Without the config: a sliding window is the mask's affair alone."""
    cache = DynamicCache()
    for layer in range(len(keys_and_values) // 2):
        cache.update(keys_and_values[2 * layer], keys_and_values[2 * layer + 1], layer)
    return cache


def flat(cache: DynamicCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def cache_names(layers: int, kind: str = "") -> list[str]:
    """As the ONNX files of other tools call them, without `past_key_values.` or `present.`."""
    return [f"{layer}.{kind}{part}" for layer in range(layers) for part in ("key", "value")]


def graphs_of(loaded: LoadedModel) -> list[Graph]:
    """The graphs of a model: one, or encoder and decoder. Raises ValueError for a cache of another kind."""
    model = loaded.model
    if loaded.kind == "encoder-decoder":
        return encoder_and_decoder(model)
    if isinstance(model, LSTMForCausalLM):
        return [recurrent(model)]
    if loaded.kind == "causal":
        return [causal(model)]
    return [without_past(model, spans=loaded.kind == "question-answering")]


def without_past(model: PreTrainedModel, spans: bool) -> Graph:
    # BERT and its like mark the second of two texts; not every config has the field.
    marks_second_text = getattr(model.config, "type_vocab_size", 0) > 1
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if marks_second_text else [])
    outputs = ["start_logits", "end_logits"] if spans else ["logits"]
    return Graph(
        "model",
        WithoutPast(model, inputs, outputs),
        # A tensor each: the same one twice would be traced as one input.
        {name: torch.ones(ROWS, TOKENS, dtype=torch.long) for name in inputs},
        {name: {0: "batch", 1: "tokens"} for name in inputs},
        outputs,
    )


def causal(model: PreTrainedModel) -> Graph:
    shapes = kept_shapes(model, {"input_ids": torch.ones(ROWS, TOKENS, dtype=torch.long)})
    mask_BPT = torch.ones(ROWS, PAST + TOKENS, dtype=torch.long)
    inputs = {"input_ids": torch.ones(ROWS, TOKENS, dtype=torch.long), "attention_mask": mask_BPT}
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: ALL}}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(PAST, PAST + TOKENS).repeat(ROWS, 1)
        axes["position_ids"] = axes["input_ids"]
    module = WithPast(model, list(inputs))
    for name, (heads, size) in shapes.items():
        inputs[f"past_key_values.{name}"] = torch.zeros(ROWS, heads, PAST, size)
        axes[f"past_key_values.{name}"] = {0: "batch", 2: "past"}
    return Graph("model", module, inputs, axes, ["logits", *(f"present.{name}" for name in shapes)])


def recurrent(model: LSTMForCausalLM) -> Graph:
    state_LBH = torch.zeros(model.config.num_hidden_layers, ROWS, model.config.hidden_size)
    past = {f"past_key_values.{name}": state_LBH.clone() for name in ("hidden", "cell")}
    axes = {"input_ids": {0: "batch"}} | {name: {1: "batch"} for name in past}
    inputs = {"input_ids": torch.ones(ROWS, 1, dtype=torch.long)} | past
    return Graph("model", Recurrent(model), inputs, axes, ["logits", "present.hidden", "present.cell"])


def encoder_and_decoder(model: PreTrainedModel) -> list[Graph]:
    source_BS, mask_BS = torch.ones(ROWS, 7, dtype=torch.long), torch.ones(ROWS, 7, dtype=torch.long)
    ids_BT = torch.ones(ROWS, TOKENS, dtype=torch.long)
    source = {"input_ids": source_BS, "attention_mask": mask_BS}
    shapes = kept_shapes(model, source | {"decoder_input_ids": ids_BT})
    layers = len(shapes) // 2
    cross = [f"past_key_values.{name}" for name in cache_names(layers, "encoder.")]
    past = [f"past_key_values.{name}" for name in cache_names(layers, "decoder.")]
    both = list(shapes.values())
    inputs = {"input_ids": ids_BT, "encoder_attention_mask": mask_BS}
    inputs |= {name: torch.zeros(ROWS, heads, 7, size) for name, (heads, size) in zip(cross, both, strict=True)}
    inputs |= {name: torch.zeros(ROWS, heads, PAST, size) for name, (heads, size) in zip(past, both, strict=True)}
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "encoder_attention_mask": {0: "batch", 1: "source"}}
    axes |= {name: {0: "batch", 2: "source"} for name in cross} | {name: {0: "batch", 2: "past"} for name in past}
    present = [name.replace("past_key_values", "present") for name in past]
    return [
        Graph("encoder", Encoder(model), source, {name: {0: "batch", 1: "source"} for name in source}, cross),
        Graph("decoder", Decoder(model, layers), inputs, axes, ["logits", *present]),
    ]


def kept_shapes(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Heads and head size of what each layer keeps, by trying; raises ValueError where that is no keys and values."""
    with torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values
    kept = kept.self_attention_cache if isinstance(kept, EncoderDecoderCache) else kept
    layers = kept.layers if isinstance(kept, DynamicCache) else []
    if not layers or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} keeps {type(kept).__name__}, not keys and values of each layer, which onnx, pt2, "
            "pte need; --format hf or safetensors takes any model"
        )
    names = cache_names(len(layers))
    return {name: (t.shape[1], t.shape[3]) for name, t in zip(names, flat(kept), strict=True)}


def trace(graph: Graph, longest: dict[str, int]) -> ExportedProgram:
    """The graph as torch.export sees it. `longest` bounds axes by their name; one of at most 1 does not vary."""
    example = graph.inputs
    for axis, name in ((axis, name) for axes in graph.axes.values() for axis, name in axes.items()):
        if longest.get(name) == 1:
            example = {
                key: t.narrow(axis, 0, 1) if graph.axes[key].get(axis) == name else t for key, t in example.items()
            }
    sizes = {name: size(name, longest) for axes in graph.axes.values() for name in axes.values()}
    shapes = [{axis: sizes[name] for axis, name in graph.axes[key].items() if sizes[name]} for key in example]
    takes = inspect.signature(graph.module.forward).parameters.values()
    named = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in takes)
    with torch.no_grad():
        program = torch.export.export(
            graph.module,
            tuple(example.values()),
            dynamic_shapes=(*shapes[:named], tuple(shapes[named:])) if named < len(shapes) else tuple(shapes),
            strict=False,
        )
    for symbol, bounds in program.range_constraints.items():
        # Tracing takes no length for 0 or 1, and so the sum of two for at least 4.
        program.range_constraints[symbol] = ValueRanges(min(bounds.lower, 1), bounds.upper)
    return program


def size(name: str, longest: dict[str, int]) -> Dim | None:
    """How torch.export is told of an axis that varies; None: it does not."""
    bound = {"max": longest[name]} if name in longest else {}
    if bound == {"max": 1}:
        return None
    if name == ALL:  # a sum of two others cannot be declared as one: it is found
        return Dim.DYNAMIC(min=1, **bound)
    return Dim(name, min=0 if name == "past" else 1, **bound)


def positions_bound(loaded: LoadedModel) -> dict[str, int]:
    """What a model without a cache can read at once; one with a cache checks nothing."""
    limit = loaded.max_positions
    return {"tokens": limit, "source": limit} if limit and loaded.kind != "causal" else {}


def files_of(graphs: list[Graph], path: Path, ending: str) -> list[Path]:
    """Where each graph is: the path itself, or for several of them files in a folder."""
    if len(graphs) == 1:
        return [path]
    path.mkdir(exist_ok=True)
    return [path / f"{graph.name}.{ending}" for graph in graphs]
