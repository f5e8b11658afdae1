"""The model that a run leaves, on the Hub."""

import sys
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from lightning.pytorch import Callback, LightningModule, Trainer

REFUSALS = (httpx.HTTPError, HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError)
"""No network, no login, no right to the name, no name."""


class Push(Callback):
    """Uploads the run's model folder when the run ends. Off unless it is told where to.

    Args:
        to: A name on the Hub, such as me/my-model, which is made where there is none.
        private: Whether only its owner sees it; of one that is there already nothing is changed.
    """

    def __init__(self, to: str | None = None, private: bool = True):
        self.to = to
        self.private = private

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Whether it will be possible is asked before anything is trained."""
        if self.to is None or stage != "fit" or not trainer.is_global_zero:
            return
        try:
            HfApi().create_repo(self.to, private=self.private, exist_ok=True)
        except REFUSALS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"--push.to {self.to}: the Hub did not take it ({reason}); hf auth login") from None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.to is None or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "model"
        try:
            HfApi().upload_folder(repo_id=self.to, folder_path=folder, commit_message=Path(folder).parent.name)
            print(f"pushed          {self.to}")
        except REFUSALS as error:  # the model is here all the same
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"warning: not pushed ({reason}); hf upload {self.to} {folder}", file=sys.stderr)
