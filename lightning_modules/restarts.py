"""What `torchrun --max_restarts` needs to succeed at once."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_after_restart(on_cpu: bool) -> None:
    """Connects the ranks of a second or later attempt of torchrun.

    Its store still holds the keys of the attempt before, and gloo reads them: about half of the restarts failed, see
    docs/reliability.md. So each attempt has a prefix of its own. Lightning takes the connection that it finds.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized():
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    of_the_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not of_the_agent,
        timeout=timedelta(minutes=5),
    )
    backend = "gloo" if on_cpu or not torch.cuda.is_available() else "nccl"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=ranks)
