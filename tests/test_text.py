import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.base import IGNORED
from datamodules.text import Text

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data are not beside the project")
LINES = [f"line {i} of the text, a little longer than a row of it\n" for i in range(12)]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(12):
        (path / f"{i:02}.txt").write_text("".join(LINES[: i + 1]))
    return path


def text(path: Path, **settings) -> Text:
    """Byte ids, rows of 32, ready to use."""
    defaults = {"tokenizer": "bytes", "seq_len": 32, "batch_size": 4, "val_fraction": 0.2}
    data = Text(path=str(path), cache_dir=str(path.parent / "cache"), **(defaults | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def labelled(batches) -> torch.Tensor:
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    return labels[labels != IGNORED]


# The batch


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("seq_len", [7, 32])
def test_every_token_of_the_text_is_a_label_exactly_once(folder, split, seq_len):
    data = text(folder, seq_len=seq_len)
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    documents = list(data.documents(split))
    assert sorted(bytes(labelled(loader)[labelled(loader) < 256].to(torch.uint8).numpy())) == sorted(
        "".join(documents).encode()
    )
    ends = (labelled(loader) == data.tokenizer.eos_token_id).sum()
    assert ends == len(documents) - 1  # the end of text before the first document is context alone


def test_a_batch_is_what_the_contract_says(folder):
    data = text(folder)
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "labels", "rows"}
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 32) and batch["rows"].tolist() == [0, 1, 2, 3]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    is_text = batch["labels"][:, :-1] != IGNORED
    assert (batch["input_ids"][:, 1:] == batch["labels"][:, :-1])[is_text].all() and is_text.any()


def test_the_first_token_of_the_text_is_predicted_from_the_end_of_text(folder):
    data = text(folder)
    first = next(iter(data.val_dataloader()))
    assert first["input_ids"][0, 0] == data.tokenizer.eos_token_id and first["labels"][0, 0] == ord("l")


def test_where_attention_stops_at_borders_positions_restart_at_each_document(folder):
    data = text(folder, cross_document_attention=False, seq_len=100)
    for batch in data.train_dataloader():
        expected = torch.zeros_like(batch["input_ids"])
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for i in range(1, len(ids)):
                expected[row, i] = 0 if ids[i] == data.tokenizer.eos_token_id else expected[row, i - 1] + 1
        is_text = batch["labels"] != IGNORED
        assert (batch["position_ids"] == expected)[is_text].all() and expected[is_text].max() > 50
    assert labelled(data.train_dataloader()).shape == labelled(text(folder, seq_len=100).train_dataloader()).shape


@pytest.mark.parametrize("apart", [True, False])
def test_masked_rows_hide_some_tokens_and_mark_their_filling(folder, apart):
    data = text(folder, objective="masked", cross_document_attention=not apart)
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        hidden = batch["labels"] != IGNORED
        filling = batch["input_ids"] == data.tokenizer.pad_token_id
        assert not (hidden & filling).any() and (batch["labels"][hidden] < 256).all()
        assert ((batch["input_ids"] == data.tokenizer.mask_token_id) <= hidden).all()
        if apart:
            assert "attention_mask" not in batch and (batch["position_ids"][filling] < 32).all()
        elif filling.any():
            assert ((batch["attention_mask"] == 0) == filling).all()
        else:
            assert "attention_mask" not in batch
    assert 0.1 < len(labelled(data.train_dataloader())) / len(data.store.train) < 0.2


def denoised(batch, data: Text) -> list[list[int]]:
    """The text of each row, put together from its input and its labels."""
    sentinels = {data.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100)}
    texts = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        spans, span = {}, []
        for token in (token for token in labels if token != IGNORED):
            if token in sentinels:
                spans[token] = span = []
            else:
                span.append(token)
        span.pop()  # the end of text that ends the labels
        whole = sum((spans.get(i, [i]) for i in ids if i != data.tokenizer.pad_token_id), [])
        texts.append(whole[:-1])
    return texts


@pytest.mark.parametrize("apart", [True, False])
def test_denoising_rows_hold_the_text_once_and_one_document_where_asked(folder, apart):
    data = text(folder, objective="denoising", cross_document_attention=not apart)
    end = data.tokenizer.eos_token_id
    rows = [row for batch in data.val_dataloader() for row in denoised(batch, data)]
    assert sum(rows, []) == data.store.val.tokens_N.tolist()
    assert all(batch["input_ids"].shape[1] == 32 for batch in data.train_dataloader())
    assert len({batch["labels"].shape[1] for batch in data.train_dataloader()}) == 1
    across = [row for row in rows if end in row[1:]]
    assert not across if apart else across


@pytest.mark.parametrize("objective", ["masked", "denoising"])
def test_noise_is_the_rows_own_whatever_the_batch_and_new_in_each_epoch(folder, objective):
    small, large = (text(folder, objective=objective, batch_size=b, val_batch_size=b) for b in (1, 5))
    for loader in (Text.train_dataloader, Text.val_dataloader):
        ones = [batch["input_ids"][0] for batch in loader(small)]
        fives = [row for batch in loader(large) for row in batch["input_ids"]]
        assert all(torch.equal(one, five) for one, five in zip(ones, fives, strict=True))
    first = {r: x for b in small.train_dataloader() for r, x in zip(_stored(small, b), b["input_ids"], strict=True)}
    small.consumed = small.rows_per_epoch
    second = {r: x for b in small.train_dataloader() for r, x in zip(_stored(small, b), b["input_ids"], strict=True)}
    assert first.keys() == second.keys() and any(not torch.equal(first[r], second[r]) for r in first)


def _stored(data: Text, batch) -> list[int]:
    from datamodules.row_order import Shuffled

    return Shuffled(data.rows_per_epoch, data.seed)(batch["rows"].numpy()).tolist()


# The same data again


def test_equal_settings_give_equal_batches_and_another_seed_another_order(folder):
    first, again, other = (text(folder, seed=seed).train_dataloader() for seed in (1, 1, 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))


def test_workers_change_nothing(folder):
    for objective in ("causal", "denoising"):
        alone, helped = (text(folder, objective=objective, num_workers=n).train_dataloader() for n in (0, 2))
        for a, b in zip(alone, helped, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_text_is_tokenized_once_and_again_when_it_changes(folder, monkeypatch):
    first = text(folder)
    monkeypatch.setattr("datamodules.text.encode_corpus", lambda *_: pytest.fail("tokenized again"))
    assert text(folder, seq_len=16, batch_size=2, seed=5).store.folder == first.store.folder
    monkeypatch.undo()
    for settings in ({"tokenizer": "chars"}, {"objective": "masked"}, {"val_fraction": 0.9}, {"on_bad_row": "skip"}):
        assert text(folder, **settings).store.folder != first.store.folder
    (folder / "00.txt").write_text("changed")
    assert text(folder).store.folder != first.store.folder


def test_a_damaged_store_is_made_again(folder):
    file = text(folder).store.folder / "train.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    text(folder)
    assert file.read_bytes() == content


def test_a_damaged_tokenizer_is_made_again(folder):
    text(folder, tokenizer="bpe", vocab_size=280)
    (file,) = (folder.parent / "cache" / "tokenizers").glob("*/tokenizer.json")
    file.write_text("{")
    assert len(text(folder, tokenizer="bpe", vocab_size=280).tokenizer) == 280


def test_setup_alone_opens_what_another_process_prepared(folder):
    text(folder, tokenizer="chars")
    data = Text(path=str(folder), cache_dir=str(folder.parent / "cache"), tokenizer="chars", val_fraction=0.2)
    data.setup("fit")
    assert data.rows_per_epoch > 0
    (folder / "00.txt").write_text("changed")
    data = Text(path=str(folder), cache_dir=str(folder.parent / "cache"), tokenizer="bytes", val_fraction=0.2)
    with pytest.raises(ValueError, match="changed since its tokens were made"):
        data.setup("fit")


# Training, stopping, going on


class Reader(LightningModule):
    """Notes the rows it is trained on."""

    def __init__(self, fail_at: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(batch["rows"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Builds the loaders before the checkpoint's loops are restored, as a schedule's horizon does.
        assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: Text, module: LightningModule, ckpt_path: Path | None = None, **settings) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, use_distributed_sampler=False, num_sanity_val_steps=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*dataloader is not resumable")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


STOPS = ["within the first epoch", "at its end", "within the second", "after an epoch"]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("num_workers", "accumulate", "until"),
    [(0, 1, "max_epochs"), (0, 2, "max_epochs"), (0, 2, "max_steps"), (1, 1, "max_steps"), (2, 2, "max_epochs")],
)
def test_a_resumed_run_continues_with_the_rows_that_were_next(folder, num_workers, stop, accumulate, until):
    rows = len(text(folder, batch_size=10).train_rows)
    steps = math.ceil(math.ceil(rows / 10) / accumulate)
    stop_at = {"within the first epoch": 1, "at its end": steps, "within the second": steps + 1}.get(stop)
    every = {"every_n_train_steps": stop_at} if stop_at else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    checkpoints = folder.parent / "checkpoints"
    first, second = Reader(), Reader()
    fit(
        text(folder, batch_size=10, num_workers=num_workers),
        first,
        accumulate_grad_batches=accumulate,
        callbacks=[ModelCheckpoint(checkpoints, save_top_k=-1, **every)],
        **({"max_steps": stop_at} if stop_at else {"max_epochs": 1}),
    )
    horizon = {"max_epochs": 3} if until == "max_epochs" else {"max_steps": 3 * steps}
    (checkpoint,) = checkpoints.iterdir()
    data = text(folder, batch_size=10, num_workers=num_workers)
    fit(data, second, checkpoint, accumulate_grad_batches=accumulate, enable_checkpointing=False, **horizon)
    assert sum(first.seen + second.seen, []) == list(range(3 * rows))
    assert len(first.seen + second.seen) == 3 * -(-rows // 10) and data.consumed == 3 * rows


def test_a_loader_with_workers_starts_at_the_place_that_a_checkpoint_restores_after_iter(folder):
    data = text(folder, num_workers=1)
    iterator = iter(data.train_dataloader())
    data.load_state_dict(data.state_dict() | {"consumed": 8})
    assert next(iterator)["rows"].tolist() == [8, 9, 10, 11]


def test_a_run_that_is_interrupted_within_a_batch_repeats_that_batch(folder):
    data, first, second = text(folder), Reader(fail_at=3), Reader()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(data, first, max_steps=8, enable_checkpointing=False)
    data.trainer.save_checkpoint(folder.parent / "interrupted.ckpt")
    fit(text(folder), second, folder.parent / "interrupted.ckpt", max_steps=6, enable_checkpointing=False)
    assert sum(first.seen + second.seen, []) == list(range(24))


def test_a_limited_epoch_is_followed_by_the_rows_after_it(folder):
    reader = Reader()
    fit(
        text(folder), reader, max_epochs=5, limit_train_batches=3, accumulate_grad_batches=2, enable_checkpointing=False
    )
    assert len(reader.seen) == 15 and sum(reader.seen, []) == list(range(len(sum(reader.seen, []))))


def test_overfitting_sees_the_same_batch_again_and_again(folder):
    reader = Reader()
    fit(text(folder), reader, max_epochs=3, overfit_batches=1, enable_checkpointing=False)
    assert reader.seen == [[0, 1, 2, 3]] * 3


def test_other_data_cannot_take_up_a_checkpoints_place(folder):
    state = text(folder).state_dict()
    other = {"seed": {"seed": 1}, "seq_len": {"seq_len": 16}, "tokenizer": {"tokenizer": "chars"}}
    other["text"] = {"text_column": "another"}
    for field, settings in other.items():
        with pytest.raises(ValueError, match=f"another {field} .* resume with the same --data.*allow_changed_data"):
            text(folder, **settings).load_state_dict(state)
    other_batch_size = text(folder, batch_size=2)
    other_batch_size.load_state_dict(state | {"consumed": 8})
    assert next(iter(other_batch_size.train_dataloader()))["rows"].tolist() == [8, 9]


def test_other_data_go_on_from_as_many_tokens_where_that_is_allowed(folder):
    state = text(folder).state_dict() | {"consumed": 8}
    shorter = text(folder, seq_len=16, seed=1, allow_changed_data=True)
    shorter.load_state_dict(state)
    assert shorter.consumed == 16


class TwoRanks:
    """What `Text` asks of a Trainer, on one of two ranks."""

    overfit_batches = 0

    def __init__(self, rank: int):
        self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}


def test_two_ranks_share_the_rows_of_one_and_meet_in_equal_numbers_of_steps(folder):
    alone = text(folder, batch_size=5)
    ranks = [text(folder, batch_size=5) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.trainer = TwoRanks(rank)
    for loader in (Text.train_dataloader, Text.val_dataloader):
        left, right = (list(loader(data)) for data in ranks)
        numbers = [n for step in zip(left, right, strict=True) for batch in step for n in batch["rows"].tolist()]
        expected = [n for batch in loader(alone) for n in batch["rows"].tolist()]
        assert sorted(n for n in numbers if n >= 0) == expected
        assert len(labelled(left)) + len(labelled(right)) == len(labelled(loader(alone)))
        empty = [batch for batch in left + right if batch["rows"].tolist() == [-1]]
        assert all((batch["labels"] == IGNORED).all() and len(batch["labels"]) == 1 for batch in empty)


@pytest.mark.parametrize("objective", ["causal", "masked", "denoising"])
def test_a_row_without_text_attends_to_something(folder, objective):
    data = text(folder, objective=objective)
    batch = data.val_rows.__getitems__(np.full((2, 1), -1))
    assert (batch["labels"] == IGNORED).all() and batch["rows"].tolist() == [-1]
    assert "attention_mask" not in batch or batch["attention_mask"].sum() == 1


# What is told


def test_the_plan_counts_what_there_is(folder):
    data = text(folder)
    plan = data.describe()
    documents = [*data.documents("train"), *data.documents("val")]
    assert plan["train_documents"] + plan["val_documents"] == plan["files"] == 12
    assert plan["train_bytes"] + plan["val_bytes"] == sum(len(document.encode()) for document in documents)
    assert plan["train_tokens"] == plan["train_bytes"] and plan["bytes_per_token"] == 1.0
    assert plan["rows_per_epoch"] == -(-(plan["train_tokens"] + plan["train_documents"] - 1) // 32)
    assert plan["held_out"] == [source.name for source in data.corpus.val] and plan["encoder"] == "a table of bytes"


def test_rows_left_out_are_counted_in_the_plan(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(['{"text": "a line of text"}', "{", '{"text": ""}'] * 20))
    data = text(tmp_path / "rows.jsonl", on_bad_row="skip", seq_len=8)
    assert data.describe()["skipped_rows"] == {str(tmp_path / "rows.jsonl"): 20} and data.describe()["empty_rows"] == 20


def test_characters_unseen_in_training_are_counted_and_stand_for_no_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 30 + "xyz" * 3)
    data = text(tmp_path / "a.txt", tokenizer="chars", val_fraction=0.09, seq_len=8)
    assert data.describe()["unknown_tokens"] == 9
    assert data.token_bytes.dtype == torch.float64 and data.token_bytes.tolist() == [1, 1, 1, 0, 0]


def test_held_out_documents_are_given_whole_up_to_a_limit(folder):
    data = text(folder)
    everything = data.val_documents()
    assert b"".join(everything) == "".join(data.documents("val")).encode()
    assert data.val_documents(limit_bytes=1) == everything[:1]


def test_a_part_of_the_held_out_rows_is_spread_over_them_all(folder):
    rows = [n for batch in text(folder, max_val_rows=3).val_dataloader() for n in batch["rows"].tolist()]
    count = len(text(folder).val_rows)
    assert rows == [0, count // 3, 2 * count // 3]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"seq_len": 10_000}, "tokens to train on, less than one row; give more text or a --data.seq_len below 10000"),
        ({"seq_len": 0}, "--data.seq_len is 0"),
        ({"batch_size": 0}, "--data.batch_size is 0"),
        ({"val_fraction": 0.0}, "--data.val_fraction is 0.0"),
        ({"mask_fraction": 1.0}, "--data.mask_fraction is 1.0"),
        ({"mean_span": 0.5}, "--data.mean_span is 0.5"),
        ({"objective": "denoising", "seq_len": 2}, "--data.seq_len is 2"),
        ({"objective": "denoising", "seq_len": 2048}, "has 100 of the 114 sentinels"),
        ({"tokenizer": "bpe", "vocab_size": 9}, "--data.vocab_size is 9"),
        ({"val_path": "./nothing"}, "nothing does not exist; pass files, folders, globs by --data.val_path"),
    ],
)
def test_a_mistake_is_one_line_with_its_flag(folder, settings, fault):
    with pytest.raises((OSError, ValueError), match=fault) as error:
        text(folder, **settings)
    assert "\n" not in str(error.value)


def test_a_little_held_out_text_is_enough(tmp_path):
    for name, content in (("train.txt", "a" * 100), ("val.txt", "b")):
        (tmp_path / name).write_text(content)
    data = text(tmp_path / "train.txt", val_path=str(tmp_path / "val.txt"))
    (batch,) = data.val_dataloader()
    assert labelled([batch]).tolist() == [ord("b")] and batch["input_ids"][0, 0] == data.tokenizer.eos_token_id


@needs_data
def test_shakespeare_by_characters_is_split_as_everyone_splits_it(tmp_path):
    file = DATA / "lm_tinyshakespeare" / "input.txt"
    data = Text(str(file), tokenizer="chars", val_fraction=0.1, seq_len=64, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    whole = file.read_text()
    assert data.store.train.counts.tokens == 1_003_854 and data.store.val.counts.tokens == 111_540
    assert data.vocab_size == 67 and data.describe()["unknown_tokens"] == 0
    characters = sorted(set(whole))
    assert data.store.val.tokens_N[1:].tolist() == [characters.index(char) for char in whole[1_003_854:]]
