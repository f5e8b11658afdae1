"""What the machine draws while something runs, by codecarbon, which needs no network for it.

A GPU's energy is read from its own counter (NVML), a CPU's from its own (RAPL) where the system lets one. What has no
counter is estimated from the CPU's rating and load and the size of the memory, and said to be.
"""

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codecarbon.output import EmissionsData

JOULES_PER_KWH = 3.6e6
WORLD = "WLD"
"""A country that the tables do not have: the world's average, 475 g of CO2e a kWh."""


@dataclass(frozen=True)
class Energy:
    joules: float = 0.0
    co2e_grams: float = 0.0
    by: str = ""
    """What was measured, and what was estimated."""

    @property
    def kwh(self) -> float:
        return self.joules / JOULES_PER_KWH

    @property
    def is_estimate(self) -> bool:
        return not self.by.startswith("measured")

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(self.joules + other.joules, self.co2e_grams + other.co2e_grams, other.by or self.by)


def is_installed() -> bool:
    return importlib.util.find_spec("codecarbon") is not None


def is_wanted() -> bool:
    """Where codecarbon is installed, unless LIGHTNING_LM_ENERGY says off."""
    return is_installed() and os.environ.get("LIGHTNING_LM_ENERGY") != "off"


class Meter:
    """Reads what the machine has drawn since it began, all processes together.

    Args:
        country: By whose electricity CO2e is counted, such as DEU; None: the world's average.
        works: cpu or cuda, what computes: where its own energy is estimated, all of it is said to be.
    """

    def __init__(self, country: str | None = None, works: str = "cpu"):
        self.country, self.works, self.drawn = country or WORLD, works, Energy()
        self._tracker = None
        self._starting: threading.Thread | None = None

    def start(self) -> None:
        """In the background: what the machine is made of takes a second to find out."""
        self._starting = threading.Thread(target=self._start, daemon=True)
        self._starting.start()

    def _start(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker

            logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads its log_level
            settings = {"save_to_file": False, "log_level": "critical", "allow_multiple_runs": True}
            self._tracker = OfflineEmissionsTracker(country_iso_code=self.country, **settings)
            self._tracker.start()
        except Exception as error:  # whatever a machine's counters are; a run does not end by it
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"warning: no energy is measured: {type(error).__name__}: {error}", file=sys.stderr)
        self._tracker = None

    def read(self) -> Energy:
        """So far; goes on."""
        self._wait()
        if self._tracker is None:
            return self.drawn
        try:
            self._tracker.flush()
            return self.drawn + self._energy(self._tracker._prepare_emissions_data())
        except Exception as error:
            self._give_up(error)
            return self.drawn

    def _wait(self) -> None:
        if self._starting is not None:
            self._starting.join()
            self._starting = None

    def _energy(self, found: "EmissionsData") -> Energy:
        return Energy(JOULES_PER_KWH * found.energy_consumed, 1000 * found.emissions, how(self.works))

    def stop(self) -> Energy:
        self._wait()
        if self._tracker is not None:
            try:
                self._tracker.stop()
                self.drawn += self._energy(self._tracker.final_emissions_data)
            except Exception as error:
                self._give_up(error)
            self._tracker = None
        return self.drawn


def how(works: str) -> str:
    """measured: … (estimated: …), or estimated: … (measured: …), as that of what computes is."""
    from codecarbon.core.cpu import is_rapl_available
    from codecarbon.core.gpu import is_gpu_details_available

    measured = ["GPU"] if is_gpu_details_available() else []
    measured += ["CPU"] if is_rapl_available() else []
    estimated = [*([] if "CPU" in measured else ["CPU by its rating and load"]), "memory by its size"]
    words = [f"measured: {', '.join(measured)}", f"estimated: {', '.join(estimated)}"]
    if not measured:
        return words[1]
    first, second = words if ("GPU" if works == "cuda" else "CPU") in measured else words[::-1]
    return f"{first} ({second})"


def joules_of(call: Callable[[], object], times: int, meter: Meter | None = None) -> Energy:
    """Of one call, out of so many."""
    meter = meter or Meter()
    meter._start()
    for _ in range(times):
        call()
    drawn = meter.stop()
    return Energy(drawn.joules / times, drawn.co2e_grams / times, drawn.by)
