"""One way to ask a model, whether transformers runs it or the runtime of an export: a prompt, then token by token.

Shape suffixes: B rows, T tokens, V vocabulary, or labels, or positions of a span.
"""

import copy
import inspect
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.exports.graphs import Graph
from lightning_modules.lstm import LSTMForCausalLM
from lightning_modules.model_folder import Head, LoadedModel

Batch = dict[str, Tensor]
"""input_ids and attention_mask (B, T), and what else the tokenizer gives."""

Run = Callable[[str, dict[str, np.ndarray]], tuple[list[np.ndarray], float]]
"""Runs a graph by its name: its outputs, and the seconds that took."""


class Answer(NamedTuple):
    """Logits (B, T, V), of labels (B, V), of a span's begin and end (B, 2, V); what `step` goes on from."""

    logits: Tensor
    state: object
    seconds: float


class Answering(Protocol):
    def begin(self, batch: Batch) -> Answer:
        """Reads a prompt, padded on the left, or on the right where the model does not write."""

    def step(self, ids_BT: Tensor, state: object) -> Answer:
        """Reads the tokens that come next, and leaves `state` as it was."""


def writes(kind: Head) -> bool:
    return kind in ("causal", "encoder-decoder")


def positions(mask_BT: Tensor) -> Tensor:
    """(B, T): the place of each token among those of its row that are no padding."""
    return (mask_BT.cumsum(1) - 1).clamp(min=0)


class InTransformers:
    """A model in this process, as transformers runs it."""

    def __init__(self, model: PreTrainedModel, kind: Head):
        self.model, self.kind = model, kind
        self.takes = set(inspect.signature(model.forward).parameters)

    @torch.inference_mode()
    def begin(self, batch: Batch) -> Answer:
        inputs = dict(batch)
        if self.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = first_token(self.model, batch)
        elif "position_ids" in self.takes:
            inputs["position_ids"] = positions(batch["attention_mask"])
        return self._ask(inputs, batch["attention_mask"])

    @torch.inference_mode()
    def step(self, ids_BT: Tensor, state: object) -> Answer:
        past, mask = copy.deepcopy(state)
        if self.kind == "encoder-decoder":
            return self._ask({"decoder_input_ids": ids_BT, "attention_mask": mask} | past, mask)
        mask = torch.cat([mask, torch.ones_like(ids_BT)], dim=1)
        inputs = {"input_ids": ids_BT, "attention_mask": mask} | past
        if "position_ids" in self.takes:
            inputs["position_ids"] = positions(mask)[:, -ids_BT.shape[1] :]
        return self._ask(inputs, mask)

    def _ask(self, inputs: dict[str, object], mask: Tensor) -> Answer:
        cached = {"use_cache": True} if writes(self.kind) else {}
        begin = time.perf_counter()
        found = self.model(**inputs, **cached)
        seconds = time.perf_counter() - begin
        if self.kind == "question-answering":
            return Answer(torch.stack([found.start_logits, found.end_logits], dim=1), None, seconds)
        past = {"past_key_values": found.past_key_values} if writes(self.kind) else {}
        if self.kind == "encoder-decoder":
            past["encoder_outputs"] = (found.encoder_last_hidden_state,)
        return Answer(found.logits.float(), (past, mask), seconds)


class InGraphs:
    """The graph of a model that does not write, as the runtime of an export runs it; the mother of those that do."""

    def __init__(self, graphs: list[Graph], run: Run, model: PreTrainedModel):
        self.graphs, self.run, self.model = {graph.name: graph for graph in graphs}, run, model

    def begin(self, batch: Batch) -> Answer:
        outputs, seconds = self.run("model", arrays(batch, self.graphs["model"]))
        tensors = [torch.from_numpy(output) for output in outputs]
        return Answer(torch.stack(tensors, dim=1) if len(tensors) > 1 else tensors[0], None, seconds)

    def _ask(self, name: str, inputs: dict[str, np.ndarray]) -> tuple[Tensor, dict[str, np.ndarray], float]:
        """Logits, what is to be given back with the next tokens, and the seconds it took."""
        outputs, seconds = self.run(name, {key: inputs[key] for key in self.graphs[name].inputs})
        kept = (key.replace("present", "past_key_values") for key in self.graphs[name].outputs[1:])
        return torch.from_numpy(outputs[0]), dict(zip(kept, outputs[1:], strict=True)), seconds

    def _nothing_read(self, name: str, rows: int) -> dict[str, np.ndarray]:
        """What a graph is given as its past before the first token."""
        graph, sizes = self.graphs[name], {"batch": rows, "past": 0}
        kept = [key.replace("present", "past_key_values") for key in graph.outputs[1:]]
        shapes = {
            key: [
                sizes[axes[i]] if i in (axes := graph.axes[key]) else n for i, n in enumerate(graph.inputs[key].shape)
            ]
            for key in kept
        }
        return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


class CausalInGraphs(InGraphs):
    def begin(self, batch: Batch) -> Answer:
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        return self._read(ids_BT, mask_BT, self._nothing_read("model", len(ids_BT)))

    def step(self, ids_BT: Tensor, state: object) -> Answer:
        past, mask_BP = state
        return self._read(ids_BT, torch.cat([mask_BP, torch.ones_like(ids_BT)], dim=1), past)

    def _read(self, ids_BT: Tensor, mask_BT: Tensor, past: dict[str, np.ndarray]) -> Answer:
        places_BT = positions(mask_BT)[:, -ids_BT.shape[1] :]
        inputs = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy(), "position_ids": places_BT.numpy()}
        logits, past, seconds = self._ask("model", inputs | past)
        return Answer(logits, (past, mask_BT), seconds)


class RecurrentInGraphs(InGraphs):
    """It reads a token at a time."""

    def begin(self, batch: Batch) -> Answer:
        return self.step(batch["input_ids"], self._nothing_read("model", len(batch["input_ids"])))

    def step(self, ids_BT: Tensor, state: object) -> Answer:
        logits, past, total = [], state, 0.0
        for ids_B in ids_BT.T:
            one_B1V, past, seconds = self._ask("model", {"input_ids": ids_B[:, None].numpy()} | past)
            logits.append(one_B1V)
            total += seconds
        return Answer(torch.cat(logits, dim=1), past, total)


class EncoderDecoderInGraphs(InGraphs):
    def begin(self, batch: Batch) -> Answer:
        found, seconds = self.run("encoder", arrays(batch, self.graphs["encoder"]))
        source = dict(zip(self.graphs["encoder"].outputs, found, strict=True))
        source["encoder_attention_mask"] = batch["attention_mask"].numpy()
        ids_B1 = first_token(self.model, batch)
        answer = self.step(ids_B1, (self._nothing_read("decoder", len(ids_B1)), source))
        return answer._replace(seconds=answer.seconds + seconds)

    def step(self, ids_BT: Tensor, state: object) -> Answer:
        past, source = state
        logits, past, seconds = self._ask("decoder", {"input_ids": ids_BT.numpy()} | source | past)
        return Answer(logits, (past, source), seconds)


def in_graphs(graphs: list[Graph], run: Run, loaded: LoadedModel) -> InGraphs:
    recurrent = isinstance(loaded.model, LSTMForCausalLM)
    kinds = {"causal": RecurrentInGraphs if recurrent else CausalInGraphs, "encoder-decoder": EncoderDecoderInGraphs}
    return kinds.get(loaded.kind, InGraphs)(graphs, run, loaded.model)


def arrays(batch: Batch, graph: Graph) -> dict[str, np.ndarray]:
    """What a graph takes of a batch; a second text is marked by 1, and where there is none all is 0."""
    zeros = torch.zeros_like(batch["input_ids"])
    return {name: batch.get(name, zeros).contiguous().numpy() for name in graph.inputs}


def first_token(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, 1): what the decoder of an encoder-decoder reads before all else."""
    return torch.full_like(batch["input_ids"][:, :1], model.config.decoder_start_token_id)
