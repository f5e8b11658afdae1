"""A model with whatever head it has, opened to be made smaller, and the folder that comes of it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from lightning_modules.checkpoint_io import replace_folder
from lightning_modules.compression.packed_folder import is_packed, read_packed
from lightning_modules.model_folder import AUTO_CLASSES, find_folder, head_kind, load_tokenizer

ABOUT = "compression.json"
"""In a folder, what was done to the model so far, and to which."""


@dataclass
class Opened:
    folder: str
    auto_class: type
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    """Of the folder's weights."""
    is_packed: bool = False
    """Whether they have few bits."""

    def to_stored(self) -> None:
        """Computes from now on in the precision of the folder."""
        self.network.to(self.stored)

    def bytes_in_memory(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.network.parameters())

    @property
    def scores_text(self) -> bool:
        return self.auto_class in (AutoModelForCausalLM, AutoModelForMaskedLM)


def auto_class_of(folder: str, config: PreTrainedConfig) -> type:
    """By the class that a folder's config names."""
    return AUTO_CLASSES[head_kind(folder, config)]


def open_model(
    model: str,
    flag: str = "--model",
    dtype: torch.dtype = torch.float32,
    hub_is_within_reach: Callable[[], bool] = lambda: True,
) -> Opened:
    """Of a run's folder, a model's folder or a Hub name, weights of few bits as what they stand for."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = find_folder(model)
    where = {} if Path(folder).is_dir() else {"local_files_only": not hub_is_within_reach()}
    try:
        config = AutoConfig.from_pretrained(folder, **where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag} {model} is no model's folder, nor a Hub name within reach ({reason})") from None
    auto_class = auto_class_of(folder, config)
    try:
        if is_packed(config):
            network = read_packed(auto_class, folder, dtype)
        else:
            network, info = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **where)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{flag} {folder} lacks {len(missing)} weights ({missing[0]}, …); pass a whole one")
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the weights of {folder} cannot be read ({reason}); copy or download them again") from None
    if not Path(folder).is_dir():  # a Hub name's, in transformers' cache
        folder = str(Path(cached_file(folder, "config.json", **where)).parent)
    stored = getattr(torch, str(config.dtype or dtype_on_disk(folder) or dtype).removeprefix("torch."))
    return Opened(folder, auto_class, network.eval(), load_tokenizer(folder, **where), stored, is_packed(config))


def dtype_on_disk(folder: str) -> torch.dtype | None:
    """Of the first floating-point weight, where a config does not say it."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if (tensor := opened.get_tensor(name)).is_floating_point():
                    return tensor.dtype
    return None


def require_dense(opened: Opened, flag: str = "--model") -> None:
    """Raises ValueError for weights of few bits, which nothing more can be done to."""
    if opened.is_packed or getattr(opened.network.config, "quantization_config", None) is not None:
        raise ValueError(f"{flag} {opened.folder} is quantized already; pass the model that it was made from")


def done_so_far(folder: str) -> dict[str, object]:
    """{"source": the model that all began with, "steps": [what was done]}"""
    for file in (Path(folder) / ABOUT, Path(folder).parent / ABOUT):  # of a run, beside its model
        try:
            found = json.loads(file.read_text())
            return {"source": str(found["source"]), "steps": list(found["steps"])}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is damaged; remove it") from None
    return {"source": folder, "steps": []}


def output_folder(asked: str | None, model: str, name: str, overwrite: bool) -> Path:
    """Where the result goes: beside the model, if nothing else is asked for. Raises FileExistsError."""
    source = Path(find_folder(model))
    folder = Path(asked).absolute() if asked else source.with_name(f"{source.name}-{name}")
    if folder.absolute() in (source.absolute(), *source.absolute().parents):
        raise ValueError(f"--output {asked} holds the model itself; pass another")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass another --output, or --overwrite")
    return folder


@contextmanager
def written_whole(folder: Path, opened: Opened, step: dict[str, object]) -> Iterator[Path]:
    """A folder to write a model into, which takes its place with its tokenizer and what was done once all is there."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        opened.tokenizer.save_pretrained(temporary)
        about = done_so_far(opened.folder)
        about["steps"] = [*about["steps"], step]
        (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bytes_of_weights(folder: str | Path) -> int:
    """Of the first kind that is there, of which a model is read."""
    for kinds in (("*.onnx", "*.onnx.data"), ("*.safetensors",), ("pytorch_model*.bin",)):
        if files := [file for kind in kinds for file in Path(folder).glob(kind)]:
            return sum(file.stat().st_size for file in files)
    return 0
