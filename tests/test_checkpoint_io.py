"""A checkpoint is whole or not there, and what is damaged is never loaded."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_modules import checkpoint_io
from lightning_modules.checkpoint_io import CheckpointFiles, DamagedCheckpoint, newest, verify

ROOT = Path(__file__).parents[1]


def checkpoint(step: int = 1, numbers: int = 20_000) -> dict:
    torch.manual_seed(step)
    weight = torch.randn(numbers)
    return {"global_step": step, "state_dict": {"w": weight}, "optimizer_states": [{"m": weight + 1}]}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "one.ckpt"
    CheckpointFiles().save_checkpoint(checkpoint(), path)
    return path


def test_what_is_saved_is_loaded_and_plain_torch_reads_it_too(saved):
    for there in (CheckpointFiles().load_checkpoint(saved), torch.load(saved, weights_only=True)):
        assert torch.equal(there["state_dict"]["w"], checkpoint()["state_dict"]["w"])
    assert [path.name for path in saved.parent.iterdir()] == ["one.ckpt"]


def test_a_file_cut_anywhere_is_found(saved):
    rng, content = random.Random(0), saved.read_bytes()
    for _ in range(100):
        saved.write_bytes(content[: rng.randrange(len(content))])
        with pytest.raises(DamagedCheckpoint, match=r"one\.ckpt is"):
            verify(saved)


@pytest.mark.parametrize("damage", ["bit", "block"])
def test_a_flipped_bit_and_a_lost_block_are_found(saved, damage):
    rng, content = random.Random(1), saved.read_bytes()
    found = 0
    for _ in range(100):
        damaged = bytearray(content)
        if damage == "bit":
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(damaged) // 4096) * 4096
            damaged[start : start + 4096] = bytes(len(damaged[start : start + 4096]))
        saved.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint):
            verify(saved)
        with pytest.raises(DamagedCheckpoint):
            CheckpointFiles().load_checkpoint(saved)
        found += 1
    assert found == 100


def test_damage_to_the_tensors_of_a_checkpoint_from_elsewhere_is_found_too(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(checkpoint(), path)
    verify(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedCheckpoint, match="is not what was written"):
        verify(path)


def test_a_run_falls_back_to_the_newest_whole_checkpoint_with_one_warning(tmp_path, capsys):
    files = CheckpointFiles()
    for step in (10, 20, 30):
        files.save_checkpoint(checkpoint(step), tmp_path / f"{step}.ckpt")
    os.utime(tmp_path / "10.ckpt")  # the latest by date is not the furthest
    assert newest(tmp_path) == tmp_path / "30.ckpt"
    (tmp_path / "30.ckpt").write_bytes((tmp_path / "30.ckpt").read_bytes()[:-500])
    assert newest(tmp_path) == tmp_path / "20.ckpt"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "30.ckpt is" in warnings[0]


def test_where_all_are_damaged_nothing_begins_anew_in_silence(tmp_path):
    for step in (1, 2):
        (tmp_path / f"{step}.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        newest(tmp_path)
    assert newest(tmp_path / "empty") is None


def test_what_is_not_finite_is_neither_kept_nor_taken_up(tmp_path):
    bad = checkpoint()
    bad["optimizer_states"][0]["m"][7] = torch.nan
    with pytest.raises(ValueError, match=r"optimizer_states\.0\.m is not finite at step 1"):
        CheckpointFiles().save_checkpoint(bad, tmp_path / "bad.ckpt")
    assert not list(tmp_path.iterdir())
    torch.save(bad, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="not finite"):
        CheckpointFiles().load_checkpoint(tmp_path / "bad.ckpt")
    masked = checkpoint() | {"state_dict": {"mask": torch.full((2,), -torch.inf)}}
    CheckpointFiles().save_checkpoint(masked, tmp_path / "masked.ckpt")


def test_where_the_disk_is_full_training_goes_on_and_what_was_saved_stays(tmp_path):
    """The limit on a file's size stands for the full disk; it would hold for the tests themselves."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_checkpoint_io import CheckpointFiles, checkpoint
files = CheckpointFiles()
files.save_checkpoint(checkpoint(1), {str(tmp_path / "1.ckpt")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
files.save_checkpoint(checkpoint(2), {str(tmp_path / "2.ckpt")!r})
files.remove_checkpoint({str(tmp_path / "1.ckpt")!r})  # what ModelCheckpoint does next
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "goes on\n", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "2.ckpt was not written: it needs about 160,000 bytes and" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]
    verify(tmp_path / "1.ckpt")


def test_a_checkpoint_is_on_the_disk_and_what_was_meant_before_it_gets_its_name(tmp_path, monkeypatch):
    """What the disk makes of it is read back: here it flips a bit."""
    path, happened = tmp_path / "one.ckpt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append("flushed"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (happened.append("named"), replace(*names)))
    CheckpointFiles().save_checkpoint(checkpoint(1), path)
    assert happened == ["flushed", "named", "flushed"]  # the file, and then the folder with its name
    before = path.read_bytes()

    def worn_out(file):
        fsync(file)
        os.pwrite(file, b"?", 1000)

    monkeypatch.setattr(os, "fsync", worn_out)
    with pytest.raises(DamagedCheckpoint):
        CheckpointFiles().save_checkpoint(checkpoint(2), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole_whenever_the_process_is_killed(tmp_path):
    """Two files of the same number, whichever: never one of each, never none."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lightning_modules.checkpoint_io import replace_folder
folder = Path({str(tmp_path)!r})
for i in range(10**9):
    new = folder / f"new{{i}}"
    new.mkdir()
    for name in ("a", "b"):
        (new / name).write_text(str(i))
    replace_folder(new, folder / "model")
"""
    rng, seen = random.Random(0), set()
    for _ in range(4):
        for leftover in tmp_path.glob("new*"):
            shutil.rmtree(leftover)
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (tmp_path / "model").exists():
            assert process.poll() is None
        deadline = time.monotonic() + rng.uniform(0.1, 0.5)
        while time.monotonic() < deadline:
            assert (tmp_path / "model").is_dir()
        process.kill()
        process.wait()
        numbers = {(tmp_path / "model" / name).read_text() for name in ("a", "b")}
        assert len(numbers) == 1
        seen |= numbers
        shutil.rmtree(tmp_path / "model")
    assert len(seen) > 1


def test_the_temporary_folder_is_not_used(tmp_path, monkeypatch):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    elsewhere.chmod(0)
    CheckpointFiles().save_checkpoint(checkpoint(), tmp_path / "one.ckpt")
    elsewhere.chmod(0o700)
    assert not list(elsewhere.iterdir())


class Gadget:
    """Pickled, it creates a file when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("where", ["whole", "in state_dict", "bare pickle"])
def test_no_code_of_a_checkpoint_runs(tmp_path, where):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(Gadget(canary)))
    else:
        torch.save(Gadget(canary) if where == "whole" else {"state_dict": {"w": Gadget(canary)}}, path)
    with pytest.raises(ValueError, match="evil.ckpt"):
        CheckpointFiles().load_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/a.ckpt", "https://example.org/a.ckpt", "s3://b/a.ckpt"])
def test_no_checkpoint_comes_from_the_network(path):
    with pytest.raises(ValueError, match="is no local file"):
        CheckpointFiles().load_checkpoint(path)


def test_the_digest_sees_every_part_and_no_clock():
    one = checkpoint() | {"lr_schedulers": [{"last_epoch": 3}], "Text": {"consumed": 4}, "tokens": 5}
    digests = {checkpoint_io.digest(one), checkpoint_io.digest(one | {"callbacks": {"Timer": 1.0}})}
    assert len(digests) == 1
    for change in ({"Text": {"consumed": 5}}, {"tokens": 6}, {"lr_schedulers": [{"last_epoch": 4}]}, checkpoint(2)):
        digests.add(checkpoint_io.digest(one | change))
    assert len(digests) == 5


def test_no_code_of_a_model_folder_runs(tmp_path):
    """Weights as a pickle, a class of the folder's own, a tokenizer of the folder's own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lightning_modules.model_folder import load

    def folder(name: str, **config) -> Path:
        small = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)
        GPT2LMHeadModel(small).save_pretrained(tmp_path / name)
        stored = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(stored | config))
        return tmp_path / name

    canary = tmp_path / "canary"
    pickled = folder("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Gadget(canary)}, pickled / "pytorch_model.bin")
    own_code = folder(
        "own_code", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"
    )
    (own_code / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for path in (pickled, own_code):
        with pytest.raises((ValueError, OSError)):
            load(str(path), None, "cpu", "float32", False, lambda: False)
    assert not canary.exists()
