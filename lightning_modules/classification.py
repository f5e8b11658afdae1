"""Texts to labels: one of several, any of several, or a number.

Shape suffixes: B examples, L labels.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lightning_modules.finetune import FineTune
from lightning_modules.losses import IGNORED

PROBLEMS = {"one": "single_label_classification", "several": "multi_label_classification", "number": "regression"}
"""What transformers calls a kind of labels."""


def labels_of(config: PreTrainedConfig) -> list[str]:
    """Of a model's head, in its order."""
    return [config.id2label[i] for i in range(config.num_labels)]


class Classification(FineTune):
    """Sentiment and every other label of a text or of a pair of texts.

    Args:
        class_weights: Weight of each label's examples in the loss, by the label's name; others weigh 1.
        label_smoothing: Weight of the uniform distribution in the target.
    """

    objective = "labels"
    needs = (
        "has no AutoModelForSequenceClassification; take one that has, such as transformers.BertConfig or "
        "transformers.LlamaConfig"
    )
    units = "`val_loss` is the cross-entropy in nats (of numbers the squared error), a mean over the held-out examples."

    def __init__(
        self, *, class_weights: dict[str, float] | None = None, label_smoothing: float = 0.0, **settings: object
    ):
        super().__init__(**settings)
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    @staticmethod
    def auto_class_of(config: PreTrainedConfig) -> type | None:
        auto_class = AutoModelForSequenceClassification
        return auto_class if type(config) in auto_class._model_mapping else None

    @property
    def kind(self) -> str:
        return self.trainer.datamodule.kind

    def head_fields(self) -> dict[str, object]:
        names = self.trainer.datamodule.label_names
        unknown = [name for name in self.class_weights or () if name not in names]
        if unknown:
            raise ValueError(f"--model.class_weights names {unknown[0]!r}; the labels are {', '.join(names)}")
        weights = [(self.class_weights or {}).get(name, 1.0) for name in names]
        self.register_buffer("weights_L", torch.tensor(weights), persistent=False)
        self.validation_loss = MeanMetric().set_dtype(torch.float64)
        # Groups form at a rank's first examples, and ranks that have none would then exchange other numbers.
        self.validation = MetricCollection(self._metrics(len(names)), compute_groups=False)
        return {
            "problem_type": PROBLEMS[self.kind],
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }

    def new_network(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        network = super().new_network(auto_class, fields)
        return network if self.origin is None else self.with_labels_of(self.base_config, network)

    def with_labels_of(self, config: PreTrainedConfig, network: PreTrainedModel) -> PreTrainedModel:
        """A head that came from a model of this config, in place with its rows in the order of the data's labels."""
        names, own = self.trainer.datamodule.label_names, labels_of(config)
        if own != names and sorted(own) == sorted(names):
            order_L = torch.tensor([own.index(name) for name in names])
            modules = [m for n, m in network.named_modules() if not f"{n}.".startswith(f"{network.base_model_prefix}.")]
            head = [module for module in modules if isinstance(module, torch.nn.Linear)][-1]
            for part in head.parameters():
                part.data.copy_(part.data[order_L])
        return network

    def measured(self) -> list[str]:
        return ["loss", *self.validation]

    def _metrics(self, labels: int) -> dict[str, object]:
        if self.kind == "number":
            return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef(), "mse": MeanSquaredError()}
        if self.kind == "several":
            f1 = {f"f1_{average}": MultilabelF1Score(labels, average=average) for average in ("micro", "macro")}
            return {"accuracy": MultilabelExactMatch(labels)} | f1
        return {
            "accuracy": MulticlassAccuracy(labels, average="micro"),
            "f1_macro": MulticlassF1Score(labels, average="macro"),
            "mcc": MulticlassMatthewsCorrCoef(labels),
        }

    def logits(self, batch: dict[str, Tensor], network: PreTrainedModel | None = None) -> Tensor:
        """(B, L) float32, (B, 1) of numbers; of another network than the module's own, if one is given."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        if "use_cache" in vars(self.plain_network.config):
            inputs["use_cache"] = False
        return (network or self.plain_network)(**inputs).logits.float()

    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        return self.loss_of(self.logits(batch), batch, divisor)

    def loss_of(self, logits_BL: Tensor, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy in nats, of several labels the sum of their binary ones; squared error of numbers. Only the
        objective is smoothed."""
        labels, counts_B = batch["labels"], batch["rows"] >= 0
        if self.kind == "one":
            labels_B = labels.masked_fill(~counts_B, IGNORED)
            settings = {"weight": self.weights_L, "ignore_index": IGNORED, "reduction": "sum"}
            total = F.cross_entropy(logits_BL, labels_B, label_smoothing=self.label_smoothing, **settings)
            nats = F.cross_entropy(logits_BL.detach(), labels_B, **settings) if self.label_smoothing else total
            count = (self.weights_L[labels.clamp(min=0)] * counts_B).sum()
        elif self.kind == "several":
            each_BL = F.binary_cross_entropy_with_logits(logits_BL, labels, self.weights_L, reduction="none")
            total = nats = (each_BL * counts_B[:, None]).sum()
            count = counts_B.sum()
        else:
            each_B = F.mse_loss(logits_BL[:, 0], labels, reduction="none")
            total = nats = (each_B * counts_B).sum()
            count = counts_B.sum()
        return total / divisor, nats.detach(), count

    def next_command(self, model: str, data: LightningDataModule) -> str:
        """For the terminal; `model` is quoted."""
        code = f"from transformers import pipeline; print(pipeline('text-classification', {model!r})('…'))"
        return f'python -c "{code}"'

    # Validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BL = self.logits(batch)
        _, nats, count = self.loss_of(logits_BL, batch, 1.0)
        here_B = batch["rows"] >= 0
        if not here_B.any():
            return
        self.validation_loss.update(nats / count, count)
        logits_BL, labels = logits_BL[here_B], batch["labels"][here_B]
        if self.kind == "number":
            self.validation.update(logits_BL[:, 0], labels)
        else:
            self.validation.update(logits_BL.sigmoid() if self.kind == "several" else logits_BL, labels.long())
        self.predictions |= self.predicted(logits_BL, batch["rows"][here_B], labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        here_B = batch["rows"] >= 0
        self.predictions |= self.predicted(self.logits(batch)[here_B], batch["rows"][here_B], batch["labels"][here_B])

    def predicted(self, logits_BL: Tensor, rows_B: Tensor, labels: Tensor) -> dict[int, dict[str, object]]:
        """By the example's number the prediction, the probability of each label, and a score where the label is known:
        1 where it is right, else 0; of numbers the distance, negative."""
        data = self.trainer.datamodule
        names = data.label_names
        if self.kind == "number":
            found = [{"prediction": value} for value in logits_BL[:, 0].tolist()]
            scores = (-(logits_BL[:, 0] - labels).abs()).tolist()
        elif self.kind == "several":
            shares_BL = logits_BL.sigmoid()
            chosen_BL = shares_BL > 0.5
            found = [
                {"prediction": [name for name, is_chosen in zip(names, row, strict=True) if is_chosen]}
                for row in chosen_BL.tolist()
            ]
            scores = (chosen_BL == labels.bool()).all(-1).float().tolist()
        else:
            shares_BL = logits_BL.softmax(-1)
            best_B = shares_BL.argmax(-1)
            found = [{"prediction": names[i]} for i in best_B.tolist()]
            scores = (best_B == labels).float().tolist()
        for i, score in enumerate(scores):
            if data.has_answers:
                found[i]["score"] = score
            if self.kind != "number":
                found[i]["probabilities"] = dict(zip(names, (round(x, 6) for x in shares_BL[i].tolist()), strict=True))
        return dict(zip(rows_B.tolist(), found, strict=True))

    def found(self) -> dict[str, Tensor]:
        self.gather_predictions()
        values = {"loss": self.validation_loss.compute()} | self.validation.compute()
        self.validation_loss.reset()
        self.validation.reset()
        return values
