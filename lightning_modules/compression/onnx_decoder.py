"""A decoder that export.py has written for onnxruntime, as judging asks a network."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.compression.opened import Opened, bytes_of_weights, open_model
from lightning_modules.exports.to_onnx import open_session
from lightning_modules.model_folder import load_tokenizer

FILE = "model.onnx"


class OpenedOnnx(Opened):
    """Whose precision is its file's."""

    def to_stored(self) -> None:
        pass

    def bytes_in_memory(self) -> int:
        return bytes_of_weights(self.folder)


class OnnxDecoder:
    """Reads ids and gives logits; with `use_cache` its keys and values, too."""

    def __init__(self, folder: Path):
        self.session = open_session(folder / FILE)
        self.config = AutoConfig.from_pretrained(folder)
        self.device, self.base_model = torch.device("cpu"), self
        shapes = {node.name: node.shape for node in self.session.get_inputs()}
        self.past = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values")}

    def __call__(self, input_ids: Tensor, past_key_values: dict | None = None, use_cache: bool = False):
        B, T = input_ids.shape
        past = past_key_values or {name: np.zeros((B, s[1], 0, s[3]), np.float32) for name, s in self.past.items()}
        before = next(iter(past.values())).shape[2]
        read = {
            "input_ids": input_ids.numpy(),
            "attention_mask": np.ones((B, before + T), np.int64),
            "position_ids": np.broadcast_to(np.arange(before, before + T), (B, T)),
        }
        logits, *present = self.session.run(None, read | past)
        return SimpleNamespace(
            logits=torch.from_numpy(logits), past_key_values=dict(zip(self.past, present, strict=True))
        )

    def can_generate(self) -> bool:
        return True

    def modules(self) -> list:
        return []

    def parameters(self) -> list:
        return []

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(num_embeddings=self.config.get_text_config().vocab_size)


def is_onnx(model: str) -> bool:
    return (Path(model) / FILE).is_file()


def open_any(model: str, hub_is_within_reach: Callable[[], bool]) -> Opened:
    """A file for onnxruntime, or a model as transformers knows it."""
    return open_onnx(model) if is_onnx(model) else open_model(model, hub_is_within_reach=hub_is_within_reach)


def open_onnx(folder: str) -> Opened:
    """Raises ValueError for a file that is no decoder's."""
    network = OnnxDecoder(Path(folder))
    if not network.past or any(len(shape) != 4 for shape in network.past.values()):
        raise ValueError(f"--model {folder} is no decoder with keys and values; only such a file of ONNX can be judged")
    return OpenedOnnx(folder, AutoModelForCausalLM, network, load_tokenizer(folder), torch.float32)
