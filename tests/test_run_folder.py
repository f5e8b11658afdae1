"""Ranks that start at once, each with a clock of its own, make one folder."""

from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from lightning_modules.run_folder import moment, run_folder


def test_ranks_of_torchrun_go_by_the_clock_of_one_of_them(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert datetime.strptime(moment(), "%Y%m%d-%H%M%S")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    store.set("moment of attempt 0", "20200101-000000")
    assert moment() == "20200101-000000"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    first = moment()
    assert first != "20200101-000000" and moment() == first


def test_a_folder_that_another_rank_tries_at_the_same_time_can_be_written_to(tmp_path, monkeypatch):
    def touched(path: Path) -> None:
        """And taken away again, by the other."""

    monkeypatch.setattr(Path, "touch", touched)
    assert run_folder("pretrain", str(tmp_path / "run")).is_dir()
