"""What a run leaves behind: the model folder, summary.json, and the table at the end."""

import errno
import gzip
import json
import lzma
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_modules import hardware, planning
from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.callbacks.energy import Energy
from lightning_modules.callbacks.plan import Plan, precision, print_pairs
from lightning_modules.callbacks.speed import Speed
from lightning_modules.checkpoint_io import replace_folder
from lightning_modules.command_line import fail
from lightning_modules.finetune import FineTune
from lightning_modules.redaction import redacted
from lightning_modules.shards import whole

FILES = ("report.html", "model/", "summary.json", "config.yaml", "metrics.csv", "checkpoints/")
PACKAGES = ("lightning", "torch", "transformers", "tokenizers", "wandb")
MOST_COMPRESSED_BYTES = 8_000_000
"""Held-out text up to which gzip and xz are run for comparison: seconds, not minutes."""


class Report(Callback):
    """Exports the best weights as a transformers folder and says what came of the run."""

    def __init__(self):
        self.validations: list[dict[str, float]] = []
        """What each validation found, by the names behind val/."""
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = time.perf_counter()

    def state_dict(self) -> dict:
        return {"validations": self.validations, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.validations = [dict(found) for found in state_dict["validations"]]
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            found = {name.removeprefix("val/"): float(metrics[name]) for name in metrics if name.startswith("val/")}
            self.validations.append(found)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        seconds = self._seconds()
        folder = Path(trainer.default_root_dir)
        restore_best(trainer, module)
        weights = whole_weights(module.network) if module.is_sharded else None
        if not trainer.is_global_zero:
            return
        summary = self.summary(trainer, module, seconds)
        with one_line_of_a_full_disk(folder, module), nullcontext() if weights is None else module.as_whole(weights):
            save_model(folder / "model", module, trainer.datamodule.tokenizer, model_card(summary, trainer, module))
            module.save_beside(folder)
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print_pairs("Result", self.rows(summary, trainer, module))

    def summary(self, trainer: Trainer, module: LightningModule, seconds: float) -> dict[str, object]:
        speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
        tokens = int(module.tokens)
        name, sign = best_by(trainer)
        none = {"loss": None, name: None}
        best = min(self.validations, key=lambda found: sign * found[name], default=none)
        last = self.validations[-1] if self.validations else best
        return {f"val_{name}": value for name, value in best.items()} | {
            f"val_{name}_final": last[name],
            "tokens": tokens,
            "steps": trainer.global_step,
            "seconds": round(seconds, 3),
            "tokens_per_second": speed.mean_tokens_per_second(module),
            "mfu": speed.mean_mfu(module),
            "parameters": parameter_count(module.network),
            "peak_memory_bytes": peak_memory_bytes(),
            "precision": precision(trainer, module),
            "objective": module.objective,
            **module.about(),
            "hardware": hardware.describe(),
            "skipped_rows": sum(trainer.datamodule.skipped_rows.values()),
            **planned_and_measured(trainer, module, speed),
            **energy_of(trainer).summary(tokens),
            "baselines": compressors(trainer, seconds) if module.objective == "causal" else {},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "model_dir": str(Path(trainer.default_root_dir) / "model"),
        }

    def rows(self, summary: dict, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        rows = module.results(summary)
        if self.validations:
            name, _ = best_by(trainer)
            rows[f"val {name}, last"] = f"{summary[f'val_{name}_final']:.4f}"
        rows |= {f"  {name}": f"{bits:.4f} on the same text" for name, bits in summary["baselines"].items()}
        rows |= {
            "trained": f"{summary['tokens']:,} tokens, {summary['steps']:,} steps, {summary['seconds']:,.0f} s",
            "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.0%}",
            "peak memory": bytes_of(summary["peak_memory_bytes"]),
            "energy": energy_of(trainer).words(summary["tokens"]),
            "files": f"{trainer.default_root_dir}: {', '.join(FILES)}",
        }
        if offline := offline_runs(trainer):
            rows["W&B"] = f"offline; look at it with wandb leet, upload it with wandb sync {offline}"
        rows["next"] = module.next_command(shlex.quote(summary["model_dir"]), trainer.datamodule)
        return rows


def energy_of(trainer: Trainer) -> Energy:
    return next((c for c in trainer.callbacks if isinstance(c, Energy)), None) or Energy(measure=False)


def planned_and_measured(trainer: Trainer, module: LightningModule, speed: Speed) -> dict[str, object]:
    plan = next((c for c in trainer.callbacks if isinstance(c, Plan)), None)
    if plan is None or plan.forecast is None:  # of a run that was over when it was taken up
        return {}
    measured = {
        "peak_memory_bytes": plan.measured_memory(module.device.type),
        "memory_of": "tensors" if module.device.type == "cuda" else "process",
        "steps": trainer.global_step,
        "tokens": int(module.tokens),
        "seconds": round(speed.training_seconds, 3),
        "mfu": speed.mean_mfu(module),
    }
    return {
        "planned": plan.forecast.summary() | {"limit_seconds": planning.time_allowed(trainer)},
        "measured": measured,
    }


def best_by(trainer: Trainer) -> tuple[str, int]:
    """The metric behind val/ by which the best weights are kept, and 1 where less is better, else -1."""
    checkpoint = trainer.checkpoint_callback
    if checkpoint is None or not (checkpoint.monitor or "").startswith("val/"):
        return "loss", 1
    return checkpoint.monitor.removeprefix("val/"), -1 if checkpoint.mode == "max" else 1


@contextmanager
def one_line_of_a_full_disk(folder: Path, module: LightningModule) -> Iterator[None]:
    """What was trained is not lost by it: the checkpoints are as they were."""
    try:
        yield
    except Exception as error:  # safetensors has one of its own
        shutil.rmtree(folder / ".model.partial", ignore_errors=True)
        needed = sum(p.numel() * p.element_size() for p in module.parameters())
        free = shutil.disk_usage(folder).free
        if free > 2 * needed and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        place = folder / "model"
        fail(
            f"{place} was not written: it needs more than {needed:,} bytes, and {free:,} are free; make room, and the "
            "same command with --ckpt_path last goes on from the last checkpoint",
            code=1,
        )


def restore_best(trainer: Trainer, module: LightningModule) -> None:
    """Loads the weights of the best checkpoint, if that is not the last step's."""
    checkpoint = trainer.checkpoint_callback
    if checkpoint is None or not checkpoint.best_model_path:
        return
    try:
        best = trainer.strategy.load_checkpoint(checkpoint.best_model_path)
    except (OSError, ValueError) as error:
        print(f"warning: the last weights are exported, not the best: {error}", file=sys.stderr)
        return
    if best["global_step"] != trainer.global_step and "state_dict" in best:
        module.load_state_dict(best["state_dict"])


def whole_weights(network: nn.Module) -> dict[str, Tensor] | None:
    """Of a sharded network, in the memory of the first rank alone: one weight after the other is made whole."""
    weights = dict(network.named_parameters(remove_duplicate=False))
    found, once = {}, {}
    for name, tensor in network.state_dict().items():
        weight = weights.get(name, tensor)
        if id(weight) not in once:  # of several names, such as embedding and head, there is one
            complete = whole(tensor)
            once[id(weight)] = complete.cpu() if torch.distributed.get_rank() == 0 else None
        found[name] = once[id(weight)]
    return found if torch.distributed.get_rank() == 0 else None


def save_model(folder: Path, module: LightningModule, tokenizer, card: str) -> None:
    """A folder that AutoModelFor….from_pretrained and AutoTokenizer load, with a card; replaced whole or not at all."""
    network = module.exported()
    if network.can_generate() and not isinstance(module, FineTune):  # which says itself how answers are written
        network.generation_config.eos_token_id = network.config.eos_token_id or tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        network.generation_config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    transformers.utils.logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    replace_folder(temporary, folder)


def model_card(summary: dict, trainer: Trainer, module: LightningModule) -> str:
    name = Path(trainer.default_root_dir).name
    metrics = [key for key in summary if key.startswith("val_") and not key.endswith("_final")]
    numbers = "".join(
        f"| {key} | {summary[key]:,.4f} |\n" if isinstance(summary[key], float) else f"| {key} | {summary[key]} |\n"
        for key in (*metrics, "tokens", "steps", "seconds", "parameters", "precision", "hardware")
    )
    card = f"""---
library_name: transformers
tags: [language-model, pytorch-lightning]
---

# {name}

{module.made_from(trainer.datamodule)}

| | |
|---|---|
{numbers}
{module.units}

Made by:

```
{shlex.join(["python", *sys.argv])}
```
"""
    return redacted(card)


def peak_memory_bytes() -> int:
    """Of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would start from the parent's
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compressors(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Bits per byte of gzip and xz on the held-out documents, one after the other; {} where that would take long
    or a model that sees both sides of a token would be compared.

    Where the run was long enough for it not to matter, also of xz that has read the training text first.
    """
    data, about = trainer.datamodule, trainer.datamodule.describe()
    if data.objective != "causal" or about["val_bytes"] > MOST_COMPRESSED_BYTES:
        return {}
    held_out = b"".join(data.val_documents())
    bits = 8 / max(1, len(held_out))
    baselines = {
        "gzip -9": len(gzip.compress(held_out, 9)) * bits,
        "xz -9": len(lzma.compress(held_out, preset=9)) * bits,
    }
    if about["train_bytes"] / 1e6 < 0.05 * seconds:
        train = "".join(data.documents("train")).encode()
        extra = len(lzma.compress(train + held_out, preset=9)) - len(lzma.compress(train, preset=9))
        baselines["xz -9 after the training text"] = extra * bits
    return baselines


def offline_runs(trainer: Trainer) -> str | None:
    """A glob: each time that a run goes on it has one more, and all of them are one run."""
    runs = Path(trainer.default_root_dir) / "wandb"
    return f"{shlex.quote(str(runs))}/offline-run-*" if list(runs.glob("offline-run-*")) else None
