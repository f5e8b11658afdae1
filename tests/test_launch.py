"""The files of recipes/launch do what they say, with a scheduler of three lines; the doctor sees what is wrong."""

import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_modules import doctor
from recipes import doctor as examine
from tests.test_ddp import ROOT
from tests.test_recipes import run

LAUNCH = ROOT / "recipes" / "launch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$(dirname "$0")/asked"; fi
"""


def small(folder: Path, texts: Path, steps: int) -> Path:
    """A run's YAML, as a user writes one."""
    config = yaml.safe_load((ROOT / "recipes" / "pretrain.yaml").read_text())
    config["trainer"] |= {"accelerator": "cpu", "strategy": "ddp", "precision": "32-true", "max_steps": steps}
    config["trainer"] |= {"max_time": None, "val_check_interval": 1000, "limit_val_batches": 2}
    config["model"]["init_args"]["architecture"]["init_args"] |= {"hidden_size": 16, "num_hidden_layers": 1}
    config["data"] |= {"seq_len": 32, "batch_size": 2, "vocab_size": 400}
    config["samples"] = {"max_new_tokens": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def changed(file: str, **values: object) -> str:
    """A script with other values of what is marked CHANGE."""
    lines = (LAUNCH / file).read_text().splitlines()
    for name, value in values.items():
        lines = [f"{name}={value}" if line.startswith(f"{name}=") else line for line in lines]
    return "\n".join(lines) + "\n"


def test_a_job_that_is_preempted_is_queued_again_and_goes_on(texts, tmp_path):
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(stat.S_IRWXU)
    text = changed("slurm.sh", GPUS=2, CONFIG=small(tmp_path, texts, 300), DATA=texts)
    (tmp_path / "job.sh").write_text(text.replace("RUN=runs/", f"RUN={tmp_path}/"))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"SLURM_JOB_NAME": "llama", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "x"}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    run, asked = tmp_path / "llama-7", tmp_path / "asked"

    def started(log: str) -> subprocess.Popen:
        command = ["bash", str(tmp_path / "job.sh")]
        with (tmp_path / log).open("w") as file:
            return subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    job = started("first")
    counter, end = run / "checkpoints" / ".steps_done", time.monotonic() + 90
    while not counter.exists() or struct.unpack("<q", counter.read_bytes())[0] < 5:
        assert time.monotonic() < end and job.poll() is None, (tmp_path / "first").read_text()[-2000:]
        time.sleep(0.02)
    torchruns = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    for process in torchruns:  # as SLURM does it: the steps of the job, not its script
        os.kill(int(process), signal.SIGTERM)
    assert job.wait(timeout=60) != 0
    assert asked.read_text() == "requeue 7\n", (tmp_path / "first").read_text()[-2000:]

    job = started("second")
    assert job.wait(timeout=120) == 0, (tmp_path / "second").read_text()[-2000:]
    assert asked.read_text() == "requeue 7\n"  # and not once more
    assert "going on from step" in (tmp_path / "second").read_text()
    assert json.loads((run / "summary.json").read_text())["steps"] == 300
    assert (tmp_path / "first").read_text().count("passed  all-reduce") == 1


def test_slurm_finds_the_folder_of_its_log_in_a_fresh_clone():
    """It does not make one, and ends a job whose log it cannot open."""
    output = re.search(r"#SBATCH --output=(\S+)", (LAUNCH / "slurm.sh").read_text())[1]
    assert Path(output).parent == Path()


def test_one_of_two_machines_that_comes_back_joins_the_training_and_no_doctor(tmp_path):
    """Nobody else is with the doctor by then."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $@" >> {tmp_path}/started\n')
    python.chmod(stat.S_IRWXU)
    (tmp_path / "both.sh").write_text(changed("two_nodes.sh", RUN=tmp_path / "run"))

    def started() -> list[str]:
        subprocess.run(["bash", str(tmp_path / "both.sh")], env=os.environ | {"PYTHON": str(python)}, check=True)
        lines = (tmp_path / "started").read_text().splitlines()
        (tmp_path / "started").unlink()
        return lines

    examining, training = started()
    assert "recipes/doctor.py" in examining and "recipes/pretrain.py fit" in training
    assert training.startswith("1 ")  # else it is not told where the ranks meet
    for flag in ("--rdzv-id", "--rdzv-endpoint"):
        first, second = (line.split(f"{flag} ")[1].split()[0] for line in (examining, training))
        assert first != second
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert started() == [training]


@pytest.mark.parametrize("file", ["slurm.sh", "two_nodes.sh", "pytorchjob.yaml"])
def test_every_flag_is_one_of_the_recipe(file, capsys):
    """And every file marks what to change."""
    text = (LAUNCH / file).read_text()
    assert text.count("CHANGE") > 5
    fit = text[text.index("pretrain.py fit" if file.endswith("sh") else "- fit") :]
    words = fit.replace("- ", " ").replace("\\\n", " ").split()
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and not word.startswith("--config")]
    assert len(flags) >= 5
    values = {"--trainer.num_nodes": 2, "--trainer.devices": 8, "--ckpt_path": "last"}
    flags = {
        flag.removeprefix("--"): values.get(flag, "x") for flag in flags if flag.startswith(("--tr", "--d", "--c"))
    }
    with pytest.raises(SystemExit) as stop:
        run("fit", **{"config": ROOT / "recipes" / "pretrain_llama_8b.yaml", "print_config": True} | flags)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0 and int(printed["trainer"]["devices"]) == 8 and printed["ckpt_path"] == "last"


def examined(tmp_path: Path, *flags: str, ranks: int = 1) -> tuple[int, str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "recipes" / "doctor.py"), "--folder", str(tmp_path), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout


def test_the_doctor_finds_ranks_that_are_well(texts, tmp_path):
    code, said = examined(tmp_path, "--data.path", str(texts), "--checkpoint_gb", "0.001", ranks=2)
    assert code == 0 and "FAILED" not in said
    names = ("devices", "versions", "source", "clocks", "data", "disk", "space", "all-reduce")
    assert [line.split()[1] for line in said.splitlines()] == list(names)
    assert not any(tmp_path.iterdir())  # it leaves nothing


def test_the_doctor_says_what_is_wrong(tmp_path):
    code, said = examined(tmp_path, "--data.path", "nowhere", "--checkpoint_gb", "1e9")
    assert code == 1
    wrong = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert len(wrong) == 2 and "nowhere is not there on rank 0" in wrong[0] and "two checkpoints need" in wrong[1]


def test_the_doctor_takes_data_as_a_run_does(texts, tmp_path):
    """Folders, globs, addresses of a store, and weights of them."""
    paths = {str(texts): 0.5, f"{texts}/*.txt": 0.3, f"file://{texts}": 0.2}
    for given in (json.dumps(paths), json.dumps(list(paths)), f"{texts}/*"):
        code, said = examined(tmp_path, f"--data.path={given}")
        found = re.findall(r"8 files, \S+ \S+, names and sizes (\w+)", said)
        assert code == 0 and len(found) == (1 if given.endswith("*") else 3) and len(set(found)) == 1, said
    code, said = examined(tmp_path, "--data.path=nostore://bucket/texts")
    assert code == 1 and "FAILED  data" in said and "nostore://bucket/texts cannot be read: " in said


def test_the_doctor_refuses_a_checkpoint_of_less_than_nothing(capsys):
    with pytest.raises(SystemExit) as stop:
        examine.main(["--checkpoint_gb", "-5"])
    assert stop.value.code == 2 and "--checkpoint_gb" in capsys.readouterr().err


class TwoRanks(doctor.Ranks):
    """This one, and another that says what it is told."""

    def __init__(self, other: object):
        self.rank, self.count, self.on_cpu, self.other = 0, 2, True, other

    def all(self, mine: object) -> list:
        return [mine, self.other if mine is not None else None]


def test_ranks_that_differ_are_named():
    other = TwoRanks(("beta", {"torch": "2.12.0"}))
    found = doctor.alike(other, "versions", {"torch": "2.13.0"})
    assert not found.passed and found.found == "torch 2.12.0 on rank 1 (beta), 2.13.0 on rank 0"
    assert not doctor.clocks(TwoRanks(time.time() - 30)).passed
    assert doctor.clocks(TwoRanks(time.time())).passed
