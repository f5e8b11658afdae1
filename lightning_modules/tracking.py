"""Where a run's numbers go: metrics.csv always, Weights & Biases online when logged in, offline when not."""

import csv
import errno
import io
import netrc
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import requests
from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.checkpoint_io import replace_text
from lightning_modules.redaction import redacted

SOURCE = Path(__file__).parents[1]
RUN_ID = ".wandb_run_id"
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
    """Rows that cannot be written, such as to a full disk, wait for the next ones; none is torn."""

    _is_told = False

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the metrics of a run that is continued; they stay, and new rows go below."""
        self._header = read_rows(Path(self.metrics_file_path))[0]
        self.metrics_keys = list(self._header)

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        file, keys = Path(self.metrics_file_path), self.metrics_keys
        try:
            if self._header != keys or not file.is_file():
                header, rows = read_rows(file)
                old = [dict(zip(header, row, strict=True)) for row in rows]
                replace_text(file, as_text([keys, *([row.get(key, "") for key in keys] for row in old)]))
                self._header = list(keys)
            append(file, [[row.get(key, "") for key in keys] for row in self.metrics])
        except OSError as error:
            if not self._is_told:
                print(f"warning: {file} cannot be written ({error.strerror}); its rows wait", file=sys.stderr)
            self._is_told = True
            return
        self.metrics, self._is_told = [], False


def read_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of metrics.csv without those that a kill or a full disk tore; empty where there is none."""
    try:
        with file.open(newline="", errors="replace") as lines:
            header, *rows = list(csv.reader(line.replace("\0", "") for line in lines)) or [[]]
    except FileNotFoundError:
        return [], []
    if "step" not in header:
        return [], []
    at = header.index("step")
    return header, [row for row in rows if len(row) == len(header) and row[at].isdigit()]


def as_text(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def append(file: Path, rows: Sequence[Sequence[object]]) -> None:
    """All of them, or OSError and the file as it was."""
    content = as_text(rows).encode()
    place = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        before = os.fstat(place).st_size
        try:
            if os.write(place, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(place, before)
            raise
    finally:
        os.close(place)


class MetricsCSV(CSVLogger):
    """metrics.csv in the run's folder."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> FabricWriter:
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment


class _Shielded:
    """A W&B run whose failures are told once and change nothing."""

    def __init__(self, run: object, give_up: Callable[[Exception], None]):
        self._run, self._give_up = run, give_up

    def __getattr__(self, name: str) -> object:
        value = getattr(self._run, name)
        if not callable(value):
            return value

        def shielded(*args, **kwargs):
            try:
                return value(*args, **kwargs)
            except Exception as error:  # whatever W&B's own process, its server or its disk have come to
                self._give_up(error)

        return shielded


class ShieldedWandb(WandbLogger):
    """W&B never decides whether a run trains: a start that fails is tried again offline, and whatever fails later is
    left alone, with one warning; metrics.csv has everything."""

    gave_up = False

    def __init__(self, **settings):
        super().__init__(**settings)
        self._defined: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Each name is drawn over `tokens`, told by its exact name: Lightning's own definition is a glob, and where
        several fit a name the first of an unordered map wins."""
        for name in metrics.keys() - self._defined if rank_zero_only.rank == 0 else ():
            if "/" in name:
                self.experiment.define_metric(name, step_metric="tokens", step_sync=True)
            self._defined.add(name)
        super().log_metrics(metrics, step)

    @property
    def experiment(self) -> object:
        if self.gave_up or rank_zero_only.rank > 0:
            return _DummyExperiment()
        try:
            with _redacted_arguments():
                return _Shielded(WandbLogger.experiment.fget(self), self._give_up)
        except Exception as error:
            if self._wandb_init.get("mode") == "offline":
                self._give_up(error)
                return _DummyExperiment()
            _warn(f"{_first_line(error)}; this run is logged offline")
            import wandb

            wandb.teardown()  # whose process holds the run's id
            self._offline, self._wandb_init["mode"] = True, "offline"
            return self.experiment

    def log_hyperparams(self, params: dict) -> None:
        try:
            super().log_hyperparams(params)
        except Exception as error:
            self._give_up(error)

    def add_tags(self, tags: Sequence[str]) -> None:
        if isinstance(self.experiment, _DummyExperiment):  # asking for it begins the run, offline if it must
            return
        try:
            run = WandbLogger.experiment.fget(self)
            run.tags = tuple(dict.fromkeys([*(run.tags or ()), *(tag[:64] for tag in tags if tag)]))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self.gave_up:
            _warn(f"{_first_line(error)}; metrics.csv alone is written from here on; wandb sync brings what was logged")
        self.gave_up = True


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """W&B writes the command line down when a run begins."""
    arguments, sys.argv = sys.argv, shlex.split(redacted(shlex.join(sys.argv)))
    try:
        yield
    finally:
        sys.argv = arguments


def _warn(message: str) -> None:
    print(f"W&B: {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def loggers(folder: Path, recipe: str) -> list[Logger]:
    """metrics.csv, and W&B unless WANDB_MODE is disabled."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return [MetricsCSV(folder)]
    return [MetricsCSV(folder), wandb_logger(folder, recipe)]


def wandb_logger(folder: Path, recipe: str) -> WandbLogger:
    """Online if the server answers and takes the key, otherwise offline."""
    mode = wandb_mode()
    if mode == "offline":
        os.environ["WANDB_MODE"] = (
            mode  # read on import: W&B would send its own telemetry all the same, and wait for it
        )
    import wandb

    logger = ShieldedWandb(
        name=folder.name,
        save_dir=str(folder),
        id=run_id(folder),
        resume="allow",
        project=os.environ.get("WANDB_PROJECT", "lightning-lm-recipes"),
        group=recipe,
        job_type=recipe,
        mode=mode,
        # Where the source is, so that its commit, and what was changed since, are known.
        settings=wandb.Settings(console="off", silent=True, init_timeout=5, finish_timeout=20, git_root=str(SOURCE)),
    )
    # Lightning passes an option that W&B no longer has, at the price of a warning at the top of every run.
    logger._wandb_init.pop("anonymous", None)
    return logger


def run_id(folder: Path) -> str:
    """Of the run in a folder, the same whenever it goes on; another where nothing was logged yet."""
    file = folder / RUN_ID
    if given := os.environ.get("WANDB_RUN_ID"):  # a sweep's
        return given
    if rank_zero_only.rank > 0:
        return "none"  # of ranks that log nothing
    if not (file.is_file() and (folder / "metrics.csv").is_file()):
        file.write_text(f"{secrets.token_hex(4)}\n")
    return file.read_text().strip()


def wandb_mode() -> Literal["online", "offline"]:
    """ "online" where there is a key (WANDB_API_KEY or ~/.netrc) and a server that takes it within 2 s."""
    if os.environ.get("WANDB_MODE") == "offline":
        return "offline"
    server = (os.environ.get("WANDB_BASE_URL") or _server_in_settings() or "https://api.wandb.ai").rstrip("/")
    place = urlparse(server)
    host, key = place.hostname, os.environ.get("WANDB_API_KEY") or _key_in_netrc(place.netloc)
    if not key:
        return "offline"
    try:
        answer = requests.post(f"{server}/graphql", json={"query": "{viewer{id}}"}, auth=("api", key), timeout=2)
    except requests.RequestException:
        _warn(f"{host} does not answer; this run is logged offline")
        return "offline"
    if not answer.ok:
        _warn(f"{host} answers {answer.status_code} {answer.reason}; this run is logged offline")
    return "online" if answer.ok else "offline"


def _server_in_settings() -> str | None:
    """Of `wandb login --host`, which writes it down."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    settings = ConfigParser(interpolation=None)
    with suppress(ConfigParserError, OSError, UnicodeDecodeError):
        settings.read([folder / "settings", Path("wandb") / "settings"])
    return settings.get("default", "base_url", fallback=None)


def _key_in_netrc(host: str) -> str | None:
    """W&B writes a host with its port."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def forget_after(loggers: list[Logger], step: int) -> None:
    """Drops what metrics.csv says of steps after `step`, which are done again."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV) and (file := Path(logger.log_dir) / "metrics.csv").is_file():
            header, rows = read_rows(file)
            kept = [row for row in rows if int(row[header.index("step")]) < step]  # Lightning numbers steps from 0
            with written(file):
                replace_text(file, as_text([header, *kept])) if header else file.unlink()


@contextmanager
def written(file: Path) -> Iterator[None]:
    """What only tells of a run does not end it: a file that cannot be written is a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {file} is not written: {error.strerror or error}", file=sys.stderr)


def tag(loggers: list[Logger], *tags: str) -> None:
    """What a run is, beside what its project, group and job type say."""
    for logger in loggers:
        if isinstance(logger, ShieldedWandb):
            logger.add_tags(tags)


def log_event(loggers: list[Logger], name: str, value: float, tokens: int) -> None:
    """What ought not to happen often, as a point of events/NAME over `tokens`; unusual_steps.jsonl says more."""
    for logger in loggers:
        if isinstance(logger, ShieldedWandb):
            logger.log_metrics({f"events/{name}": value, "tokens": tokens})


def keep_model(loggers: list[Logger], folder: Path, aliases: Sequence[str]) -> None:
    """The model's folder as an artifact of the run."""
    import wandb

    for logger in loggers:
        if isinstance(logger, ShieldedWandb) and rank_zero_only.rank == 0:
            try:  # it copies the folder
                artifact = wandb.Artifact(f"model-{logger.version}", type="model")
                artifact.add_dir(str(folder))
            except Exception as error:
                _warn(f"{_first_line(error)}; {folder} is no artifact")
                continue
            logger.experiment.log_artifact(artifact, aliases=list(aliases))


def finish(loggers: list[Logger]) -> None:
    """Closes the W&B run, so that its file is whole; metrics.csv is, after each line."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        if isinstance(logger, ShieldedWandb):  # no user's own
            folder = Path(logger.save_dir) / "wandb"
            if not logger.gave_up and folder.exists() and shutil.disk_usage(folder).free < 2**20:
                _warn(f"the disk of {folder} is full: what is there may lack the end; metrics.csv has it")
            if logger.gave_up:
                import wandb

                with suppress(Exception):  # its process is gone, which it would say by a traceback at exit
                    wandb.teardown()
