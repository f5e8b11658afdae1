"""What a step of a run takes, by torch's own profiler and FLOP counter, beside the same step on fake tensors."""

import json
import runpy
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules import cli, planning
from lightning_modules.simulation import ON_A_CPU, Footprint, footprint, labelled_share, simulated, stand_in

PROFILED, COUNTED = 2, 3
"""Micro-batches, from 0; the counter keeps alive what the profiler would otherwise see end."""


class StepMeasured(Callback):
    """Writes measured_step.json into the run's folder: the most bytes that tensors took in a step, and the FLOPs."""

    def __init__(self) -> None:
        self.foreseen: dict[int, Footprint] = {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: dict, batch_idx: int) -> None:
        if batch_idx in (PROFILED, COUNTED):
            with simulated(module.device.type, labelled_share(batch)) as live, stand_in(module):
                self.foreseen[batch_idx] = footprint(module, batch, live, trainer.accumulate_grad_batches)
        if batch_idx == PROFILED:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.there = planning.bytes_there(trainer, module) + sum(g.numel() * g.element_size() for g in gradients)
            optimizer = trainer.optimizers[0]
            self.there += sum(g.numel() * g.element_size() for g in getattr(optimizer, "gradients", None) or [])
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        if batch_idx == COUNTED:
            self.counter = FlopCounterMode(display=False, custom_mapping=ON_A_CPU)
            self.counter.__enter__()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer) -> None:
        if trainer.global_step == COUNTED:
            self.counter.__exit__(None, None, None)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if batch_idx == PROFILED:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            now = most = self.there
            for event in sorted(events, key=lambda event: event.start_ns()):
                now += event.nbytes()
                most = max(most, now)
            self.most = most
        if batch_idx == COUNTED:
            tokens = batch["input_ids"].numel()
            found = {"peak_memory_bytes": self.most, "flops_per_token": self.counter.get_total_flops() / tokens}
            found["simulated"] = {
                "peak_memory_bytes": self.foreseen[PROFILED].peak_bytes,
                "flops_per_token": self.foreseen[COUNTED].flops / tokens,
            }
            Path(trainer.default_root_dir, "measured_step.json").write_text(json.dumps(found))


def main(script: str) -> None:
    """Runs a recipe with the callback."""
    made = cli.RecipeCLI.instantiate_trainer

    def with_callback(self: cli.RecipeCLI, **settings: object) -> Trainer:
        trainer = made(self, **settings)
        trainer.callbacks.append(StepMeasured())
        return trainer

    cli.RecipeCLI.instantiate_trainer = with_callback
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
