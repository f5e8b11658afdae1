"""How the ranks of torchrun find each other, in each attempt of `--max_restarts`, on one machine and on several."""

import os
import secrets
import socket
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(minutes=5)
PAUSE = 0.05
"""Seconds between two looks into the store."""


def join(on_cpu: bool, backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Connects the ranks that torchrun starts; Lightning takes the connection that it finds.

    The store of a later attempt still holds the keys of the one before, and gloo reads them: about half of the restarts
    failed, see docs/reliability.md. So each attempt has a prefix of its own, which the first rank makes up.
    `backend` and `timeout` are what a strategy was given.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("TORCHELASTIC_RUN_ID") is None or ranks == 1 or dist.is_initialized():
        return
    rank = int(os.environ["RANK"])
    of_the_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, ranks, is_master=rank == 0 and not of_the_agent, timeout=WAIT)
    if backend is None and (on_cpu or not torch.cuda.is_available()):
        backend = "gloo"  # else None: NCCL, and gloo for what is on the CPU
    if not on_cpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before any rank sends something from the first
    over = threading.Event()
    attempt = secrets.token_hex(8)
    if rank == 0:
        helper = threading.Thread(target=answer, args=(address, ranks, attempt, over), daemon=True)
        helper.start()
    else:
        attempt = ask(store, rank, attempt)
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=ranks, timeout=timeout
        )
    finally:
        over.set()


def require_free_port() -> None:
    """Raises OSError where the port that MASTER_PORT names is another's: ranks would wait for each other there. Without
    it, or under torchrun, a free one is found."""
    port = os.environ.get("MASTER_PORT")
    if port is None or "LOCAL_RANK" in os.environ or int(os.environ.get("NODE_RANK", 0)):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(port)))
        except OSError:
            raise OSError(
                f"the port {port} by which ranks find each other is in use: another run may be there; pass another by "
                "MASTER_PORT=…"
            ) from None


def ask(store: dist.Store, rank: int, question: str) -> str:
    """The name of the attempt that the first rank is in now: it answers this very question, not one of an attempt that
    has ended. How many restarts a machine has seen would not do: each counts its own."""
    store.set(f"question of {rank}", question)
    store.wait([f"answer to {question}"], WAIT)
    return store.get(f"answer to {question}").decode()


def answer(address: tuple[str, int], ranks: int, attempt: str, over: threading.Event) -> None:
    """Tells every rank that asks, until all are there."""
    store = dist.TCPStore(*address, ranks, is_master=False, timeout=WAIT)
    answered: dict[int, bytes] = {}
    while not over.wait(PAUSE):
        for rank in range(1, ranks):
            key = f"question of {rank}"
            if store.check([key]) and (question := store.get(key)) != answered.get(rank):
                store.set(f"answer to {question.decode()}", attempt)
                answered[rank] = question
