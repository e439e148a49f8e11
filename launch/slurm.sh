#!/bin/bash
# Slurm: sbatch launch/slurm.sh --recipe recipes/gsm8k-qwen2.5-0.5b.yaml --run_name qwen16
# Before the time limit, and on preemption, the step is finished and saved. The job is queued again and goes on.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# shellcheck disable=SC2016  # each process has its own numbers
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS} \
    exec python train.py --resume auto "$@"' train "$@" &
step=$!
trap 'asked=yes; kill -USR1 $step' USR1 TERM
wait $step
code=$?
while kill -0 $step 2> /dev/null; do wait $step; code=$?; done # a signal has ended the wait, not the step
# A preemption with time to save is told to the processes only. Without this line the job would count as done.
case $(scontrol show job "$SLURM_JOB_ID") in *" PreemptTime=2"*) asked=yes ;; esac
if [ -n "$asked" ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
