"""Ranks that start at once, each with a clock of its own, make one folder."""

from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from lightning_modules.run_folder import moment, run_folder


def test_ranks_go_by_the_clock_of_the_first(monkeypatch):
    assert datetime.strptime(moment(), "%Y%m%d-%H%M%S")

    def told(values: list[str]) -> None:
        values[:] = ["20200101-000000"]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", told)
    assert moment() == "20200101-000000"


def test_a_folder_that_another_rank_tries_at_the_same_time_can_be_written_to(tmp_path, monkeypatch):
    def touched(path: Path) -> None:
        """And taken away again, by the other."""

    monkeypatch.setattr(Path, "touch", touched)
    assert run_folder("pretrain", str(tmp_path / "run")).is_dir()
