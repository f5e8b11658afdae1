"""Extractive question answering: the span of a text that answers a question, or that there is none.

Shape suffixes: B windows, T tokens, N any count.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.functional.text import squad
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedModel

from lightning_modules.finetune import FineTune
from lightning_modules.losses import IGNORED

SHOWN = 5
"""Spans of a question that a line of predictions.jsonl holds."""


class Span(NamedTuple):
    """A candidate of a question, over all windows."""

    score: float
    """Logit of its first token plus that of its last."""
    start: int
    """In characters of the context."""
    end: int


class QuestionAnswering(FineTune):
    """The first and the last token of an answer, each by a softmax over the context and a place that means none.

    Args:
        n_best: Spans of each window that are compared with those of the other windows of its question.
        max_answer_tokens: Of a span that may be an answer.
        no_answer_threshold: How much more than the best span the place that means none has to score, in nats. Only
            where questions without an answer are trained on.
    """

    objective = "spans"
    needs = "is no encoder with an AutoModelForQuestionAnswering; take one, such as transformers.BertConfig"
    units = (
        "`val_loss` is the cross-entropy of the first and of the last token together, in nats, a mean over the "
        "held-out windows; `val_exact_match` and `val_f1` are SQuAD's, 0 to 100, over the held-out questions; "
        "`val_no_answer_accuracy` is the part of them where the model is right whether there is an answer."
    )

    def __init__(
        self, *, n_best: int = 20, max_answer_tokens: int = 30, no_answer_threshold: float = 0.0, **settings: object
    ):
        super().__init__(**settings)
        if n_best < 1 or max_answer_tokens < 1:
            raise ValueError(f"--model.n_best {n_best}, --model.max_answer_tokens {max_answer_tokens}: 1 or more")
        self.n_best, self.max_answer_tokens = n_best, max_answer_tokens
        self.no_answer_threshold = no_answer_threshold
        self.validation_loss = MeanMetric().set_dtype(torch.float64)

    @staticmethod
    def auto_class_of(config: PreTrainedConfig) -> type | None:
        auto_class = AutoModelForQuestionAnswering
        # A decoder has read nothing yet at the place that means none.
        is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
        return auto_class if is_encoder and type(config) in auto_class._model_mapping else None

    def head_fields(self) -> dict[str, object]:
        return {"num_labels": 2}

    def measured(self) -> list[str]:
        names = ["loss", "exact_match", "f1"]
        return [*names, "no_answer_accuracy"] if self.trainer.datamodule.has_unanswerable else names

    # The loss

    def logits(self, batch: dict[str, Tensor], network: PreTrainedModel | None = None) -> Tensor:
        """(B, T, 2) float32, of an answer's first and last token; -inf where neither can be."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        found = (network or self.plain_network)(**{name: batch[name] for name in names if name in batch})
        logits_BT2 = torch.stack([found.start_logits, found.end_logits], -1).float()
        return logits_BT2.masked_fill(~self.allowed(batch)[..., None], -torch.inf)

    @staticmethod
    def allowed(batch: dict[str, Tensor]) -> Tensor:
        """(B, T): the context, and the first token, which means none. What is padded must not count in the softmax."""
        place_T = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        begin_B1, end_B1 = batch["contexts"][:, :1], batch["contexts"][:, 1:]
        return (place_T == 0) | ((place_T >= begin_B1) & (place_T < end_B1))

    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        return self.loss_of(self.logits(batch), batch, divisor)

    @staticmethod
    def loss_of(logits_BT2: Tensor, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, Tensor, Tensor]:
        total = F.cross_entropy(logits_BT2, batch["labels"], ignore_index=IGNORED, reduction="sum")
        return total / divisor, total.detach(), (batch["rows"] >= 0).sum()

    # Validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BT2 = self.logits(batch)
        _, nats, count = self.loss_of(logits_BT2, batch, 1.0)
        if count:
            self.validation_loss.update(nats / count, count)
        self.predictions |= self._of_windows(logits_BT2, batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.predictions |= self._of_windows(self.logits(batch), batch)

    def gather_predictions(self) -> None:
        """Makes `predictions`, of windows that may lie on several ranks, those of whole questions."""
        super().gather_predictions()
        self.predictions = self._of_questions()

    def _of_windows(self, logits_BT2: Tensor, batch: dict[str, Tensor]) -> dict[int, dict[str, object]]:
        """The best spans of each window, and the score of its place that means none, by the window's number."""
        data = self.trainer.datamodule
        spans = best_spans(logits_BT2, batch["contexts"], self.n_best, self.max_answer_tokens)
        none_B = logits_BT2[:, 0].sum(-1).tolist()
        found = {}
        for row, none, of_window in zip(batch["rows"].tolist(), none_B, spans, strict=True):
            if row >= 0:
                places = [(score, *data.span(row, first, last)) for score, first, last in of_window]
                found[row] = {"none": none, "spans": places}
        return found

    def _of_questions(self) -> dict[int, dict[str, object]]:
        """From windows to questions: prediction, score, and the best spans with their share of the probability."""
        data = self.trainer.datamodule
        questions: dict[int, list[dict]] = {}
        for window in sorted(self.predictions):
            questions.setdefault(int(data.asked_fields["example"][window]), []).append(self.predictions[window])
        found = {}
        for number, windows in questions.items():
            record = data.asked[number]
            spans = sorted({Span(*span) for window in windows for span in window["spans"]}, reverse=True)
            texts = best_of_each_text(spans, record["context"])
            none = min(window["none"] for window in windows)
            if data.has_unanswerable:
                texts.append(("", none))
            highest = max(score for _, score in texts) if texts else 0.0
            weights = [math.exp(score - highest) for _, score in texts]
            shares = {text: round(w / sum(weights), 6) for (text, _), w in zip(texts, weights, strict=True)}
            answers = [text for text, _ in texts if text]
            is_none = data.has_unanswerable and (not answers or none - texts[0][1] > self.no_answer_threshold)
            prediction = "" if is_none or not answers else answers[0]
            best = sorted(shares, key=shares.get, reverse=True)[:SHOWN]
            found[number] = {
                "prediction": prediction,
                "probabilities": {text: shares[text] for text in best},
            }
            if data.has_answers:
                exact, f1 = squad_scores(prediction, record["references"])
                found[number] |= {"exact_match": exact, "score": round(f1, 6)}
        return found

    def found(self) -> dict[str, float]:
        self.gather_predictions()
        data, rows = self.trainer.datamodule, list(self.predictions.values())
        values = {"loss": float(self.validation_loss.compute())}
        values["exact_match"] = 100 * sum(row["exact_match"] for row in rows) / max(1, len(rows))
        values["f1"] = 100 * sum(row["score"] for row in rows) / max(1, len(rows))
        if data.has_unanswerable:
            right = [bool(p["prediction"]) == bool(data.asked[n]["references"]) for n, p in self.predictions.items()]
            values["no_answer_accuracy"] = sum(right) / max(1, len(right))
        self.validation_loss.reset()
        return values


def best_spans(
    logits_BT2: Tensor, contexts_B2: Tensor, n_best: int, max_tokens: int
) -> list[list[tuple[float, int, int]]]:
    """(score, first, last) of the n_best spans of each window's context, the best first."""
    tokens = logits_BT2.shape[1]
    place_T = torch.arange(tokens, device=logits_BT2.device)
    length_TT = place_T - place_T[:, None] + 1
    is_span_TT = (length_TT >= 1) & (length_TT <= max_tokens)
    inside_BT = (place_T >= contexts_B2[:, :1]) & (place_T < contexts_B2[:, 1:])
    starts_BT, ends_BT = (logits_BT2[..., i].masked_fill(~inside_BT, -torch.inf) for i in (0, 1))
    scores_BTT = (starts_BT[:, :, None] + ends_BT[:, None, :]).masked_fill(~is_span_TT, -torch.inf)
    best = scores_BTT.flatten(1).topk(min(n_best, tokens * tokens))
    return [
        [(score, place // tokens, place % tokens) for score, place in zip(*of_window, strict=True) if score > -math.inf]
        for of_window in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def best_of_each_text(spans: list[Span], context: str) -> list[tuple[str, float]]:
    """Texts with the score of their best span, the best first."""
    texts: dict[str, float] = {}
    for span in spans:
        texts.setdefault(context[span.start : span.end].strip(), span.score)
    return list(texts.items())


def squad_scores(prediction: str, references: list[str]) -> tuple[float, float]:
    """Exact match and F1 of SQuAD 1.1 and 2.0, 0 to 1, against the best of several references; none is the empty
    text."""
    asked = {"prediction_text": prediction, "id": ""}
    known = {"answers": {"text": references or [""], "answer_start": [0] * max(1, len(references))}, "id": ""}
    found = squad([asked], [known])
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
