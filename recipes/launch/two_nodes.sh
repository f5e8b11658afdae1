#!/bin/bash
# Pretraining on two machines without a scheduler: start the same line on both.
#   bash recipes/launch/two_nodes.sh
# The folder of the run has to be one that both see. A machine that is lost and comes back joins again by the same line;
# the other one waits for it.
set -euo pipefail

FIRST=192.0.2.1                      # CHANGE: address of one of the two, which the other can reach
GPUS=8                               # CHANGE: of a machine
CONFIG=recipes/pretrain_llama_8b.yaml  # CHANGE: what is trained
DATA=/shared/texts                   # CHANGE: what it reads
RUN=/shared/runs/llama-8b            # CHANGE: where it is written
PYTHON=${PYTHON:-.venv/bin/python}   # CHANGE, if the environment is elsewhere

torchrun=("$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node "$GPUS" --max-restarts 3 --shutdown-timeout 240
  --rdzv-backend c10d)

# Or a machine that comes back would wait to be told an address that the others have known since the start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The doctor meets elsewhere than the training, which a machine that comes back joins at once.
if [ ! -e "$RUN/checkpoints" ]; then
  "${torchrun[@]}" --rdzv-endpoint "$FIRST:29401" --rdzv-id llama-8b-doctor \
    recipes/doctor.py --folder "$RUN" --data.path "$DATA"
fi
exec "${torchrun[@]}" --rdzv-endpoint "$FIRST:29400" --rdzv-id llama-8b \
  recipes/pretrain.py fit --config "$CONFIG" --data.path "$DATA" \
  --trainer.num_nodes 2 --trainer.devices "$GPUS" --trainer.default_root_dir "$RUN" --ckpt_path last
