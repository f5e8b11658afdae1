"""What the machine can do: one matrix product a step."""

import torch
from sizes import Job
from turns import Turns, run_row

SIZE = 1024


def train(job: Job) -> None:
    a = torch.randn(SIZE, SIZE, device=job.device).to(torch.bfloat16 if job.bf16 else torch.float32)
    turns = Turns(job, parameters=0)
    while True:
        turns.step_begins()
        a @ a


if __name__ == "__main__":
    run_row(train)
