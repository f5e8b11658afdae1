"""The end of a run."""

from lightning.pytorch import Callback, LightningModule, Trainer


class Horizon(Callback):
    """Stops at max_steps or max_tokens by `should_stop`, because Lightning validates a last time only then."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        steps_done = 0 < trainer.max_steps <= trainer.global_step
        if steps_done or (module.max_tokens and module.tokens >= module.max_tokens):
            trainer.should_stop = True
