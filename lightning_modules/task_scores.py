"""What a model is worth at the task that it was fine-tuned for: its own validation, in a process of its own."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from lightning_modules.callbacks.comparison import other_run
from lightning_modules.callbacks.predictions import METRICS

RECIPE = Path(__file__).parents[1] / "recipes" / "finetune.py"


@dataclass(frozen=True)
class TaskScores:
    """A validation of fine-tuning.

    Args:
        by: The metric that the run was kept by.
        more_is_better: Whether of that metric.
        metrics: All of them.
        scores_D: Of each example, as predictions.jsonl has it: 1 or 0 of labels, F1 of answers, of texts the task's
            own measure of a sentence.
        predictions: Of each example.
        confidence_D: Of labels of which one is right, the probability of the one that is said.
    """

    by: str
    more_is_better: bool
    metrics: dict[str, float]
    scores_D: np.ndarray
    predictions: list[object]
    confidence_D: np.ndarray | None

    @property
    def metric(self) -> float:
        return self.metrics[self.by]


def task_config(folder: str) -> Path | None:
    """The config.yaml of the fine-tuning whose run or model lies there; None if there is none."""
    for place in (Path(folder), Path(folder).parent):
        try:
            config = yaml.safe_load((place / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(config, dict) and "from" in ((config.get("model") or {}).get("init_args") or {}):
            return place / "config.yaml"
    return None


def task_scores(config: Path, model: str) -> TaskScores:
    """Raises ValueError with the last line that the validation said, where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"config": config, "model.from": model, "model.adapter": "null", "trainer.default_root_dir": folder}
        flags |= {"trainer.strategy": "auto", "trainer.devices": 1, "trainer.num_nodes": 1}
        words = [sys.executable, str(RECIPE), "validate", *(f"--{name}={value}" for name, value in flags.items())]
        process = subprocess.run(words, env=other_run(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:]
            raise ValueError(f"the validation of {model} by {config} failed: {' '.join(last)}")
        found = json.loads((Path(folder) / METRICS).read_text())
        lines = (Path(folder) / "predictions.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["row"])
    scores_D, predictions = np.array([row["score"] for row in rows], float), [row["prediction"] for row in rows]
    return TaskScores(found["by"], found["more_is_better"], found["metrics"], scores_D, predictions, confidence(rows))


def confidence(rows: list[dict]) -> np.ndarray | None:
    """None where the scores are not whether one of the labels is right."""
    if not all(
        isinstance(row["prediction"], str) and row["prediction"] in row.get("probabilities", {}) for row in rows
    ):
        return None
    if not {row["score"] for row in rows} <= {0.0, 1.0}:
        return None
    return np.array([row["probabilities"][row["prediction"]] for row in rows])
