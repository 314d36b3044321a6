#!/usr/bin/env bash
# The control of the comparison: bf16, compiled, PyTorch's own choice of an attention kernel.
#
#   DRY_RUN=1 bash jobs/baseline/submit-baseline.sh                print what would be submitted and run
#   bash jobs/baseline/submit-baseline.sh                          submit it
#   NODES=2 GPUS_PER_NODE=4 bash jobs/baseline/submit-baseline.sh  a variable for this time
#   bash jobs/baseline/submit-baseline.sh --learning_rate 0.0003   words after it are flags of llm_train.py
#
# Edit the variables here or give them in the environment. jobs/common.sh says how a job goes; the three jobs differ in
# TECHNIQUE alone, so what differs between their runs is the technique.
#
# From the repository, `sbatch jobs/baseline/submit-baseline.sh` works too: then the options of sbatch
# and the lines below take the place of the variables of the cluster.
#SBATCH --job-name=baseline
#SBATCH --output=outputs/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --ntasks-per-node=1
set -euo pipefail

# The cluster.
ACCOUNT="${ACCOUNT:-}"                      # empty: your default account
PARTITION="${PARTITION:-}"                  # empty: the default partition
TIME_LIMIT="${TIME_LIMIT:-04:00:00}"
NODES="${NODES:-${SLURM_JOB_NUM_NODES:-1}}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
CPUS_PER_GPU="${CPUS_PER_GPU:-8}"
CONTAINER="${CONTAINER:-}"                  # image for pyxis/enroot; empty: the environment at hand
CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-}"    # more folders to see in it, as /from:/to,/from:/to
MORE_SBATCH="${MORE_SBATCH:-}"              # more options of sbatch, such as "--exclusive --mem=0"
STOP_SECONDS="${STOP_SECONDS:-120}"         # so long before the time limit the run is told to save and to end
REQUEUES="${REQUEUES:-50}"                  # how often a run that the time limit ended goes on; 0: never
MAX_RESTARTS="${MAX_RESTARTS:-3}"           # how often torchrun starts the processes again after a failure

# The run.
RUN_NAME="${RUN_NAME:-}"                    # empty: baseline-<nodes>x<GPUs>-<job>; an unfinished run's: go on with it
EXPERIMENT="${EXPERIMENT:-slurm}"
MODEL_TYPE="${MODEL_TYPE:-llama}"
MODEL_SIZE="${MODEL_SIZE:-llama-1b}"
DATASET_PATH="${DATASET_PATH:-}"            # text: a file or a folder; empty: the built-in, generated sample
STEPS="${STEPS:-1000}"                      # optimizer steps, in at most EPOCHS passes over the text
EPOCHS="${EPOCHS:-1000}"
BATCH_SIZE="${BATCH_SIZE:-}"                # sequences of a step on all GPUs together; empty: 4 a GPU
PARALLEL="${PARALLEL:-ddp}"                 # ddp or fsdp; one GPU needs neither
CHECKPOINT_MINUTES="${CHECKPOINT_MINUTES:-30}"

# What the other two are compared with.
TECHNIQUE=(--precision bf16 --use_compile true --attention_backend sdpa)

here="$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -f "$here/jobs/common.sh" ]] || here="$PWD" # SLURM runs a copy of this file elsewhere, in the repository's folder
# shellcheck source=jobs/common.sh
source "$here/jobs/common.sh"
run_job baseline "$here/jobs/baseline/submit-baseline.sh" "$@"
