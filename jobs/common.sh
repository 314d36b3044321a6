# shellcheck shell=bash
# What the three jobs share: check the variables, submit, start one torchrun on each node, save and requeue in time.
#
# Sourced by jobs/*/submit-*.sh, which call run_job. Started by hand the script submits itself, since #SBATCH lines
# cannot read variables; inside an allocation (the job, or salloc) it does the work.
#
# At the time limit: STOP_SECONDS before it SLURM sends USR1 to this script alone, and this script has TERM sent to the
# training, which finishes its step, saves and ends with status 143 (torchrun makes 1 of it). Then the job is requeued,
# and --auto_resume goes on from that checkpoint. Three details that break it if done the plain way:
#
# - USR1 and not TERM, because TERM is what scancel sends: a job that its user cancels must not come back. (A node that
#   fails or is preempted needs nothing here: --requeue lets SLURM do it, and the run goes on in the same way.)
# - scancel --signal and not kill: srun answers TERM by killing its tasks.
# - The tasks are Python itself, neither bash nor uv: the signal goes to every process of the step. bash would end at
#   once, uv would pass it on, and to a run of one process the second one means: end without saving.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

end_with() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

# Seconds of a time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
seconds_of() {
    local days=0 parts
    [[ "$1" =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 1
    IFS=: read -ra parts <<< "${1#*-}"
    if [[ "$1" == *-* ]]; then
        days="${1%%-*}"
        parts+=(0 0)
    elif ((${#parts[@]} < 3)); then
        parts=(0 "${parts[@]}" 0)
    fi
    echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

check_variables() {
    local name limit
    for name in NODES GPUS_PER_NODE CPUS_PER_GPU STEPS EPOCHS STOP_SECONDS; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || end_with "$name must be a whole number above 0, not '${!name}'"
    done
    for name in REQUEUES MAX_RESTARTS; do
        [[ "${!name}" =~ ^(0|[1-9][0-9]*)$ ]] || end_with "$name must be a whole number from 0 up, not '${!name}'"
    done
    limit="$(seconds_of "$TIME_LIMIT")" || end_with "TIME_LIMIT must be a time such as 04:00:00, not '$TIME_LIMIT'"
    # The job would be requeued again and again without a step.
    ((limit > 2 * STOP_SECONDS)) || end_with "TIME_LIMIT $TIME_LIMIT must be more than twice STOP_SECONDS $STOP_SECONDS"
    [[ "$PARALLEL" == ddp || "$PARALLEL" == fsdp ]] || end_with "PARALLEL must be ddp or fsdp, not '$PARALLEL'"
    processes=$((NODES * GPUS_PER_NODE))
    BATCH_SIZE="${BATCH_SIZE:-$((4 * processes))}"
    [[ "$BATCH_SIZE" =~ ^[1-9][0-9]*$ && $((BATCH_SIZE % processes)) == 0 ]] ||
        end_with "BATCH_SIZE must be a multiple of the $processes GPUs, which share it, not '$BATCH_SIZE'"
    if [[ -n "$CONTAINER_MOUNTS" && -z "$CONTAINER" ]]; then
        end_with "CONTAINER_MOUNTS has no effect without CONTAINER"
    fi
    if [[ -n "$DATASET_PATH" ]]; then
        [[ -e "$DATASET_PATH" ]] || end_with "DATASET_PATH $DATASET_PATH does not exist"
        DATASET_PATH="$(cd "$(dirname "$DATASET_PATH")" && pwd)/$(basename "$DATASET_PATH")"
    fi
    if [[ "${SLURM_JOB_NUM_NODES:-$NODES}" != "$NODES" ]]; then
        end_with "NODES is $NODES and this allocation has $SLURM_JOB_NUM_NODES; leave NODES out"
    fi
}

# A requeued job keeps its number, so it finds its run again.
name_run() {
    RUN_NAME="${RUN_NAME:-$1-${NODES}x$GPUS_PER_NODE-$2}"
}

# What the script gives sbatch, as the array `submit`. Arguments: the job's name, the script, flags of llm_train.py.
sbatch_command() {
    local job_name="$1" script="$2"
    shift 2
    submit=(sbatch --export=ALL "--job-name=$job_name" "--chdir=$ROOT" "--output=outputs/logs/%x-%j.out"
        "--nodes=$NODES" --ntasks-per-node=1 "--gpus-per-node=$GPUS_PER_NODE"
        "--cpus-per-task=$((CPUS_PER_GPU * GPUS_PER_NODE))" "--time=$TIME_LIMIT" "--signal=B:USR1@$STOP_SECONDS"
        --requeue --open-mode=append)
    [[ -z "$ACCOUNT" ]] || submit+=("--account=$ACCOUNT")
    [[ -z "$PARTITION" ]] || submit+=("--partition=$PARTITION")
    local more
    read -ra more <<< "$MORE_SBATCH"
    submit+=("${more[@]}" "$script" "$@")
}

# What each node runs, as the array `step`. Arguments: python, job number, first node, flags of llm_train.py.
srun_command() {
    local python="$1" job="$2" head="$3"
    shift 3
    # A node that has ended must leave the others the time to save, but not for ever.
    step=(srun "--nodes=$NODES" "--ntasks=$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "--wait=$STOP_SECONDS")
    # srun does not take this one over from sbatch; in an allocation made without it, asking for it would fail.
    if [[ -z "${SLURM_JOB_ID:-}" || -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
        step+=("--cpus-per-task=${SLURM_CPUS_PER_TASK:-$((CPUS_PER_GPU * GPUS_PER_NODE))}")
    fi
    if [[ -n "$CONTAINER" ]]; then
        local mounts="$ROOT:$ROOT"
        [[ "$DATASET_PATH" != /* || "$DATASET_PATH" == "$ROOT"/* ]] || mounts+=",$DATASET_PATH:$DATASET_PATH"
        [[ -z "$CONTAINER_MOUNTS" ]] || mounts+=",$CONTAINER_MOUNTS"
        # Writable for the compiler's caches; GIT_COMMIT is that of the folder and not that of the image.
        step+=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$ROOT"
            --container-writable --container-env=GIT_COMMIT)
    fi
    step+=("$python")
    if ((processes > 1)); then
        step+=(-m torch.distributed.run "--nnodes=$NODES" "--nproc_per_node=$GPUS_PER_NODE"
            --rdzv_backend=c10d "--rdzv_id=$job"
            "--rdzv_endpoint=$head:${RDZV_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}" # two jobs may share a node
            "--max_restarts=$MAX_RESTARTS")
    fi
    step+=(llm_train.py --experiment "$EXPERIMENT" --run_name "$RUN_NAME" --auto_resume true
        --model_type "$MODEL_TYPE" --model_size "$MODEL_SIZE" "${TECHNIQUE[@]}"
        --max_steps "$STEPS" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE"
        --checkpoint_every_minutes "$CHECKPOINT_MINUTES")
    [[ -z "$DATASET_PATH" ]] || step+=(--dataset_path "$DATASET_PATH")
    ((processes == 1)) || step+=(--parallel "$PARALLEL")
    step+=("$@")
}

# The interpreter of the environment at hand. Nothing is installed: compute nodes often have no network, and several
# jobs share the folder.
find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        echo "$PYTHON"
    elif [[ -n "$CONTAINER" ]]; then
        echo python
    elif command -v uv > /dev/null; then
        uv run --no-sync python -c 'import importlib.util, sys
print(sys.executable) if importlib.util.find_spec("torch") else sys.exit(1)' ||
            end_with "torch is not installed here; on the login node: uv sync --extra torchao --extra flash"
    else
        end_with "uv is not on PATH; install it, or set PYTHON to an interpreter or CONTAINER to an image"
    fi
}

# Print a command as one line that a shell reads.
show() {
    printf '%q ' "$@"
    echo
}

time_is_up() {
    stopping=1
    signals=$((signals + 1))
    echo "$STOP_SECONDS s before the time limit: the run is told to save and to end"
    scancel --signal=TERM "$SLURM_JOB_ID" || true # the steps, not this script; none may have begun
}

cancelled() { # SLURM has told the steps too; they save, and nothing is requeued
    signals=$((signals + 1))
    echo "cancelled or preempted: waiting for the run to save"
}

# Run `step` and set `status`. A signal ends bash's wait, not srun: then it waits again.
run_step() {
    local seen=-1 process
    "${step[@]}" &
    process=$!
    while ((seen != signals)); do
        seen=$signals
        status=0
        wait "$process" || status=$?
    done
}

run_job() {
    local job_name="$1" script
    script="$(realpath "$2")"
    shift 2
    check_variables
    cd "$ROOT"
    if [[ "${DRY_RUN:-0}" != 0 ]]; then
        sbatch_command "$job_name" "$script" "$@"
        name_run "$job_name" JOB
        srun_command "${PYTHON:-python}" JOB FIRST_NODE "$@"
        show "${submit[@]}"
        show "${step[@]}"
        return
    fi
    mkdir -p outputs/logs
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        command -v sbatch > /dev/null || end_with "there is no SLURM here (no sbatch); DRY_RUN=1 prints what would run"
        export ACCOUNT PARTITION TIME_LIMIT NODES GPUS_PER_NODE CPUS_PER_GPU CONTAINER CONTAINER_MOUNTS MORE_SBATCH
        export STOP_SECONDS REQUEUES MAX_RESTARTS RUN_NAME EXPERIMENT MODEL_TYPE MODEL_SIZE DATASET_PATH STEPS EPOCHS
        export BATCH_SIZE PARALLEL CHECKPOINT_MINUTES
        sbatch_command "$job_name" "$script" "$@"
        exec "${submit[@]}"
    fi

    local python head status
    signals=0 stopping=0
    name_run "$job_name" "$SLURM_JOB_ID"
    trap time_is_up USR1
    trap cancelled TERM
    python="$(find_python)"
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    head="${head%%$'\n'*}"
    GIT_COMMIT="$(git rev-parse HEAD 2> /dev/null || true)"
    export GIT_COMMIT
    # torchrun gives the processes 30 s to save before it kills them; from PyTorch 2.12 on it reads this instead.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$STOP_SECONDS"
    srun_command "$python" "$SLURM_JOB_ID" "$head" "$@"
    echo "job $SLURM_JOB_ID on $NODES x $GPUS_PER_NODE GPUs, begun ${SLURM_RESTART_COUNT:-0} times before: run $RUN_NAME"
    show "${step[@]}"
    status=143
    ((signals)) || run_step
    if ((status == 0)); then
        echo "run $RUN_NAME is finished"
    elif grep -qsE '^ +"status": "(error|oom)"' "outputs/$EXPERIMENT/$RUN_NAME/run.json"; then
        echo "run $RUN_NAME failed: its run.json says why"
        exit "$status"
    elif ((stopping && ${SLURM_RESTART_COUNT:-0} < REQUEUES)); then
        echo "run $RUN_NAME is not finished: requeued"
        scontrol requeue "$SLURM_JOB_ID" || end_with "the job cannot be requeued; submit again with RUN_NAME=$RUN_NAME"
    else
        echo "run $RUN_NAME ended with status $status; to go on with it submit again with RUN_NAME=$RUN_NAME"
        exit "$status"
    fi
}
