"""What `predict` writes."""

import json
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class Predictions(BasePredictionWriter):
    """predictions.jsonl in the working folder or --trainer.default_root_dir: a line for each held-out row."""

    def __init__(self):
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        self.rows = 0
        self.path.write_text("")

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in prediction)
        self.rows += len(prediction)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        print(f"{self.rows:,} rows in {self.path}: their tokens and nats per token")
