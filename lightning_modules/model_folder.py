"""Loading a language model that somebody left: a run's folder, a transformers folder or a Hub name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import lightning_modules.lstm  # noqa: F401  (registers the LSTM with the Auto classes)

Kind = Literal["causal", "masked", "encoder-decoder"]
Head = Literal[Kind, "sequence-classification", "question-answering"]
Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
}


@dataclass
class LoadedModel:
    folder: str
    kind: Head
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.model)


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model can read at once; None: any number."""
    # Not every architecture has the field: T5's positions are relative, an LSTM has none.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        if module is model.get_input_embeddings():
            continue
        # RoBERTa and its like leave the rows up to the padding's unused.
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def load(
    model: str,
    tokenizer: str | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    hub_is_within_reach: Callable[[], bool] = lambda: True,
) -> LoadedModel:
    """Model and tokenizer of a run's folder, a transformers folder or a Hub name, ready for inference.

    `hub_is_within_reach` is asked where a name is no folder. Raises OSError or ValueError with one line where there is
    nothing of the kind.
    """
    return _load(model_kind, _read, model, tokenizer, device, dtype, trust_remote_code, hub_is_within_reach)


def load_with_head(
    model: str,
    tokenizer: str | None = None,
    device: Device = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    hub_is_within_reach: Callable[[], bool] = lambda: True,
) -> LoadedModel:
    """As `load`, and as well a model that says labels of a text or the span of an answer; weights of few bits come as
    the numbers that they stand for."""
    return _load(head_kind, _read_dense, model, tokenizer, device, dtype, trust_remote_code, hub_is_within_reach)


def _load(
    kind_of: Callable[[str, PreTrainedConfig], Head],
    read: Callable[..., tuple[PreTrainedModel, list[str]]],
    model: str,
    tokenizer: str | None,
    device: Device,
    dtype: DType,
    trust_remote_code: bool,
    hub_is_within_reach: Callable[[], bool],
) -> LoadedModel:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = pick_device(device)
    folder = find_folder(model)
    where = {"trust_remote_code": trust_remote_code}
    if not all(Path(name).is_dir() for name in (folder, tokenizer or folder)):
        # Without a network transformers would retry for 23 s before it looks into its cache.
        where["local_files_only"] = not hub_is_within_reach()
    try:
        config = AutoConfig.from_pretrained(folder, **where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model} is no model's folder, nor a Hub name within reach ({reason})") from None
    kind = kind_of(folder, config)
    tokenizer_of_model = load_tokenizer(folder if tokenizer is None else tokenizer, **where)
    try:
        network, missing = read(AUTO_CLASSES[kind], folder, config, dtype, **where)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the weights of {folder} cannot be read ({reason}); copy or download them again") from None
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of a {kind} model ({missing[0]}, …); pass a whole one")
    return LoadedModel(folder, kind, network.to(device).eval(), tokenizer_of_model)


def _read(
    auto_class: type, folder: str, config: PreTrainedConfig, dtype: DType, **where: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The network, and the names of the weights that the folder lacks."""
    from lightning_modules.compression import packed_folder

    if packed_folder.is_packed(config):
        return packed_folder.read_packed(auto_class, folder, dtype if dtype == "auto" else getattr(torch, dtype)), []
    network, info = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **where)
    return network, sorted(info["missing_keys"])


def _read_dense(
    auto_class: type, folder: str, config: PreTrainedConfig, dtype: DType, **where: bool
) -> tuple[PreTrainedModel, list[str]]:
    network, missing = _read(auto_class, folder, config, dtype, **where)
    for module in network.modules():
        module._forward_pre_hooks.clear()  # which round what a layer reads: that is no part of its weights
    make_dense(network, folder)
    return network, missing


@torch.no_grad()
def make_dense(network: PreTrainedModel, folder: str) -> None:
    """Replaces weights of torchao by the numbers that they stand for, in place. Raises ValueError for another kind."""
    about = getattr(network.config, "quantization_config", None)  # only a quantized model's config has it
    if about is None:
        return
    if about.quant_method != "torchao":
        raise ValueError(
            f"{folder} is quantized by {about.quant_method}; pass the model that it was made from, or one quantized by "
            "compress.py, compressed-tensors or torchao"
        )
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight.data) is not torch.Tensor:
                setattr(module, name, nn.Parameter(weight.dequantize().to(network.dtype), requires_grad=False))
    network.tie_weights()
    # What saving would make of them again.
    del network.config.quantization_config, network.hf_quantizer, network._weight_conversions
    network.is_quantized = False


def find_folder(model: str) -> str:
    """The folder with the weights, which in a run is `model/`; what is no path here has to be a name on the Hub."""
    path = Path(model).expanduser()
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return str(folder)
    if any((folder / "adapter_config.json").is_file() for folder in (path / "model", path)):
        raise FileNotFoundError(
            f"{path} holds a prompt or an adapter without its model; load both by PeftModel.from_pretrained of the "
            "peft library, or ask a prompt of ours by finetune.py predict"
        )
    if path.exists():
        raise FileNotFoundError(f"no config.json in {path} nor in {path / 'model'}; pass a run's or a model's folder")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or ("/" in model and path.parent.is_dir()):
        raise FileNotFoundError(f"no such folder: {model}; pass a run's or a model's folder, or a Hub name")
    return model


def model_kind(folder: str, config: PreTrainedConfig) -> Kind:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    architecture = (config.architectures or ["no architecture"])[0]
    if architecture.endswith("ForCausalLM") or architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    if architecture.endswith("ForMaskedLM") or architecture in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    raise ValueError(f"{folder} holds {architecture}, which has no language-model head; pass a causal or masked LM")


def head_kind(folder: str, config: PreTrainedConfig) -> Head:
    """What the head of a model is for, by the first of its architectures."""
    architecture = (config.architectures or ["no architecture"])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "sequence-classification"
    if architecture.endswith("ForQuestionAnswering"):
        return "question-answering"
    return model_kind(folder, config)


def is_language_model(folder: Path) -> bool:
    """Whether a folder's config says so: not one that is damaged, nor one with another head."""
    try:
        model_kind(str(folder), AutoConfig.from_pretrained(folder))
    except (OSError, ValueError):
        return False
    return True


def newest_pretraining(fits: Callable[[PreTrainedConfig], bool], distilled: bool = True) -> str | None:
    """The newest model in runs/ whose config fits, and that was pretrained or, where that counts, distilled."""
    runs = sorted(Path("runs").glob("*/model/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in runs):
        # Of no fine-tuning: or the second of two equal runs would begin with the end of the first.
        if is_pretrained(folder, distilled) and fits(AutoConfig.from_pretrained(folder)):
            return str(folder)
    return None


def newest_task(name: str) -> str | None:
    """The newest model in runs/ that was fine-tuned by a task of this name."""
    runs = sorted(Path("runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in runs):
        if summary_of(folder).get("task") == name and (folder / "model" / "config.json").is_file():
            return str(folder / "model")
    return None


def summary_of(run: Path) -> dict[str, object]:
    """What a run's summary.json says; nothing where there is none, or a damaged one."""
    try:
        found = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: str, flag: str) -> PreTrainedConfig:
    """Of a model's folder or a Hub name. Raises ValueError with the flag that named it."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag} {folder} is no model's folder, nor a Hub name ({reason})") from None


def is_pretrained(folder: Path, distilled: bool) -> bool:
    """Whether a model's folder holds a language model that no run of fine-tuning left."""
    summary = summary_of(folder.parent)
    tuned = summary.get("objective") in ("labels", "spans", "completions")
    return is_language_model(folder) and not tuned and (distilled or "teachers" not in summary)


def load_tokenizer(
    folder: str, trust_remote_code: bool = False, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    missing = f"{folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json there, or pass --tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except (OSError, ValueError):
        raise ValueError(missing) from None
    # Without its files transformers makes up a tokenizer that knows its special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(missing)
    return tokenizer


def pick_device(device: Device) -> str:
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in found if found[name])
    if not found[device]:
        raise ValueError(f"--device {device}: this machine or this build of torch has none; leave the flag out")
    return device
