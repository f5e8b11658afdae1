"""A transformers folder with config, tokenizer and weights in shards; or the weights alone in one safetensors file."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightning_modules.model_folder import AUTO_CLASSES, LoadedModel

ONE_FILE = "1000TB"
WEIGHTS = "model.safetensors"


def in_dtype(model: PreTrainedModel, dtype: str | None) -> PreTrainedModel:
    """The model itself, or a copy with weights of another precision."""
    if dtype is None or model.dtype == getattr(torch, dtype):
        return model
    return copy.deepcopy(model).to(getattr(torch, dtype))


def write_folder(loaded: LoadedModel, folder: Path, dtype: str | None, shard_size: str) -> None:
    in_dtype(loaded.model, dtype).save_pretrained(folder, max_shard_size=shard_size)
    loaded.tokenizer.save_pretrained(folder)


def write_weights(loaded: LoadedModel, file: Path, dtype: str | None) -> None:
    """As transformers names them, a tied matrix once."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        in_dtype(loaded.model, dtype).save_pretrained(folder, max_shard_size=ONE_FILE)
        (Path(folder) / WEIGHTS).rename(file)


def open_folder(loaded: LoadedModel, folder: Path) -> PreTrainedModel:
    """As anybody opens it. Raises ValueError where weights are missing."""
    model, info = AUTO_CLASSES[loaded.kind].from_pretrained(folder, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} was written without {sorted(info['missing_keys'])[0]}; transformers makes it up")
    return model.eval()


def open_weights(loaded: LoadedModel, file: Path) -> PreTrainedModel:
    """The file beside the config of its source."""
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.config.save_pretrained(folder)
        (Path(folder) / WEIGHTS).symlink_to(file.resolve())
        return open_folder(loaded, Path(folder))
