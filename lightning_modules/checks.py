"""Checks of a run that is about to begin, on its own model, text and device: `python recipes/pretrain.py verify`.

Shape suffixes: B rows, T tokens of a row, N any flattened count.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.callbacks.plan import marked
from lightning_modules.callbacks.report import save_model
from lightning_modules.completion import Completion
from lightning_modules.distillation import Distilled
from lightning_modules.distillation_loss import Matching, Sparse, kept_words, linear_distillation
from lightning_modules.finetune import FineTune
from lightning_modules.losses import IGNORED, Head
from lightning_modules.taught import Taught

WINDOW = 32
"""Tokens of held-out text that count as seen in training where they stand there in a row."""


@dataclass(frozen=True)
class Check:
    """One line of the table: a figure, and whether it is what it must be."""

    name: str
    measured: str
    passed: bool

    def line(self, width: int) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<{width}}  {self.measured}"


class Checks(Callback):
    """Makes the checks that need no other process before the first step, then ends the run.

    Args:
        report: Where the lines are written, as JSON.
    """

    def __init__(self, report: str):
        self.report = Path(report)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.network.eval()  # dropout draws anew for each split of a batch
        batch = first_batch(trainer)
        checks = [
            gradient_splits(trainer, module, batch),
            schedule_end(trainer, module),
            exported(trainer, module, batch),
        ]
        if isinstance(module, FineTune):
            checks += [held_out_apart(trainer), padded(trainer, module)]
            checks += [written(trainer, module)] if isinstance(module, Completion) else []
            lines = [marked(trainer.datamodule.shown(i)) for i in range(min(3, trainer.datamodule.rows_per_epoch))]
        else:
            checks += [labels(trainer, batch), overlap(trainer)]
            lines = loss_positions(trainer, batch)
        if isinstance(module, Taught):
            checks.append(own_teacher(module, batch))
        if isinstance(module, Distilled):
            checks.append(drawn_words(module, batch))
        if module.objective == "causal":
            checks += [packed(trainer, module), generation(trainer, module, batch)]
        module.network.train()
        self.report.write_text(json.dumps({"checks": [asdict(check) for check in checks], "labels": lines}))
        trainer.should_stop = True
        trainer.limit_val_batches = 0


def first_batch(trainer: Trainer) -> dict[str, Tensor]:
    batch = next(iter(trainer.datamodule.train_dataloader()))
    return trainer.strategy.batch_to_device(batch)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a part of the largest number."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def at_most(name: str, what: str, figure: float, limit: float) -> Check:
    return Check(name, f"{what}: {figure:.1e} (at most {limit:.0e})", figure <= limit)


def gradient_splits(trainer: Trainer, module: LightningModule, batch: dict[str, Tensor]) -> Check:
    """The gradient of a step, by the module's own hooks, in 1, 2 and 4 micro-batches."""
    rows = len(batch["rows"])
    splits = [parts for parts in (1, 2, 4) if parts <= rows and rows % parts == 0]
    gradients = [step_gradient(trainer, module, batch, parts) for parts in splits]
    worst = max((difference(gradients[0], other) for other in gradients[1:]), default=0.0)
    cuts = ", ".join(f"{rows // parts}×{parts}" for parts in splits)
    return at_most("gradient under other splits", f"{cuts} rows × micro-batches", worst, 1e-5)


def step_gradient(trainer: Trainer, module: LightningModule, batch: dict[str, Tensor], parts: int) -> Tensor:
    """All gradients, flat, as the optimizer would get them."""
    accumulated, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, parts
    module.wishes = [0.0, 0.0, 0.0]
    rows = len(batch["rows"]) // parts
    with trainer.precision_plugin.train_step_context():
        for i in range(parts):
            piece = {name: value[i * rows : (i + 1) * rows] for name, value in batch.items()}
            trainer.strategy.backward(module.training_step(piece, i) / parts, None)
    module.on_before_optimizer_step(trainer.optimizers[0])
    module.configure_gradient_clipping(trainer.optimizers[0])
    trainer.accumulate_grad_batches = accumulated
    flat = torch.cat([p.grad.flatten().float() for p in module.network.parameters() if p.grad is not None])
    module.tokens = 0
    trainer.optimizers[0].zero_grad()
    return flat


def schedule_end(trainer: Trainer, module: LightningModule) -> Check:
    """The learning rate's factor at the last step of the run."""
    steps = trainer.max_steps
    if steps <= 0 and trainer.max_epochs and trainer.max_epochs > 0:
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches) * trainer.max_epochs
    if steps <= 0:
        steps = 10**6  # in time or tokens: any number of steps
    last = module.schedule.factor(steps - 1, (steps - 0.5) / steps)
    final = vars(module.schedule).get("final")
    end = "no end of its own" if final is None else f"its end is {final:g}"
    passed = final is None or abs(last - final) <= 2 / steps
    name = type(module.schedule).__name__
    return Check("schedule", f"{name}: factor {last:.5f} in step {steps:,} of {steps:,}; {end}", passed)


def labels(trainer: Trainer, batch: dict[str, Tensor]) -> Check:
    """In causal rows each label is the token after it, ends of text included; in others some positions carry loss."""
    data = trainer.datamodule
    ids_BT, labels_BT = batch["input_ids"].cpu(), batch["labels"].cpu()
    carries_BT = labels_BT != IGNORED
    share = float(carries_BT.float().mean())
    if data.objective != "causal":
        return Check("labels", f"{share:.1%} of the positions carry loss", 0 < share < 1)
    shifted = bool((ids_BT[:, 1:] == labels_BT[:, :-1])[carries_BT[:, :-1]].all())
    starts = data.store.train.document_bounds[:-1]
    ends = int((np.asarray(data.store.train.tokens_N[starts]) == data.document_start).sum())
    measured = f"{share:.1%} carry loss, each the next token; {ends:,} of {len(starts):,} documents are set apart"
    return Check("labels", measured, shifted and share > 0 and ends == len(starts))


def loss_positions(trainer: Trainer, batch: dict[str, Tensor], rows: int = 3, tokens: int = 12) -> list[str]:
    """The beginnings of some rows, decoded: input→label, · where a position carries no loss."""
    data, lines = trainer.datamodule, []
    for ids_T, labels_T in zip(batch["input_ids"][:rows].tolist(), batch["labels"][:rows].tolist(), strict=True):
        pairs = list(zip(ids_T, labels_T, strict=False))[:tokens]
        lines.append("  ".join(f"{_token(data, i)}→{'·' if y == IGNORED else _token(data, y)}" for i, y in pairs))
    return lines


def _token(data, token_id: int) -> str:
    return repr(data.tokenizer.decode([token_id]))[1:-1] or "∅"


def overlap(trainer: Trainer) -> Check:
    """Held-out windows that stand in the training text word for word; no whole document may."""
    store = trainer.datamodule.store
    train_N, val_N = (np.asarray(stream.tokens_N[:20_000_000], np.uint64) for stream in (store.train, store.val))
    seen = np.unique(_window_hashes(train_N))
    held_out = _window_hashes(val_N)[::WINDOW]
    share = float(np.isin(held_out, seen).mean()) if len(held_out) else 0.0
    train_documents = {hash(text) for text in trainer.datamodule.documents("train")}
    twice = sum(hash(text) in train_documents for text in trainer.datamodule.documents("val"))
    measured = (
        f"{twice} held-out documents stand in the training text, and {share:.1%} of their runs of {WINDOW} tokens"
    )
    return Check("train and held-out text", measured, twice == 0)


def _window_hashes(tokens_N: np.ndarray) -> np.ndarray:
    """(N - WINDOW + 1,) one number for each run of WINDOW tokens: a polynomial modulo 2⁶⁴, by doubling."""
    hashes_N, length, base = tokens_N + np.uint64(1), 1, np.uint64(0x9E3779B97F4A7C15)
    while length < WINDOW:
        power = np.uint64(pow(int(base), length, 2**64))
        hashes_N = hashes_N[:-length] * power + hashes_N[length:]
        length *= 2
    return hashes_N


@torch.no_grad()
def exported(trainer: Trainer, module: LightningModule, batch: dict[str, Tensor]) -> Check:
    """The folder that the run would leave, loaded by transformers."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", module, trainer.datamodule.tokenizer, "")
        other = module.opened(Path(folder) / "model").to(module.device).eval()
    few = {name: value[:2] for name, value in batch.items()}
    figure = difference(*(_finite(module.logits(few, network)) for network in (module.network, other)))
    return at_most("exported folder", "logits of AutoModel.from_pretrained", figure, 1e-5)


def _finite(logits: Tensor) -> Tensor:
    """With 0 where a logit is masked out."""
    return logits.masked_fill(logits == -torch.inf, 0)


def batches(trainer: Trainer, examples: list[int]) -> list[dict[str, Tensor]]:
    """These examples of training in one batch, and then each of them alone."""
    rows = trainer.datamodule.train_dataloader().dataset
    asked = [np.array(examples), *np.array(examples)[:, None]]
    return [trainer.strategy.batch_to_device(rows.__getitems__(np.stack([e, e]))) for e in asked]


@torch.no_grad()
def padded(trainer: Trainer, module: LightningModule, most: int = 16) -> Check:
    """The loss of examples that are filled up to the longest, against the sum of that of each alone."""
    together, *alone = batches(trainer, list(range(min(most, trainer.datamodule.rows_per_epoch))))
    _, nats, _ = module.loss(together)
    each = torch.stack([module.loss(one)[1] for one in alone]).sum()
    return at_most("padded against alone", f"loss of {len(alone)} examples", difference(each[None], nats[None]), 1e-5)


def written(trainer: Trainer, module: LightningModule, count: int = 6) -> Check:
    """Answers that are written in one batch, against each alone."""
    together, *alone = batches(trainer, list(range(min(count, trainer.datamodule.rows_per_epoch))))
    texts = [text for text, _ in module.write(together)]
    equal = sum(text == module.write(one)[0][0] for text, one in zip(texts, alone, strict=True))
    return Check("written together", f"{equal} of {len(texts)} answers as alone", equal == len(texts))


def held_out_apart(trainer: Trainer) -> Check:
    """No held-out example may stand among those that are trained on."""
    data = trainer.datamodule
    trained = {data.key(record) for record in data.store.records("train")}
    twice = sum(data.key(record) in trained for record in data.store.records("val"))
    return Check("train and held-out examples", f"{twice} held-out examples are trained on", twice == 0)


@torch.no_grad()
def own_teacher(module: Taught, batch: dict[str, Tensor]) -> Check:
    """The divergence of the teacher from itself, by the loss of the run."""
    module.load_teachers()
    head, labels_N = module.teacher_head(batch, module.teachers[0]), module.labels(batch)
    _, _, value = module.matched(head, [head], labels_N, None, module.weights().matching, 1.0)
    figure = abs(float(value)) / max(1, len(labels_N))
    return at_most("a student like its teacher", "divergence per label", figure, 1e-5)


@torch.no_grad()
def drawn_words(module: Distilled, batch: dict[str, Tensor], draws: int = 64) -> Check:
    """KL by a few words that are drawn anew again and again, on average, against that by all words."""
    row = {name: value[:1] for name, value in batch.items() if not name.startswith("teacher_")}
    keep_N = row["labels"].flatten() != IGNORED
    labels_N = row["labels"].flatten()[keep_N]
    teacher, student = (
        Head(module.read(row, network).logits.flatten(0, 1)[keep_N][:, : module.vocabulary].float())
        for network in (module.teachers[0].network, module.network)
    )
    _, _, whole = linear_distillation(student, [teacher], labels_N, Matching())
    found = []
    for seed in range(draws):
        kept = kept_words(teacher, module.vocabulary, 1.0, 4, 4, seed)
        shares = torch.cat([kept["shares"], (kept["tail"] / 4)[:, None].expand(-1, 4)], 1)
        target = Sparse(kept["ids"], shares, None, kept["entropy"])
        found.append(linear_distillation(student, target, labels_N, Matching())[2])
    values = torch.stack(found)
    off = float((values.mean() - whole).abs() / (values.std() / draws**0.5 + 1e-6 * whole.abs()))
    return at_most("a few words of the teacher", f"mean of {draws} draws, in standard errors from all words", off, 4)


def packed(trainer: Trainer, module: LightningModule) -> Check:
    """Documents that share a row, with attention ending at their borders, against each of them alone."""
    data = trainer.datamodule
    apart, data.cross_document_attention = data.cross_document_attention, False
    rows = data._rows(data.store.train)
    data.cross_document_attention = apart
    worst, documents = 0.0, 0
    for batch in _rows_of_several(rows):
        batch = trainer.strategy.batch_to_device(batch)
        whole = module.logits(batch)
        starts = [*torch.where(batch["position_ids"][0] == 0)[0].tolist(), whole.shape[1]]
        starts = starts if starts[0] == 0 else [0, *starts]
        for start, end in zip(starts, starts[1:], strict=False):
            alone = {name: batch[name][:, start:end] for name in ("input_ids", "position_ids", "labels")}
            worst = max(worst, difference(whole[:, start:end], module.logits(alone)))
            documents += 1
    return at_most("packed against alone", f"logits of {documents} documents", worst, 1e-4)


def _rows_of_several(rows, most: int = 3) -> Iterator[dict[str, Tensor]]:
    found = 0
    for i in range(min(len(rows), 2000)):
        batch = rows.__getitems__(np.array([[i], [i]]))
        if "position_ids" in batch and int((batch["position_ids"] == 0).sum()) > 1:
            yield batch
            found += 1
        if found == most:
            return


@torch.no_grad()
def generation(trainer: Trainer, module: LightningModule, batch: dict[str, Tensor]) -> Check:
    """Greedy tokens with the key-value cache and without it."""
    prompt = batch["input_ids"][:1, :16]
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": int(prompt[0, 0])}
    with_cache, without = (module.network.generate(prompt, use_cache=cache, **settings) for cache in (True, False))
    length = min(with_cache.shape[1], without.shape[1])
    equal = int((with_cache[:, 16:length] == without[:, 16:length]).sum())
    passed = with_cache.shape == without.shape and equal == length - 16
    return Check("generation with the cache", f"{equal} of {length - 16} tokens as without", passed)
