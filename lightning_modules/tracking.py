"""Where a run's numbers go: metrics.csv always, Weights & Biases online when logged in, offline when not."""

import csv
import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
    "perf/tokens_per_second",
    "perf/mfu",
)
"""The stable names, each drawn over `tokens`."""


class _Writer(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the metrics of a run that is continued; they stay, and new rows go below."""
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r") as file:
                self.metrics_keys = file.readline().strip().split(",")


class MetricsCSV(CSVLogger):
    """metrics.csv in the run's folder."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> FabricWriter:
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment


def loggers(folder: Path, recipe: str) -> list[Logger]:
    """metrics.csv, and W&B unless WANDB_MODE is disabled."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return [MetricsCSV(folder)]
    return [MetricsCSV(folder), wandb_logger(folder, recipe)]


def wandb_logger(folder: Path, recipe: str) -> WandbLogger:
    """Online if there is a key and the server answers, otherwise offline: W&B never decides whether a run trains."""
    import wandb

    logger = WandbLogger(
        name=folder.name,
        save_dir=str(folder),
        project=os.environ.get("WANDB_PROJECT", "lightning-lm-recipes"),
        group=recipe,
        job_type=recipe,
        offline=wandb_mode() == "offline",
        settings=wandb.Settings(console="off", silent=True, init_timeout=20, finish_timeout=60),
    )
    # Lightning passes an option that W&B no longer has, at the price of a warning at the top of every run.
    logger._wandb_init.pop("anonymous", None)
    return logger


def wandb_mode() -> str:
    """ "online" with a key (WANDB_API_KEY or ~/.netrc) and a server that answers within 3 s, else "offline"."""
    if os.environ.get("WANDB_MODE") == "offline":
        return "offline"
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not (os.environ.get("WANDB_API_KEY") or _in_netrc(server.hostname)):
        return "offline"
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname, port), timeout=3).close()
    except OSError:
        print(f"W&B: {server.hostname} does not answer; this run is logged offline")
        return "offline"
    return "online"


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def forget_after(loggers: list[Logger], step: int) -> None:
    """Drops what metrics.csv says of steps after `step`, which are done again."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV) and (file := Path(logger.log_dir) / "metrics.csv").is_file():
            with file.open(newline="") as lines:
                header, *rows = list(csv.reader(lines))
            at = header.index("step")
            kept = [row for row in rows if int(row[at]) < step]  # Lightning numbers steps from 0
            with file.open("w", newline="") as lines:
                csv.writer(lines, lineterminator="\n").writerows([header, *kept])


def define_metrics(logger: Logger) -> None:
    """Exact names over `tokens`: Lightning's own definition is a glob, and the first match of an unordered map wins."""
    if isinstance(logger, WandbLogger):
        for name in METRICS:
            logger.experiment.define_metric(name, step_metric="tokens", step_sync=True)


def finish(loggers: list[Logger]) -> None:
    """Closes the W&B run, so that its file is whole; metrics.csv is, after each line."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
