"""A model's folder with weights of few bits: written, and read back.

The format is that of the compressed-tensors library, which transformers and vLLM open; 4 bits are 4 bits on disk. What
the textbook's linear quantization makes has no place in it and is kept in a way of its own, that is read here alone.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightning_modules.compression.grids import Codes, Grid, from_minmax

Activations = Literal["int8", "int8-asymmetric", "float8"]
"""How the inputs of layers are rounded, each token with a scale of its own."""
LAYER_NAME = re.compile(r"[a-z]\w*(\.\w+)*$")
"""What is written here names layers; others name kinds of them, such as Linear, or patterns."""
MINMAX = "minmax"
"""The quant_method of a folder that only this library reads."""


@dataclass
class Minmax:
    """A weight of the textbook's linear quantization."""

    codes_RC: Tensor
    low: Tensor
    high: Tensor
    bits: int

    def values(self) -> Tensor:
        return from_minmax(self.codes_RC, self.low, self.high, self.bits)


@dataclass
class PackedLayer:
    """A layer's weight, and how it reads its inputs."""

    weight: Codes | Minmax
    grid: Grid | None = None
    """None of Minmax."""
    activations: Activations | None = None


Layers = dict[str, PackedLayer]
"""By the name of the module."""


def save_packed(folder: Path, network: PreTrainedModel, layers: Layers, dtype=torch.bfloat16) -> None:
    """Writes config and weights; those of no layer in `layers` in `dtype`."""
    tied = _tied_names(network)
    state = {}
    for name, tensor in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        if name in tied or (module in layers and kind == "weight"):
            continue
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, layer in layers.items():
        stored = _stored(layer)
        if f"{name}.weight" in tied:  # whose weight is another's, and whose scale is read nevertheless
            stored = {key: value for key, value in stored.items() if key == "weight_scale"}
        state |= {f"{name}.{key}": value.contiguous().clone() for key, value in stored.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, str(folder))
    config = json.loads(network.config.to_json_string())
    config |= {"architectures": [type(network).__name__], "dtype": str(dtype).removeprefix("torch.")}
    is_minmax = any(isinstance(layer.weight, Minmax) for layer in layers.values())
    config["quantization_config"] = _minmax_config(layers) if is_minmax else _config(layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def _tied_names(network: PreTrainedModel) -> set[str]:
    """Of weights that are another's, which is written."""
    owners: dict[int, str] = {}
    names = network.named_parameters(remove_duplicate=False)
    return {name for name, p in names if owners.setdefault(id(p), name) != name}


def _stored(layer: PackedLayer) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if isinstance(layer.weight, Minmax):
        offset = 2 ** (layer.weight.bits - 1)
        signed_RC = (layer.weight.codes_RC.int() - offset).to(torch.int8)
        stored = {"codes": pack_to_int32(signed_RC, layer.weight.bits)}
        return stored | {"shape": torch.tensor(signed_RC.shape), "low": layer.weight.low, "high": layer.weight.high}
    codes_RC, scales_RG = layer.weight
    if _format(layer) != "pack-quantized":
        return {"weight": codes_RC, "weight_scale": scales_RG}
    packed = pack_to_int32(codes_RC, layer.grid.bits)
    return {"weight_packed": packed, "weight_scale": scales_RG, "weight_shape": torch.tensor(codes_RC.shape)}


def _format(layer: PackedLayer) -> str:
    """Of 8 bits, a byte each; that is what transformers opens of every architecture."""
    if layer.grid.kind == "float":
        return "float-quantized" if layer.activations else "naive-quantized"
    if layer.grid.bits == 8:
        return "int-quantized" if layer.activations else "naive-quantized"
    return "pack-quantized"


def _config(layers: Layers) -> dict[str, object]:
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    alike: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        what = (_format(layer), layer.grid, layer.activations)
        alike.setdefault(what, []).append(name)
    groups = {}
    for number, ((form, grid, activations), names) in enumerate(alike.items()):
        how = {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
        groups[f"group_{number}"] = QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(num_bits=grid.bits, type=grid.kind, symmetric=True, **how),
            input_activations=None if activations is None else QuantizationArgs(**OF_ACTIVATIONS[activations]),
            format=form,
        )
    formats = {form for form, _, _ in alike}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
    )
    return json.loads(config.model_dump_json()) | {"version": __version__}


OF_ACTIVATIONS: dict[Activations, dict[str, object]] = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
    "int8-asymmetric": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False},
    "float8": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
}


def _minmax_config(layers: Layers) -> dict[str, object]:
    return {"quant_method": MINMAX, "bits": {name: layer.weight.bits for name, layer in layers.items()}}


# Reading


def is_packed(config: PreTrainedConfig) -> bool:
    """Whether a folder's weights are of one of the formats here."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    if found is None or found.get("quant_method") not in ("compressed-tensors", MINMAX):
        return False
    groups = (found.get("config_groups") or {}).values()
    return all(LAYER_NAME.match(name) for group in groups for name in group["targets"])  # others are transformers'


def read_packed(auto_class: type, folder: str, dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """A network whose weights are what the codes stand for, and whose layers round what they read where the folder
    says so. Raises ValueError for a folder that lacks weights."""
    config = AutoConfig.from_pretrained(folder)
    about = dict(vars(config).pop("quantization_config"))
    state = _state(Path(folder))
    if about["quant_method"] == MINMAX:
        rounded = {}
        for name, bits in about["bits"].items():
            parts = [_taken(state, f"{name}.{key}", folder) for key in ("codes", "shape", "low", "high")]
            state[f"{name}.weight"] = _minmax_values(*parts, bits)
    else:
        rounded = _unpack(state, about, folder)
    stored = getattr(torch, str(config.dtype or "bfloat16").removeprefix("torch."))
    settings = {"dtype": stored if dtype == "auto" else dtype, "output_loading_info": True}
    network, info = auto_class._model_mapping[type(config)].from_pretrained(
        None, config=config, state_dict=state, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights ({missing[0]}, …); copy it again")
    for name, activations in rounded.items():
        network.get_submodule(name).register_forward_pre_hook(partial(_rounds_inputs, OF_ACTIVATIONS[activations]))
    return network


def _state(folder: Path) -> dict[str, Tensor]:
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return state


def _taken(state: dict[str, Tensor], name: str, folder: str) -> Tensor:
    if name not in state:
        raise ValueError(f"{folder} lacks {name}; copy it again")
    return state.pop(name)


def _unpack(state: dict[str, Tensor], about: dict[str, object], folder: str) -> dict[str, Activations]:
    """Replaces codes by what they stand for, in place; returns the layers that round what they read."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rounded = {}
    for group in about["config_groups"].values():
        inputs = group["input_activations"]
        for name in group["targets"]:
            if inputs is not None:
                rounded[name] = next(kind for kind, args in OF_ACTIVATIONS.items() if _says(inputs, args))
            scales_RG = _taken(state, f"{name}.weight_scale", folder)
            if (packed := state.pop(f"{name}.weight_packed", None)) is not None:
                shape = _taken(state, f"{name}.weight_shape", folder)
                state[f"{name}.weight"] = unpack_from_int32(packed, group["weights"]["num_bits"], torch.Size(shape))
            if f"{name}.weight" not in state:  # tied to another, that is there
                continue
            state[f"{name}.weight"] = Codes(state[f"{name}.weight"], scales_RG).values()
    return rounded


def _says(found: dict[str, object], args: dict[str, object]) -> bool:
    return all(found[name] == value for name, value in args.items())


def _minmax_values(packed: Tensor, shape: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    signed_RC = unpack_from_int32(packed, bits, torch.Size(shape))
    return Minmax(signed_RC.int() + 2 ** (bits - 1), low, high, bits).values()


def _rounds_inputs(args: dict[str, object], module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (rounded_inputs(inputs[0], args), *inputs[1:])


def rounded_inputs(inputs: Tensor, args: dict[str, object]) -> Tensor:
    """(…, C): each token on a grid of its own, as compressed-tensors rounds it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    settings = QuantizationArgs(**args)
    # The library remembers tensors from call to call; those of inference mode are of no use where there are gradients.
    with torch.inference_mode(False), torch.no_grad():
        scales, zero_points = compute_dynamic_scales_and_zp(value=inputs, args=settings, module=None)
        return fake_quantize(inputs, scales, zero_points, settings)
