"""The verb `plan`: what a run would take on as many devices as are asked for, found without any of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_modules import explaining, hardware, planning, simulation
from lightning_modules.callbacks.plan import print_pairs, rows
from lightning_modules.explaining import Setting
from lightning_modules.hardware import Device
from lightning_modules.planning import PLANNED_MFU


@contextmanager
def cannot_be_planned() -> Iterator[None]:
    """Makes one line of what has no shape without its numbers, such as a kernel for experts."""
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"this run cannot be planned: {str(error).splitlines()[0]}") from error


class RecipeTrainer(Trainer):
    """Lightning's, which can plan a run, too."""

    verbs: ClassVar[dict[str, set[str]]] = {
        "plan": {"model", "datamodule"},
        "explain": {"model", "datamodule", "settings"},
    }
    """Of the command line, with the arguments that it does not show."""

    def explain(self, model: LightningModule, datamodule: LightningDataModule, settings: list[Setting]) -> None:
        """Says where each setting of a run with the same flags comes from, and which change nothing.

        Args:
            model: Which is not trained.
            datamodule: Whose text is not read.
            settings: By the command line.
        """
        print("\n".join(explaining.lines(settings)))
        found = explaining.remarks(self, model, datamodule, settings)
        print("\n" + "\n".join(f"note: {remark}" for remark in found) if found else "\nnothing is idle")

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        devices: int | None = None,
        hardware: str | None = None,
        mfu: float = PLANNED_MFU,
        price: float | None = None,
        output: Path | None = None,
    ) -> None:
        """Prints what a run with the same flags would take: memory by part, FLOPs, time, energy and cost.

        Args:
            model: Which is not trained.
            datamodule: Whose rows are counted; the text is made tokens, as by fit.
            devices: How many. Left out: as --trainer.devices and --trainer.num_nodes say.
            hardware: Name of a GPU: h100, h200, a100, l40s, rtx4090 and others. Left out: this machine.
            mfu: Share of the devices' rate of matrix products that training is thought to reach.
            price: USD of a device for an hour.
            output: A JSON file for the same numbers.
        """
        if not 0 < mfu <= 1:
            raise ValueError(f"--mfu is {mfu}; pass a share above 0, up to 1")
        if price is not None and price < 0:
            raise ValueError(f"--price is {price}; pass USD of a device for an hour")
        if output is not None and not output.parent.is_dir():
            raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")
        if output is not None and output.is_dir():
            raise IsADirectoryError(f"--output {output} is a folder; name a file in it")
        device = self._device(hardware)
        self.datamodule, datamodule.trainer = datamodule, self
        self.strategy._lightning_module, model.trainer = model, self
        with simulation.ranks(self.world_size) if self.world_size > 1 else nullcontext():
            self.strategy.setup_environment()
            datamodule.prepare_data()
            datamodule.setup("fit")
            with cannot_be_planned(), planning.imagined(self, model, device) as foresee:
                found = planning.forecast(self, model, device, *foresee(datamodule.batch_size), mfu, price)
                most = planning.most_rows(foresee, found, datamodule.batch_size)
                shown = rows(found, self, model, is_measured=hardware is None)
                shown.pop("files")
                print_pairs("Plan", shown | planning.besides(found, self, most))
        if output is not None:
            output.write_text(json.dumps(found.summary() | {"most_rows": most}, indent=2) + "\n")

    def _device(self, name: str | None) -> Device:
        if name is not None:
            return hardware.gpu(name)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if "bf16" in str(self.precision) else torch.float32
        rate = hardware.matrix_flops(kind, dtype, torch.get_num_threads())
        return hardware.here(kind, rate, self.world_size if kind == "cpu" else 1)
