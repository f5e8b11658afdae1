"""Rows that a student writes itself: by its own law, the same however a step is cut, without a loss of their own."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_modules.losses import IGNORED
from lightning_modules.on_policy import ByNumbers, OnPolicy
from lightning_modules.student import PartOfTeacher
from tests.distilling import as_command, fit, flags_of, opened, refused, run
from tests.faults import signal_at, state

ALL_OWN = OnPolicy(share=1.0, prompt_tokens=8)


def test_words_are_drawn_by_their_probability():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)) * 2
    numbers = OnPolicy().numbers(0, torch.arange(20_000), 1)
    chosen = ByNumbers(numbers[:, 1:], 7, temperature=2.0)(None, logits.expand(20_000, -1)).argmax(-1)
    expected = (logits[0, :7].double() / 2).softmax(-1)
    counts = torch.bincount(chosen, minlength=9).double()
    assert counts[7:].sum() == 0  # ids behind the vocabulary
    errors = (counts[:7] / 20_000 - expected).abs() / (expected * (1 - expected) / 20_000).sqrt()
    assert errors.max() < 3.5
    share = float((numbers[:, 0] < 0.25).double().mean())
    assert share == pytest.approx(0.25, abs=0.01)


def test_a_student_goes_on_from_the_beginning_of_a_row(texts, decoder):
    module, batch = opened(texts, decoder, on_policy=ALL_OWN)
    ends = list(range(module.vocabulary))  # wherever a document ends, the row goes on
    module.network.generation_config.eos_token_id = ends
    written, is_own_N = module.written(batch)
    assert module.network.generation_config.eos_token_id == ends
    assert is_own_N.all() and written["input_ids"].shape == batch["input_ids"].shape
    assert torch.equal(written["input_ids"][:, :8], batch["input_ids"][:, :8])
    assert not torch.equal(written["input_ids"][:, 8:], batch["input_ids"][:, 8:])
    assert (written["labels"][:, :7] == IGNORED).all() and (written["labels"][:, 7:] != IGNORED).all()
    assert torch.equal(written["labels"][:, 7:-1], written["input_ids"][:, 8:])
    assert written["input_ids"].max() < module.vocabulary
    assert torch.equal(batch["labels"][:, 0], batch["input_ids"][:, 1])  # what was given is as it was


def test_what_is_written_with_the_cache_is_what_the_student_says_without(texts, decoder):
    """Each word follows from the row's number and the probabilities of one forward pass over all that was written."""
    module, batch = opened(texts, decoder, on_policy=ALL_OWN)
    batch["input_ids"][:, 1:7] = 0  # an id like any other, of which a network that attends says something
    for weight in module.network.parameters():
        weight.data.mul_(5 if weight.ndim > 1 else 1)
    written, _ = module.written(batch)
    numbers = ALL_OWN.numbers(module.seed, batch["rows"], 25)[:, 1:]
    module.network.eval()
    with torch.no_grad():
        p = module.network(written["input_ids"]).logits[:, 7:, : module.vocabulary].double().softmax(-1)
    word = torch.searchsorted(p.cumsum(-1), numbers[..., None], right=True)[..., 0]
    assert (word == written["labels"][:, 7:]).float().mean() > 0.97  # a number may lie on an edge


def test_rows_are_drawn_alike_however_the_batch_is_cut(texts, decoder):
    module, batch = opened(texts, decoder, on_policy=OnPolicy(share=0.5, prompt_tokens=8))
    batch["rows"] = torch.arange(4) + 10
    whole, is_own_N = module.written(batch)
    is_own_B = is_own_N.view(4, -1)[:, 0]
    assert 0 < int(is_own_B.sum()) < 4
    assert torch.equal(whole["input_ids"][~is_own_B], batch["input_ids"][~is_own_B])
    for i in range(4):
        one, _ = module.written({name: value[i : i + 1] for name, value in batch.items()})
        assert torch.equal(one["input_ids"][0], whole["input_ids"][i])
        assert torch.equal(one["labels"][0], whole["labels"][i])
    module.train()
    module.written(batch)
    assert module.network.training


def test_a_row_that_ends_in_padding_stays_the_texts(texts, decoder):
    module, batch = opened(texts, decoder, on_policy=ALL_OWN)
    batch["labels"][:, 30:] = IGNORED
    written, is_own_N = module.written(batch)
    assert is_own_N is None and written is batch


def test_labels_of_its_own_have_no_loss_but_the_teachers(texts, decoder):
    hard, batch = opened(texts, decoder, on_policy=ALL_OWN, hard_weight=0.75)
    objective, nats, count, divergence = hard.training_loss(batch, 1.0)
    assert int(count) == 4 * 25 and float(nats) > 0
    assert float(objective) == pytest.approx(float(divergence), rel=1e-5)
    mixed, _ = opened(texts, decoder, on_policy=OnPolicy(share=0.5, prompt_tokens=8), hard_weight=0.75)
    batch["rows"] = torch.arange(4) + 10
    written, is_own_N = mixed.written(batch)
    objective, nats, _, divergence = mixed.training_loss(batch, 1.0)
    teacher = AutoModelForCausalLM.from_pretrained(decoder)
    with torch.no_grad():
        p, q = (
            net(written["input_ids"]).logits.flatten(0, 1)[..., : mixed.vocabulary].log_softmax(-1)
            for net in (teacher, mixed.network)
        )
    labels = written["labels"].flatten()
    kl = (p.exp() * (p - q)).sum(-1) * (labels != IGNORED)
    own_nats = -q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected = kl[is_own_N].sum() + (0.25 * kl + 0.75 * own_nats)[~is_own_N].sum()
    assert float(objective) == pytest.approx(float(expected), rel=5e-3)  # the teacher may be in bf16


def test_a_student_like_its_teacher_has_no_loss_where_it_writes(texts, decoder):
    module, batch = opened(texts, decoder, student=PartOfTeacher([0, 1]), on_policy=ALL_OWN)
    module.network.eval()
    module.teachers[0].network.float()
    objective, _, count, _ = module.training_loss(batch, 1.0)
    assert abs(float(objective)) < 1e-3 * int(count)


def test_a_killed_run_and_two_ranks_write_the_same(texts, decoder, tmp_path):
    own = {"model.on_policy.share": 0.5, "comparison.control": False, "ckpt_path": "last"}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        flags = flags_of(tmp_path / name, texts, decoder, **own)
        if name == "cut":
            assert as_command(tmp_path / name, [*flags, *signal_at(7)]) == 143
        assert as_command(tmp_path / name, flags) == 0
    assert state(tmp_path / "whole") == state(tmp_path / "cut")
    one = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 12, "trainer.max_steps": 6}
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 6}
    found = fit(tmp_path / "one", texts, decoder, **own, **one)
    (tmp_path / "two").mkdir()
    assert as_command(tmp_path / "two", flags_of(tmp_path / "two", texts, decoder, **own, **two)) == 0
    other = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert found["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model.on_policy.share": 0}, "pass a share up to 1"),
        ({"model.on_policy.temperature": 0}, "T > 0"),
        ({"model.on_policy.prompt_tokens": 32}, "a row has 32 tokens"),
        ({"model.on_policy.share": 1, "data.cross_document_attention": False}, "cross_document_attention"),
    ],
)
def test_what_cannot_be_written_is_one_line(flags, told, texts, decoder, tmp_path, capsys):
    assert told in refused(capsys, *flags_of(tmp_path, texts, decoder, **flags))


def test_an_encoder_does_not_write(texts, encoder, tmp_path, capsys):
    flags = flags_of(
        tmp_path, texts, encoder, **{"model.on_policy.share": 1, "model.student": "transformers.BertConfig"}
    )
    assert "is for what writes on" in refused(capsys, "--model=MaskedDistillation", *flags)


def test_a_teacher_writes_rows_of_text_and_goes_on_where_it_was_cut(texts, decoder, tmp_path, capsys):
    kept = ("model.", "data.", "trainer.accelerator")
    common = [flag for flag in flags_of(tmp_path, texts, decoder) if flag[2:].startswith(kept)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("write", f"--folder={whole}", "--rows=10", *common)
    lines = (whole / "train.jsonl").read_text()
    shutil.copytree(whole, cut)
    (cut / "train.jsonl").write_text(lines[:-30])  # less than was written: it begins anew
    run("write", f"--folder={cut}", "--rows=10", *common)
    assert (cut / "train.jsonl").read_text() == lines
    held_out = [json.loads(line)["text"] for line in (whole / "val.jsonl").read_text().splitlines()]
    assert held_out and all(text in [file.read_text() for file in texts.glob("*.txt")] for text in held_out)
    module, batch = opened(texts, decoder)
    batch = next(iter(module.trainer.datamodule.batches_in_order(0, 4)))
    data, found = module.trainer.datamodule, [json.loads(line)["text"] for line in lines.splitlines()]
    for ids in batch["input_ids"][:, :8].tolist():
        assert any(text.startswith(data.tokenizer.decode(ids, skip_special_tokens=True)) for text in found)
    for flag, told in (
        ("--rows=9", "another rows"),
        ("--seed_everything=1", "another seed"),
        ("--rows=9999", "9,999;"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("write", f"--folder={cut}", "--rows=10", flag, *common)
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_teacher_writes_over_nothing_and_on_through_documents(texts, decoder, tmp_path, capsys):
    kept = ("model.", "data.", "trainer.accelerator")
    common = [flag for flag in flags_of(tmp_path, texts, decoder) if flag[2:].startswith(kept)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "val.jsonl").write_text("of the user")
    for flags, told in (
        ([f"--folder={tmp_path / 'mine'}"], "was not written here"),
        ([f"--folder={tmp_path / 'new'}", "--data.cross_document_attention=false"], "goes on through documents"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("write", "--rows=4", *flags, *common)
        assert stop.value.code == 2 and told in capsys.readouterr().err
    assert (tmp_path / "mine" / "val.jsonl").read_text() == "of the user"


def test_documents_that_a_teacher_ends_stay_apart_and_a_row_that_is_not_full_stays_as_it_is(texts, decoder):
    module, _ = opened(texts, decoder)
    module.on_policy = OnPolicy(1.0)
    data = module.trainer.datamodule
    start, (words,) = data.document_start, data.tokenizer("abcdefgh", return_tensors="pt")["input_ids"]
    head = module.teachers[0].network.get_output_embeddings()
    head.weight.data.zero_()  # all words alike, and one document's start in four
    head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, torch.tensor(start), 4.5))
    ids_T = words.repeat(32)[:33]
    ids_BT = torch.stack([ids_T, ids_T])
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[1, 5:] = IGNORED
    batch = {"input_ids": ids_BT[:, :-1], "labels": labels_BT, "rows": torch.tensor([0, 1])}
    *written, kept = [row["text"] for row in module.teachers_rows(batch)]
    assert len(written) > 2 and all(written)
    assert kept == data.tokenizer.decode(ids_T[:6])
    whole, _ = module.written(batch, module.teachers[0].network)
    starts = int((torch.cat([whole["input_ids"][0], whole["labels"][0, -1:]]) == start).sum())
    assert starts >= len(written) - 1  # two starts may stand side by side
