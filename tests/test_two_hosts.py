"""Two hosts with an address each: network namespaces of this machine, which the test makes and takes away again."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.test_ddp import ROOT

STEPS, CUT_AT, LIMIT = 120, 23, 6.0
"""Of a run; the step after which a host is cut off; seconds in which that has to be found."""


class Host(NamedTuple):
    name: str
    address: str
    link: str

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True)

    def start(self, run: Path, log: Path) -> subprocess.Popen:
        """The same line of torchrun on each host."""
        flags = {
            "trainer.accelerator": "cpu",
            "trainer.num_nodes": 2,
            "trainer.devices": 1,
            "trainer.strategy": "ddp",
            "trainer.precision": "32-true",
            "trainer.max_steps": STEPS,
            "trainer.max_time": "null",
            "trainer.val_check_interval": 60,
            "trainer.limit_val_batches": 2,
            "trainer.default_root_dir": run,
            "ckpt_path": "last",
            "recovery.every_n_steps": 5,
            "watchdog.minutes": LIMIT / 60,
            "samples.max_new_tokens": 0,
            "model.architecture.hidden_size": 16,
            "model.architecture.intermediate_size": 32,
            "model.architecture.num_hidden_layers": 1,
            "model.architecture.num_attention_heads": 2,
            "data.path": run.parent / "texts",
            "data.tokenizer": "bytes",
            "data.seq_len": 32,
            "data.batch_size": 2,
        }
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--local-addr", self.address]
        command = [sys.executable, *torchrun, str(ROOT / "recipes" / "pretrain.py"), "fit"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        # A host's name has to be one that is found: its address is.
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        environment |= {"GLOO_SOCKET_IFNAME": self.link}
        with log.open("w") as file:
            return subprocess.Popen(
                [*inside, self.address, *command],
                env=os.environ | environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


@contextmanager
def network() -> Iterator[tuple[Host, Host]]:
    """Two hosts and a cable between them."""
    hosts = [Host(f"host{os.getpid()}{x}", f"10.77.0.{i}", f"cable{x}") for i, x in ((1, "a"), (2, "b"))]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True, capture_output=True)
        first, second = hosts
        first.ip("link", "add", first.link, "type", "veth", "peer", "name", second.link, "netns", second.name)
        for host in hosts:
            host.ip("addr", "add", f"{host.address}/24", "dev", host.link)
            for link in (host.link, "lo"):
                host.ip("link", "set", link, "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    if not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("needs ip and unshare")
    with pytest.MonkeyPatch.context(), suppress(subprocess.CalledProcessError), network() as two:
        yield two
        return
    pytest.skip("may not make network namespaces here")


def trained(hosts: tuple[Host, Host], folder: Path, name: str, meanwhile: Callable[[Path], None]) -> dict:
    """The weights that a run on both hosts leaves."""
    logs = [folder / f"{name}-{host.name}.log" for host in hosts]
    started = [host.start(folder / name, log) for host, log in zip(hosts, logs, strict=True)]
    try:
        meanwhile(folder / name)
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert codes == [0, 0], "\n".join(log.read_text()[-1500:] for log in logs)
    return load_file(folder / name / "model" / "model.safetensors")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_host_that_is_cut_off_is_found_and_the_run_ends_bit_by_bit(hosts, texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    whole = trained(hosts, tmp_path, "whole", lambda run: None)
    second = hosts[1]

    def cut(run: Path) -> None:
        counter = run / "checkpoints" / ".steps_done"
        wait_until(lambda: counter.exists() and struct.unpack("<q", counter.read_bytes())[0] >= CUT_AT, 60)
        second.ip("link", "set", second.link, "down")
        logs = [tmp_path / f"{run.name}-{host.name}.log" for host in hosts]
        wait_until(lambda: all("has stood still for 6 s" in log.read_text() for log in logs), 3 * LIMIT)
        second.ip("link", "set", second.link, "up")

    again = trained(hosts, tmp_path, "cut", cut)
    assert "going on from step" in "".join(log.read_text() for log in tmp_path.glob("cut-*.log"))
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name
