"""Joules and CO2e of a run, that before a restart included."""

import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import energy
from lightning_modules.energy import Energy as Drawn


class Energy(Callback):
    """Measures, or estimates, what the machines of a run draw while it trains; see lightning_modules/energy.py.

    Args:
        measure: Whether to. Left out: where codecarbon is installed, unless LIGHTNING_LM_ENERGY is off.
        country: By whose electricity CO2e is counted, by three letters such as DEU. Left out: the world's average.
    """

    def __init__(self, measure: bool | None = None, country: str | None = None):
        if measure and not energy.is_installed():
            raise ValueError("--energy.measure needs codecarbon, which is not installed: pip install -e '.[energy]'")
        self.measure = energy.is_wanted() if measure is None else measure
        self.country = country
        self.meter: energy.Meter | None = None
        self.before = Drawn()
        self.machines = 1
        """A checkpoint, which one rank writes, takes all for as hungry as its own."""
        self.drawn: Drawn | None = None
        """Of all machines, once the training is over."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.machines = trainer.num_nodes
        if self.measure and trainer.local_rank == 0:  # it is the machine's
            self.meter = energy.Meter(self.country, module.device.type)
            self.meter.start()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        here = Drawn() if self.meter is None else self.meter.stop()
        self.meter = None
        figures = torch.tensor([here.joules, here.co2e_grams], dtype=torch.float64, device=module.device)
        # By all ranks, whatever each one's machine has installed.
        joules, co2e_grams = trainer.strategy.reduce(figures, reduce_op="sum").tolist()
        if not self.measure:
            return
        self.drawn = self.before + Drawn(joules, co2e_grams, here.by)
        if not self.drawn.joules and trainer.is_global_zero:
            print("warning: the energy of this run could not be measured", file=sys.stderr)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.meter is not None:
            self.meter.stop()
            self.meter = None

    def state_dict(self) -> dict:
        found = self.drawn or self.before
        if self.meter is not None:
            here = self.meter.read()
            found = self.before + Drawn(self.machines * here.joules, self.machines * here.co2e_grams, here.by)
        return {"joules": found.joules, "co2e_grams": found.co2e_grams, "by": found.by}

    def load_state_dict(self, state_dict: dict) -> None:
        self.before = Drawn(state_dict["joules"], state_dict["co2e_grams"], state_dict.get("by", ""))

    def summary(self, tokens: int) -> dict[str, object]:
        """{} where nothing was measured."""
        drawn = self.of_all
        if not drawn.joules:
            return {}
        found = {"joules": round(drawn.joules, 1), "kwh": drawn.kwh, "co2e_grams": drawn.co2e_grams}
        found["joules_per_million_tokens"] = 1e6 * drawn.joules / max(1, tokens)
        return {"energy": found | {"by": drawn.by}}

    def words(self, tokens: int) -> str:
        if not self.measure:
            return "not measured; pip install -e '.[energy]'"
        drawn = self.of_all
        if not drawn.joules:
            return "could not be measured"
        joules = f"{'about ' if drawn.is_estimate else ''}{in_words(drawn.joules)}"
        per_million = in_words(1e6 * drawn.joules / max(1, tokens))
        return f"{joules}, {drawn.co2e_grams:.2g} g CO2e; {per_million} a million tokens ({drawn.by})"

    @property
    def of_all(self) -> Drawn:
        """Of the whole run; one that was over when it was taken up has drawn nothing since."""
        return self.drawn or self.before


def in_words(joules: float) -> str:
    """With the unit that leaves few digits."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0)):
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules:.2g} J"
