"""The model that a run leaves, in W&B."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import tracking


class ModelArtifact(Callback):
    """Logs the run's model folder as an artifact of W&B when the run ends, with the aliases best and latest.

    Args:
        aliases: Others beside these, such as a stage.
    """

    def __init__(self, aliases: list[str] | None = None):
        self.aliases = aliases or []

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "model"
            tracking.keep_model(trainer.loggers, folder, ["best", "latest", *self.aliases])
