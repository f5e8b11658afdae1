"""Training with weights of few bits, which are stored as such in the end."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_modules import cpu_kernels
from lightning_modules.callbacks.changed_weights import ChangedWeights
from lightning_modules.checkpoint_io import replace_folder
from lightning_modules.compression.grids import Grid, codes_of, nearest, scales_of
from lightning_modules.compression.packed_folder import (
    OF_ACTIVATIONS,
    Layers,
    PackedLayer,
    read_packed,
    rounded_inputs,
    save_packed,
)
from lightning_modules.compression.quantization import (
    SchemeName,
    ends_of,
    fitted,
    quantizable,
    scheme_named,
)

EQUAL = float("inf")
NUDGES = (1.0, 0.97, 1.03)
"""Of a scale, which are tried as training goes on."""


class FakeQuantization(ChangedWeights):
    """Each forward pass reads weights, and where the scheme says so inputs, as they will be stored; beside `model/`, a
    run leaves the folder with the few bits, and says how equal both are.

    Args:
        scheme: As of `compress.py quantize`.
        group_size: Weights that share a scale, below 8 bits. Left out: 32, 16 where these do not divide a layer's
            inputs, or a row.
        ends: Bits of embedding and output head.
        every: Steps after which scales follow the weights.
    """

    turn = 1  # what is zero stays zero on every grid

    def __init__(self, scheme: SchemeName = "int4", group_size: int | None = None, ends: int = 8, every: int = 8):
        super().__init__()
        if scheme == "minmax":
            raise ValueError("minmax is for study, and nothing is trained to it; pass int4, int2, 8da4w …")
        self.scheme_name, self.group_size = scheme, group_size
        self.scheme = scheme_named(scheme)
        self.ends, self.every = ends, every
        self.grids: dict[str, Grid] = {}
        """By the name of the module."""
        self.ends_by_name: set[str] = set()
        self.scales: dict[str, Tensor] = {}
        self._steps = 0

    def names(self, network: nn.Module) -> list[str]:
        return [f"{name}.weight" for name in self.grids]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_fit_start(trainer, module)
        network, seen = module.network, set()
        layers = quantizable(network)
        grids = fitted(self.scheme.grid, layers, self.group_size)
        if self.ends != 16:
            self.ends_by_name = set(ends_of(network))
            grids |= dict.fromkeys(self.ends_by_name, Grid(self.ends))
        names = {id(p): name.removesuffix(".weight") for name, p in network.named_parameters()}
        for name, grid in grids.items():  # of a matrix that is tied to another, by the name that it has first
            if (weight := id(network.get_submodule(name).weight)) not in seen:
                seen.add(weight)
                self.grids[names[weight]] = grid
        if self.scheme.activations is not None:
            for layer in layers.values():
                layer.register_forward_pre_hook(partial(self._rounds, OF_ACTIVATIONS[self.scheme.activations]))
        self._try_to_store(trainer, module)
        if trainer.is_global_zero:
            ends = f"{len(grids) - len(layers)} ends in {self.ends} bits"
            kinds = "; ".join(str(grid) for grid in dict.fromkeys(grids[name] for name in layers))
            print(f"quantized  {kinds}: {len(layers)} layers; {ends}", flush=True)

    def _try_to_store(self, trainer: Trainer, module: LightningModule) -> None:
        """What cannot be stored or read back is told before anything is trained."""
        packed = {
            name: PackedLayer(nearest(module.network.get_submodule(name).weight.detach(), grid), grid)
            for name, grid in self.grids.items()
        }
        folder = Path(trainer.default_root_dir) / f".tried-{trainer.global_rank}"
        try:
            save_packed(folder, module.network, packed | self._tied(module.network, packed))
            read_packed(module.auto_class, str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _rounds(self, args: dict[str, object], layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        exact = inputs[0]
        rounded = rounded_inputs(exact.detach(), args)
        return (exact + (rounded - exact).detach(), *inputs[1:]) if exact.requires_grad else (rounded, *inputs[1:])

    def move_to(self, device: torch.device) -> None:
        self.scales = {name: scales.to(device) for name, scales in self.scales.items()}

    def put_in(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        for name, grid in self.grids.items():
            weight_RC = exact[f"{name}.weight"]
            if name not in self.scales:
                self.scales[name] = scales_of(weight_RC, grid)
            module.network.get_submodule(name).weight.copy_(codes_of(weight_RC, self.scales[name], grid).values())

    def adapt(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            for name, grid in self.grids.items():
                self.scales[name] = nudged(exact[f"{name}.weight"], self.scales[name], grid)

    def state_dict(self) -> dict:
        return super().state_dict() | {"scales": self.scales, "steps": self._steps}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.scales, self._steps = dict(state_dict["scales"]), state_dict["steps"]

    # What is left

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Behind Report, which has put the best weights in."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / f"model-{self.scheme_name}"
        scales, network = self._scales_of_best(trainer), module.network
        packed: Layers = {}
        for name, grid in self.grids.items():
            weight = network.get_submodule(name).weight.detach()
            activations = None if name in self.ends_by_name else self.scheme.activations
            packed[name] = PackedLayer(codes_of(weight, scales[name].to(weight.device), grid), grid, activations)
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        dtype = network.get_submodule(next(iter(self.grids))).weight.dtype
        save_packed(temporary, network, packed | self._tied(network, packed), dtype)
        trainer.datamodule.tokenizer.save_pretrained(temporary)
        about = {"verb": "train", "qat": self.scheme_name, "tokens": int(module.tokens)}
        (temporary / "compression.json").write_text(json.dumps({"source": module.start, "steps": [about]}) + "\n")
        replace_folder(temporary, folder)
        decibels = self._parity(trainer, module, folder)
        how = "are equal bit by bit" if decibels == EQUAL else f"agree to {decibels:.0f} dB"
        print(f"quantized  {folder}: trained and stored {how}", flush=True)
        if decibels < 100:
            print("warning: the stored model is not the trained one", file=sys.stderr)

    def _tied(self, network: nn.Module, packed: Layers) -> Layers:
        """The other names of matrices that are there by one."""
        ends = ends_of(network)
        return {
            name: packed[other]
            for name, end in ends.items()
            for other in ends
            if name not in packed and other in packed and network.get_submodule(other).weight is end.weight
        }

    def _scales_of_best(self, trainer: Trainer) -> dict[str, Tensor]:
        """Those that the weights which were put in had."""
        checkpoint = trainer.checkpoint_callback
        if checkpoint is None or not checkpoint.best_model_path:
            return self.scales
        best = trainer.strategy.load_checkpoint(checkpoint.best_model_path)
        return (
            self.scales if best["global_step"] == trainer.global_step else best["callbacks"][self.state_key]["scales"]
        )

    @torch.inference_mode()
    def _parity(self, trainer: Trainer, module: LightningModule, folder: Path) -> float:
        """Signal to noise of logits, in dB, between the network that was trained and what its folder gives."""
        stored = read_packed(module.auto_class, str(folder), module.network.dtype).to(module.device).eval()
        if module.kernels:
            cpu_kernels.install(stored)
        batch = trainer.strategy.batch_to_device(next(iter(trainer.datamodule.val_dataloader())))
        inputs = {name: batch[name][:2] for name in ("input_ids", "attention_mask") if name in batch}
        if stored.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        fake, real = (network(**inputs)[0].double() for network in (module.network.eval(), stored))
        noise = (fake - real).norm()
        return float(20 * torch.log10(fake.norm() / noise)) if noise else EQUAL


def nudged(weight_RC: Tensor, scales_RG: Tensor, grid: Grid) -> Tensor:
    """The scales, or neighbours of theirs with which the weights are nearer."""
    best_RG, least_RG = scales_RG, None
    for nudge in NUDGES:
        tried_RG = (scales_RG.float() * nudge).to(scales_RG.dtype)
        error_RG = (codes_of(weight_RC, tried_RG, grid).values() - weight_RC).unflatten(1, (scales_RG.shape[1], -1))
        error_RG = error_RG.square().sum(-1)
        if least_RG is not None:
            tried_RG = torch.where(error_RG < least_RG, tried_RG, best_RG)
            error_RG = torch.minimum(error_RG, least_RG)
        best_RG, least_RG = tried_RG, error_RG
    return best_RG
