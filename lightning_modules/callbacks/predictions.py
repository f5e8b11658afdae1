"""What a model makes of the held-out examples, as lines of JSON."""

import json
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.callbacks.report import best_by
from lightning_modules.redaction import redacted

SHOWN = 64
"""Examples in the table of W&B."""


class Predictions(BasePredictionWriter):
    """predictions.jsonl in the working folder or --trainer.default_root_dir: a line for each held-out row, in order."""

    def __init__(self):
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        self.rows: list[dict] = []
        self.path.write_text("")

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.rows += prediction

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.rows.sort(key=lambda row: row["row"])
        self.path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        print(f"{len(self.rows):,} rows in {self.path}: {', '.join(self.rows[0] if self.rows else ())}")


class HeldOutPredictions(Callback):
    """predictions.jsonl in a run's folder, of the best validation so far: what an example is, and what the model makes
    of it. To W&B a table of some, errors first."""

    def __init__(self) -> None:
        self.best: float | None = None

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            module.predictions.clear()
            return
        found = self._of_all_ranks(trainer, module)
        name, sign = best_by(trainer)
        figure = sign * float(trainer.callback_metrics[f"val/{name}"])
        if not trainer.is_global_zero or (self.best is not None and figure >= self.best):
            return
        self.best = figure
        examples = trainer.datamodule.store.records("val")
        lines = [{"row": row} | examples[row] | found[row] for row in sorted(found)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (Path(trainer.default_root_dir) / "predictions.jsonl").write_text(text)  # the user's own examples, as they are
        errors_first = sorted(lines, key=lambda line: (line["score"], line["row"]))[:SHOWN]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and errors_first:
                columns = [column for column in errors_first[0] if column != "probabilities"]
                rows = [[redacted(str(line[column])) for column in columns] for line in errors_first]
                logger.log_text("predictions", columns=columns, data=rows)

    @staticmethod
    def _of_all_ranks(trainer: Trainer, module: LightningModule) -> dict[int, dict[str, object]]:
        mine, module.predictions = module.predictions, {}
        if trainer.world_size == 1:
            return mine
        of_ranks: list[dict] = [{}] * trainer.world_size
        dist.all_gather_object(of_ranks, mine)
        return {row: prediction for rank in of_ranks for row, prediction in rank.items()}

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best = state_dict["best"]
