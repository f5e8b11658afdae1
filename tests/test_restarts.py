"""Ranks of an attempt find each other, whatever an attempt before has left in the store."""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

from lightning_modules.restarts import answer, ask
from tests.test_ddp import ROOT

RANK = """
import os, sys, torch
import torch.distributed as dist
from lightning_modules.restarts import join
join(on_cpu=True)
found = torch.ones(1) * (1 + dist.get_rank())
dist.all_reduce(found)
print(float(found), flush=True)
os._exit(0)  # as it is with a rank that is killed: nothing is cleaned up
"""


def test_attempts_one_after_the_other_on_one_store_have_nothing_in_common():
    """Also where machines count their restarts differently."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
    for counts in (("0", "0"), ("1", "3"), ("0", "0")):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                env=environment | {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": count},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, count in enumerate(counts)
        ]
        try:
            assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["3.0", "3.0"]
        finally:
            for rank in ranks:
                rank.kill()


def test_a_question_is_answered_by_the_attempt_that_is_there_now():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    store.set("question of 1", "of a rank that is no more")
    over = threading.Event()
    first = threading.Thread(target=answer, args=(("127.0.0.1", store.port), 2, "now", over), daemon=True)
    first.start()
    try:
        assert ask(store, 1, "mine") == "now"
    finally:
        over.set()
        first.join(timeout=10)
    assert not first.is_alive()
