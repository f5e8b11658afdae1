#!/bin/bash
# Pretraining on 8 machines with 8 GPUs each, under SLURM:   sbatch recipes/launch/slurm.sh
# Submit it from the folder of this project, on a file system that all machines share. What to change is marked CHANGE;
# everything else may stay. A job that is preempted, or that reaches its time limit, saves at the end of its step and is
# queued again; it goes on from there.
#SBATCH --job-name=llama-8b          # CHANGE: with the job's number, the name of the run's folder
#SBATCH --nodes=8                    # CHANGE
#SBATCH --gpus-per-node=8            # CHANGE, with GPUS below
#SBATCH --ntasks-per-node=1          # torchrun starts the ranks of a machine
#SBATCH --cpus-per-task=96           # CHANGE: all of a machine
#SBATCH --time=24:00:00              # CHANGE
#SBATCH --signal=TERM@300            # five minutes before that the ranks are told to save and leave
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

GPUS=8                               # CHANGE: of a machine
CONFIG=recipes/pretrain_llama_8b.yaml  # CHANGE: what is trained
DATA=/shared/texts                   # CHANGE: what it reads
PYTHON=${PYTHON:-.venv/bin/python}   # CHANGE, if the environment is elsewhere
RUN=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
torchrun=("$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --max-restarts 3 --shutdown-timeout 240
  --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id "$SLURM_JOB_ID")

# What a run would take is told by:  $PYTHON recipes/pretrain.py plan --config $CONFIG --devices 64 --hardware h100
srun --kill-on-bad-exit=1 "${torchrun[@]}" recipes/doctor.py --folder "$RUN" --data.path "$DATA" || exit 1

srun --kill-on-bad-exit=1 "${torchrun[@]}" recipes/pretrain.py fit --config "$CONFIG" --data.path "$DATA" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$GPUS" \
  --trainer.default_root_dir "$RUN" --ckpt_path last
code=$?

# A run that was told to leave has left a mark. One that failed is not tried again.
if [ -e "$RUN/checkpoints/.left_at_a_signal" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
