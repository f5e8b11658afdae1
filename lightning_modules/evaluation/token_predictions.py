"""How a model predicts each token of a text: how sure it is and how often right, and how alike another model does it.

Shape suffixes: D documents, N tokens of a batch, n tokens at a time, V vocabulary, K bins.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.evaluation.calibration import BINS, bins_of
from lightning_modules.evaluation.measures import Means, Measures
from lightning_modules.likelihood import SOFTMAX_LOGITS, Row, target_logits


@torch.inference_mode()
def predictions(
    model: PreTrainedModel,
    batches: Iterable[list[tuple[int, Row]]],
    documents: int,
    *,
    mask_padding: bool,
    reference: PreTrainedModel | None = None,
) -> Measures:
    """Accuracy of the likeliest token and expected calibration error of its probability, and beside a reference of the
    same tokens how often both take the same one, and KL(reference ‖ model) in nats.

    Args:
        batches: Rows, each with the number of its document.
        documents: How many there are.
    """
    names = ["tokens", "right", *(["same_top", "kl"] if reference is not None else [])]
    each = {name: np.zeros(documents) for name in names}
    gap_KD = np.zeros((BINS, documents))
    for batch in batches:
        rows = [row for _, row in batch]
        owners_N = np.repeat([number for number, _ in batch], [len(row.targets) for row in rows])
        logits_NV, targets_N = target_logits(model, rows, mask_padding=mask_padding)
        of_reference_NV = None
        if reference is not None:
            of_reference_NV, _ = target_logits(reference, rows, mask_padding=mask_padding)
        chunk, begin = max(1, SOFTMAX_LOGITS // logits_NV.shape[-1]), 0
        for logits_nV in logits_NV.split(chunk):
            n = slice(begin, begin + len(logits_nV))
            found = _facts(logits_nV, targets_N[n], None if of_reference_NV is None else of_reference_NV[n])
            for name in names:
                np.add.at(each[name], owners_N[n], found[name])
            np.add.at(gap_KD, (bins_of(found["confidence"]), owners_N[n]), found["right"] - found["confidence"])
            begin += len(logits_nV)
    figures = {"accuracy": partial(_a_token, "right"), "calibration_error": calibration_error}
    if reference is not None:
        figures |= {"same_top": partial(_a_token, "same_top"), "kl": partial(_a_token, "kl")}
    return Measures(each | {f"gap_{k}": gap_KD[k] for k in range(BINS)}, [""] * documents, figures)


def _facts(logits_nV: Tensor, targets_n: Tensor, of_reference_nV: Tensor | None) -> dict[str, np.ndarray]:
    log_q_nV = logits_nV.float().log_softmax(-1)
    best, top_n = log_q_nV.max(-1)
    found = {"tokens": torch.ones_like(best), "right": (top_n == targets_n).float(), "confidence": best.exp()}
    if of_reference_nV is not None:
        found["same_top"] = (of_reference_nV.argmax(-1) == top_n).float()
        width = min(logits_nV.shape[-1], of_reference_nV.shape[-1])  # embeddings may have rows that no word has
        log_p_nV = of_reference_nV[:, :width].float().log_softmax(-1)
        log_q_nV = log_q_nV if width == logits_nV.shape[-1] else logits_nV[:, :width].float().log_softmax(-1)
        found["kl"] = (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1)
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def _a_token(name: str, means: Means) -> np.ndarray:
    return means[name] / means["tokens"]


def calibration_error(means: Means) -> np.ndarray:
    """As `calibration.calibration_error`, from sums of bins."""
    return sum(np.abs(means[f"gap_{k}"]) for k in range(BINS)) / means["tokens"]
