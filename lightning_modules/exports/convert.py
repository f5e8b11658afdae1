"""From a loaded model to a file of a format, and back to what answers from that file."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.exports.answering import Answering, InTransformers, in_graphs
from lightning_modules.exports.formats import MOST_LOGITS, MOST_NATS, DType, GGUFType, Name
from lightning_modules.exports.graphs import graphs_of
from lightning_modules.exports.parity import Tolerance
from lightning_modules.model_folder import LoadedModel, load_tokenizer


@dataclass
class Settings:
    """What is to be written."""

    format: Name
    dtype: DType | None
    gguf_type: GGUFType
    shard_size: str

    def tolerance(self, most: float | None) -> Tolerance:
        rounded_to = {"gguf": self.gguf_type, "onnx-int8": "onnx-int8"}.get(self.format, self.dtype)
        measure = "kl" if rounded_to in MOST_NATS else "logits"
        return Tolerance(measure, MOST_NATS.get(rounded_to, MOST_LOGITS) if most is None else most)

    @property
    def most_tokens(self) -> int:
        """Of a prompt that the export can read at once."""
        from lightning_modules.exports.to_pte import MOST_TOKENS

        return MOST_TOKENS if self.format == "pte" else 512

    @property
    def rows(self) -> int:
        """That the export can read at once, in the check."""
        return 1 if self.format == "pte" else 4


class Export(NamedTuple):
    """What was written, opened again; with the tokenizer that lies in it, where there is one."""

    answering: Answering
    tokenizer: PreTrainedTokenizerBase | None = None


def convert(loaded: LoadedModel, settings: Settings, path: Path) -> Export:
    """`write_and_open` without the notes, bars and warnings of the libraries, which are not for the user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            return write_and_open(loaded, settings, path)
    finally:
        logging.disable(logging.NOTSET)


def write_and_open(loaded: LoadedModel, settings: Settings, path: Path) -> Export:
    """Writes `path` and opens it again, each by the library of the format.

    Raises ValueError for a family of models that the format cannot hold.
    """
    match settings.format:
        case "hf":
            from lightning_modules.exports import to_folder

            to_folder.write_folder(loaded, path, settings.dtype, settings.shard_size)
            return Export(InTransformers(to_folder.open_folder(loaded, path), loaded.kind), load_tokenizer(str(path)))
        case "safetensors":
            from lightning_modules.exports import to_folder

            to_folder.write_weights(loaded, path, settings.dtype)
            return Export(InTransformers(to_folder.open_weights(loaded, path), loaded.kind))
        case "gguf":
            from lightning_modules.exports import to_gguf

            to_gguf.require_family(loaded.model)
            to_gguf.write(loaded, path, settings.gguf_type)
            model, tokenizer = to_gguf.open_file(loaded, path)
            return Export(InTransformers(model, loaded.kind), tokenizer)
    with plain_attention(loaded.model):
        graphs = graphs_of(loaded)
        match settings.format:
            case "pt2":
                from lightning_modules.exports import to_pt2

                to_pt2.write(loaded, graphs, path)
                run = to_pt2.open_runtime(graphs, path)
            case "pte":
                from lightning_modules.exports import to_pte

                to_pte.write(loaded, graphs, path)
                run = to_pte.open_runtime(graphs, path)
            case _:
                from lightning_modules.exports import to_onnx

                to_onnx.write(loaded, graphs, path)
                if settings.format == "onnx-int8":
                    to_onnx.quantize(path)
                run = to_onnx.open_runtime(path)
    return Export(
        in_graphs(graphs, run, loaded), load_tokenizer(str(path)) if settings.format.startswith("onnx") else None
    )


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention as matrix products and a softmax: torch's fused one becomes a layout that not every runtime reads."""
    before = model.config._attn_implementation
    if before is None:  # a network without attention
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
