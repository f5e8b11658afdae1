"""A teacher's cache: the same law as the teacher itself, found by what was read, refused where it does not fit."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.packed_ids import bytes_of, pack, unpack
from datamodules.teacher_cache import About, TeacherCache, decoded, encoded, is_written, shard_file
from lightning_modules.distillation_loss import Matching, Sparse, kept_words, linear_distillation
from lightning_modules.losses import Head
from tests.distilling import SMALL, fit, flags_of, opened, refused, run

V = 29


def about(scheme: str, exact: int, drawn: int) -> About:
    return About(scheme, exact, drawn, 1.0, V, 8, 3, "teacher", "tokenizer", "")


def stored(log_p: torch.Tensor, header: About, seed: int) -> Sparse:
    """Through the records of a file and back."""
    kept = kept_words(Head(log_p), V, 1.0, header.exact, header.drawn, seed, chunk_tokens=2)
    found = decoded(encoded({name: value.numpy() for name, value in kept.items()}, header)[None], header)
    return Sparse(*(found.get(f"teacher_{name}", [None])[0] for name in ("ids", "shares", "tail", "entropy")))


def divergence(logits: torch.Tensor, target) -> tuple[float, torch.Tensor]:
    leaf = logits.clone().requires_grad_(True)
    labels = torch.zeros(len(logits), dtype=torch.long)
    objective, _, value = linear_distillation(Head(leaf), target, labels, Matching())
    objective.backward()
    return float(value), leaf.grad


@pytest.mark.parametrize(("scheme", "exact", "drawn"), [("sampled", 0, 12), ("hybrid", 4, 4)])
def test_what_is_drawn_is_the_teacher_on_average(scheme, exact, drawn):
    """The mean gradient of 2,000 caches lies within three standard errors of the whole teacher's, and so does the
    divergence."""
    torch.manual_seed(0)
    teacher, student = torch.randn(3, V) * 2, torch.randn(3, V)
    expected, gradient = divergence(student, [Head(teacher)])
    header, log_p = about(scheme, exact, drawn), teacher.log_softmax(-1)
    drawn_values, drawn_gradients = zip(
        *(divergence(student, stored(log_p, header, seed)) for seed in range(2000)), strict=True
    )
    values, gradients = torch.tensor(drawn_values), torch.stack(drawn_gradients)
    error = values.std() / 2000**0.5
    assert abs(float(values.mean()) - expected) < 3 * float(error) + 2e-3 * expected  # float16 shares
    off = (gradients.mean(0) - gradient).abs() / (gradients.std(0) / 2000**0.5 + 1e-4)
    assert float((off < 3).float().mean()) > 0.98


def test_the_hybrid_is_less_noisy_than_draws_alone():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, V) * 3, torch.randn(3, V)
    log_p = teacher.log_softmax(-1)
    spread = {}
    for scheme, exact, drawn in (("sampled", 0, 8), ("hybrid", 4, 4)):
        header = about(scheme, exact, drawn)
        spread[scheme] = (
            torch.stack([divergence(student, stored(log_p, header, s))[1] for s in range(200)]).std(0).mean()
        )
    assert spread["hybrid"] < 0.7 * spread["sampled"]


def test_a_top_of_all_words_but_one_is_the_teacher():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, V), torch.randn(3, V)
    expected, gradient = divergence(student, [Head(teacher)])
    found, ours = divergence(student, stored(teacher.log_softmax(-1), about("top_k", V - 1, 0), 0))
    assert found == pytest.approx(expected, rel=2e-3)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=2e-3)


def test_a_token_takes_as_many_bytes_as_is_said():
    """Of 29 words, an id is five bits."""
    assert about("top_k", 12, 0).record.itemsize == 8 + 26
    assert about("sampled", 0, 12).record.itemsize == 8 + 2
    assert about("hybrid", 8, 4).record.itemsize == 8 + 18 + 2


@pytest.mark.parametrize("words", [2, 29, 256, 4096, 50_257, 151_936, 2**24])
def test_ids_are_packed_into_as_few_bits_as_they_have(words):
    ids = np.random.default_rng(0).integers(0, words, (3, 5, 7))
    ids[0, 0, :2] = 0, words - 1
    packed = pack(ids, words)
    assert packed.shape == (3, 5, bytes_of(7, words)) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, words, 7), ids)


# On disk


def write(folder: Path, texts: Path, teacher: Path, **flags: object) -> Path:
    kept = ("model.", "data.", "trainer.accelerator", "trainer.precision")
    common = [flag for flag in flags_of(folder, texts, teacher) if flag[2:].startswith(kept)]
    run("cache", f"--folder={folder}", *common, *(f"--{name}={value}" for name, value in flags.items()))
    return folder


def test_a_run_from_a_cache_of_nearly_all_words_is_that_beside_the_teacher(texts, decoder, tmp_path):
    words = json.loads((decoder / "config.json").read_text())["vocab_size"]
    cache = write(tmp_path / "cache", texts, decoder, scheme="top_k", exact=words - 1)
    common = {"comparison.control": False, "trainer.max_steps": 6, "trainer.val_check_interval": 6}
    beside = fit(tmp_path / "beside", texts, decoder, **common)
    cached = fit(tmp_path / "cached", texts, decoder, **common, **{"data.teacher_cache": cache})
    assert cached["val_loss"] == pytest.approx(beside["val_loss"], rel=2e-3)
    assert cached["comparison"]["student"]["kl_to_teacher"] == pytest.approx(
        beside["comparison"]["student"]["kl_to_teacher"], rel=2e-2
    )


def test_writing_goes_on_where_it_was_interrupted_and_ranks_share_it(texts, decoder, tmp_path, monkeypatch, capsys):
    import datamodules.teacher_cache as module

    monkeypatch.setattr(module, "ROWS_OF_A_SHARD", 16)
    whole = write(tmp_path / "whole", texts, decoder)
    shards = TeacherCache(whole).about.shards
    assert shards > 3
    shutil.copytree(whole, tmp_path / "cut")
    shard_file(tmp_path / "cut", 1).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of {shards} shards"):
        TeacherCache(tmp_path / "cut")
    untouched = shard_file(tmp_path / "cut", 0).stat().st_mtime_ns
    write(tmp_path / "cut", texts, decoder)
    assert shard_file(tmp_path / "cut", 0).stat().st_mtime_ns == untouched
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        write(tmp_path / "ranks", texts, decoder)
    for other in ("cut", "ranks"):
        for i in range(shards):
            assert is_written(tmp_path / other, i)
            assert shard_file(tmp_path / other, i).read_bytes() == shard_file(whole, i).read_bytes()


def test_rows_are_found_in_another_order(texts, decoder, tmp_path):
    cache = write(tmp_path / "cache", texts, decoder, scheme="top_k")
    module, _ = opened(texts, decoder)
    data = module.trainer.datamodule
    data.teacher_cache = TeacherCache(cache)
    rows = data.train_rows
    one = data.teacher_cache.targets(rows.__getitems__(np.array([[7], [3]])))
    other = data.teacher_cache.targets(rows.__getitems__(np.array([[0, 1], [5, 3]])))
    assert all(torch.equal(one[name][0], other[name][1]) for name in one)
    log_p = module.teachers[0].network(rows.__getitems__(np.array([[0], [3]]))["input_ids"]).logits[0].log_softmax(-1)
    best = log_p[:, : data.vocab_size].argmax(-1)
    assert (one["teacher_ids"][0, :, 0] == best).float().mean() > 0.9


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"data.seq_len": 16}, "of another labels_of_a_row"),
        ({"model.divergence": "jsd"}, "serves forward_kl of one teacher, not jsd"),
        ({"model.temperature": 2}, "the teacher's cache is of temperature 1"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(flags, told, texts, decoder, tmp_path, capsys):
    cache = write(tmp_path / "cache", texts, decoder)
    given = [*flags_of(tmp_path / "run", texts, decoder, **flags), f"--data.teacher_cache={cache}"]
    assert told in refused(capsys, *given)


def test_a_cache_of_another_teacher_or_another_text_is_refused(texts, decoder, tmp_path, capsys):
    cache = write(tmp_path / "cache", texts, decoder, rows=8)
    shutil.copytree(decoder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    given = flags_of(tmp_path / "run", texts, tmp_path / "other")
    assert "is of another teacher" in refused(capsys, *given, f"--data.teacher_cache={cache}")
    given = [*flags_of(tmp_path / "run2", texts, decoder), f"--data.teacher_cache={cache}"]
    assert "has 8 rows, and this run reads 48; write it with --rows 48" in refused(capsys, *given)
    # Where the length is a time, the first row that is not there says so.
    given = [*flags_of(tmp_path / "run3", texts, decoder), f"--data.teacher_cache={cache}"]
    endless = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"]
    assert "does not have row" in refused(capsys, *given, *endless)


def test_a_part_of_the_rows_is_of_one_order(texts, decoder, tmp_path, capsys):
    cache = write(tmp_path / "cache", texts, decoder, rows=48)
    given = [*flags_of(tmp_path / "run", texts, decoder), f"--data.teacher_cache={cache}", "--data.seed=1"]
    assert "not those that --data.seed 1 begins with" in refused(capsys, *given)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_next_is_of_the_same_model_and_data(texts, decoder, tmp_path, capsys):
    """The command that is printed runs as it is."""
    common = [f"--data.path={texts}", "--data.val_fraction", "0.2", "--data.seq_len=32", "--data.batch_size=4"]
    student = ["--model", "CausalDistillation", "--model.student", "{teacher_layers: [0]}"]
    folder = tmp_path / "with blank"
    run("cache", *student, f"--model.teacher={decoder}", *common, f"--folder={folder}", "--temperature=2")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    words = shlex.split(line.removeprefix("next"))
    assert words[:3] == ["python", "recipes/distill.py", "fit"]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--comparison.control=false"]
    run(*words[2:], *short, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_run_goes_on_with_the_cache_it_began_with(texts, decoder, tmp_path, capsys):
    caches = {name: write(tmp_path / name, texts, decoder, scheme=name) for name in ("sampled", "top_k")}
    quick = {"comparison.control": False, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path / "run", texts, decoder, **quick, **{"data.teacher_cache": caches["sampled"]})
    more = quick | {"trainer.max_steps": 4, "ckpt_path": "last"}
    for other in (caches["top_k"], None):
        given = flags_of(tmp_path / "run", texts, decoder, **more, **{"data.teacher_cache": other})
        assert "the checkpoint has cache sampled of" in refused(capsys, *given)


def test_a_cache_of_an_encoder_decoder_is_of_one_noise_and_one_length(texts, denoiser, tmp_path, capsys):
    """By the teacher's own first token of the decoder, and refused where another epoch's noise would be read."""
    other = {f"model.student.{name}": None for name in SMALL} | {"model.student": denoiser}
    kind = ["--model=DenoisingDistillation", "--model.student", str(denoiser), f"--model.teacher={denoiser}"]
    text = [f"--data.path={texts}", "--data.val_fraction=0.2", "--data.seq_len=32", "--data.batch_size=4"]
    run("cache", *kind, *text, f"--folder={tmp_path / 'cache'}", "--rows=48")
    cache = f"--data.teacher_cache={tmp_path / 'cache'}"
    flags = flags_of(tmp_path / "run", texts, denoiser, **other, **{"comparison.control": False})
    flags = [flag for flag in flags if not flag.startswith("--model.student")]
    run("fit", *kind, *flags, cache)
    for more, told in (("--data.seed=1", "is of another noise"), ("--trainer.max_steps=-1", "noise of another epoch")):
        run_folder = f"--trainer.default_root_dir={tmp_path / told[:5]}"
        endless = ["--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"] if "steps" in more else []
        assert told in refused(capsys, *kind, *flags, cache, more, *endless, run_folder)


def test_a_worker_that_does_not_find_a_row_says_it_in_one_line(texts, decoder, tmp_path, capsys):
    cache = write(tmp_path / "cache", texts, decoder, rows=8)
    given = [*flags_of(tmp_path / "run", texts, decoder), f"--data.teacher_cache={cache}", "--data.num_workers=1"]
    endless = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"]
    assert refused(capsys, *given, *endless).startswith(f"error: {cache} does not have row")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"rows": 0}, "--rows is 0"),
        ({"scheme": "top_k", "exact": 0}, "--exact 0"),
        ({"temperature": 0}, "--temperature 0.0"),
        ({"drawn": 10**6}, "more than the"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(flags, told, texts, decoder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        write(tmp_path / "cache", texts, decoder, **flags)
    assert stop.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_no_cache_is_one_line(texts, decoder, tmp_path, capsys):
    given = flags_of(tmp_path / "run", texts, decoder)
    assert "is no teacher's cache" in refused(capsys, *given, f"--data.teacher_cache={tmp_path}")
