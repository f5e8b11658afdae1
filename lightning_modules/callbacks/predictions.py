"""What a model makes of the held-out examples, as lines of JSON."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import WandbLogger

from lightning_modules import tracking
from lightning_modules.callbacks.report import best_by
from lightning_modules.finetune import FineTune
from lightning_modules.redaction import redacted_prose

METRICS = "metrics.json"
SHOWN = 64
"""Examples in the table of W&B."""


class Predictions(BasePredictionWriter):
    """predictions.jsonl in the working folder or --trainer.default_root_dir: a line for each row, in order.

    Of pretraining each rank writes its rows; of fine-tuning the first rank writes all, each beside what was asked, and
    those of --data.predict_path to predictions_new.jsonl.
    """

    def __init__(self):
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        rank = f"-rank{trainer.global_rank}" if trainer.global_rank or self._of_ranks(trainer, module) else ""
        asked = "" if not isinstance(module, FineTune) or trainer.datamodule.has_answers else "_new"
        self.path = Path(trainer.default_root_dir) / f"predictions{asked}{rank}.jsonl"
        self.rows: list[dict] = []

    @staticmethod
    def _of_ranks(trainer: Trainer, module: LightningModule) -> bool:
        return trainer.world_size > 1 and not isinstance(module, FineTune)

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.rows += prediction or []

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(module, FineTune):
            if not trainer.is_global_zero:
                return
            self.rows = _lines(trainer, module.predictions)
        self.rows.sort(key=lambda row: row["row"])
        self.path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        print(f"{len(self.rows):,} rows in {self.path}: {', '.join(self.rows[0] if self.rows else ())}")


def _lines(trainer: Trainer, predictions: dict[int, dict[str, object]]) -> list[dict[str, object]]:
    """What was asked, and what was made of it."""
    asked = trainer.datamodule.asked
    return [{"row": row} | asked[row] | predictions[row] for row in sorted(predictions)]


class HeldOutPredictions(Callback):
    """predictions.jsonl in a run's folder, of the best validation so far: what an example is, and what the model makes
    of it. To W&B a table of some, errors first.

    `validate` and `test` write it, and metrics.json, where --trainer.default_root_dir names a folder.
    """

    def __init__(self) -> None:
        self.best: float | None = None

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, FineTune):
            return
        found, module.predictions = module.predictions, {}
        if trainer.sanity_checking:
            return
        name, sign = best_by(trainer)
        if trainer.state.fn != "fit":
            if trainer.is_global_zero and Path(trainer.default_root_dir).resolve() != Path.cwd():
                _write(trainer, found, {"by": name, "more_is_better": sign < 0})
            return
        figure = sign * float(trainer.callback_metrics[f"val/{name}"])
        if not trainer.is_global_zero or (self.best is not None and figure >= self.best):
            return
        self.best = figure
        lines = _lines(trainer, found)
        _write_lines(Path(trainer.default_root_dir), lines)
        errors_first = sorted(lines, key=lambda line: (line["score"], line["row"]))[:SHOWN]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and errors_first:
                columns = [column for column in errors_first[0] if column != "probabilities"]
                rows = [[redacted_prose(str(line[column])) for column in columns] for line in errors_first]
                logger.log_text("predictions", columns=columns, data=rows)

    on_test_end = on_validation_end

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best = state_dict["best"]


def _write_lines(folder: Path, lines: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with tracking.written(folder / "predictions.jsonl"):
        (folder / "predictions.jsonl").write_text(text)  # the user's own examples, as they are


def _write(trainer: Trainer, predictions: dict[int, dict[str, object]], about: dict[str, object]) -> None:
    folder, metrics = Path(trainer.default_root_dir), trainer.callback_metrics
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder, _lines(trainer, predictions))
    found = {name.partition("/")[2]: float(value) for name, value in metrics.items() if "/" in name}
    (folder / METRICS).write_text(json.dumps(about | {"metrics": found}, indent=2) + "\n")
