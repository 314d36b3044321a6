"""The SLURM jobs: what they would submit and run, and their own control flow, with stand-ins for SLURM's commands."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import llm_train
from llm_plan import make_plan
from utils import parse_settings

ROOT = Path(__file__).parent.parent
SCRIPTS = {name: ROOT / "jobs" / name / f"submit-{name}.sh" for name in ("baseline", "flash-attn", "fp8")}
SHAPES = ((1, 1), (1, 4), (2, 4))
VARIABLES = set(re.findall(r"^([A-Z_]+)=", SCRIPTS["baseline"].read_text(), re.MULTILINE)) - {"TECHNIQUE"}

# A job runs a copy of the script, in the folder of --chdir, with the caller's environment; its process is sbatch's.
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "sbatch $*" >> "$FAKE/calls"
while [[ "$1" == --* ]]; do
    case "$1" in
        --chdir=*) cd "${1#*=}" ;;
        --nodes=*) export SLURM_JOB_NUM_NODES="${1#*=}" ;;
        --cpus-per-task=*) export SLURM_CPUS_PER_TASK="${1#*=}" ;;
    esac
    shift
done
cp "$1" "$FAKE/slurm_script"
shift
export SLURM_JOB_ID=77 SLURM_JOB_NODELIST=localhost
exec bash "$FAKE/slurm_script" "$@"
"""
# As the real one does, it answers TERM by killing its task.
SRUN = """#!/usr/bin/env bash
echo srun >> "$FAKE/calls"
echo "$*" > "$FAKE/step"
while [[ "$1" == --* ]]; do shift; done
"$@" &
echo $! > "$FAKE/task"
trap 'kill -KILL $(cat "$FAKE/task")' TERM
wait $(cat "$FAKE/task")
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$FAKE/calls"
[[ "$1" != show ]] || printf '%s\\n' localhost other
[[ "$1" != requeue || ! -e "$FAKE/refuse" ]]
"""
SCANCEL = f"""#!{sys.executable}
import os, sys, psutil
with open(os.environ["FAKE"] + "/calls", "a") as file:
    print("scancel", *sys.argv[1:], file=file)
task = psutil.Process(int(open(os.environ["FAKE"] + "/task").read()))
for process in [task, *task.children(recursive=True)]:
    process.terminate()
"""
# In the place of Python: a training that ends as told, or when it is told to.
TRAINING = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/words"
trap 'echo saved > "$FAKE/saved"; exit 143' TERM
touch "$FAKE/begun"
[[ "$1" == llm_train.py ]] || exit 9
case "$BEHAVIOUR" in
    finish) exit 0 ;;
    fail) exit 3 ;;
esac
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what would change a job, with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("SLURM")}
    return kept | {name: str(value) for name, value in changes.items()}


def dry_run(name: str, *words: str, **variables: str) -> tuple[list[str], list[str]]:
    """The words of the two commands a script prints, without SLURM on PATH."""
    done = subprocess.run(
        ["bash", SCRIPTS[name], *words], env=environment(DRY_RUN="1", **variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    submitted, inside = map(shlex.split, done.stdout.splitlines())
    assert (submitted[0], inside[0]) == ("sbatch", "srun")
    return submitted, inside


def settings_of(inside: list[str]) -> llm_train.Settings:
    """What llm_train.py would read of the words that are given it."""
    return parse_settings(llm_train.Settings, inside[inside.index("llm_train.py") + 1 :])


@pytest.fixture
def slurm(tmp_path):
    """A folder of stand-ins, and a function that starts a script among them; what they were called with is in calls."""
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "training": TRAINING}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def start(name: str, *words: str, **variables: str) -> subprocess.Popen:
        changes = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": tmp_path, "PYTHON": tmp_path / "training"}
        return subprocess.Popen(
            ["bash", SCRIPTS[name], *words],
            env=environment(**(changes | variables)),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return tmp_path, start


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and (path.name == "begun" or path.stat().st_size)):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)


def calls(folder: Path) -> list[str]:
    """Of the stand-ins, beside those for the first node's name and the submission."""
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if not line.startswith(("sbatch", "scontrol show"))]


# --------------------------------------------------------------------------------------------------------------------
# What would be submitted and run
# --------------------------------------------------------------------------------------------------------------------


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck is not installed: uv sync (group dev)"
    scripts = sorted(ROOT.glob("jobs/**/*.sh"))
    assert set(SCRIPTS.values()) < set(scripts)
    done = subprocess.run([program, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_dry_run(name, nodes, gpus):
    shape = {"NODES": nodes, "GPUS_PER_NODE": gpus, "STEPS": "7", "PARALLEL": "fsdp"}
    submitted, inside = dry_run(name, "--learning_rate", "0.0003", **shape)
    assert submitted[-3:] == [str(SCRIPTS[name]), "--learning_rate", "0.0003"]
    for word in (f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--cpus-per-task={8 * gpus}", f"--chdir={ROOT}"):
        assert word in submitted
    assert not [word for word in submitted if word.startswith(("--account", "--partition"))]
    assert {f"--nodes={nodes}", f"--ntasks={nodes}", f"--cpus-per-task={8 * gpus}"} < set(inside)

    processes = nodes * gpus
    settings = settings_of(inside)
    assert settings.parallel == (None if processes == 1 else "fsdp")
    assert (settings.batch_size, settings.max_steps, settings.learning_rate) == (4 * processes, 7, 0.0003)
    assert settings.auto_resume and settings.run_name == f"{name}-{nodes}x{gpus}-JOB"
    if processes == 1:
        assert inside[inside.index("llm_train.py") - 1] == "python"
        assert "torch.distributed.run" not in inside
    else:
        begin = inside.index("python")
        assert inside[begin + 1 : begin + 3] == ["-m", "torch.distributed.run"]
        options = get_args_parser().parse_args(inside[begin + 3 :])
        assert (options.nnodes, options.nproc_per_node, options.max_restarts) == (str(nodes), str(gpus), 3)
        assert (options.rdzv_backend, options.rdzv_id) == ("c10d", "JOB")
        assert options.rdzv_endpoint == "FIRST_NODE:29500"
        assert options.training_script == "llm_train.py"
        assert parse_settings(llm_train.Settings, options.training_script_args) == settings

    # The combination is one that llm_train.py accepts, as far as a CPU can tell.
    here = {"device": "cpu", "fp8_emulation": settings.precision == "fp8"}
    plan = make_plan(dataclasses.replace(settings, **here), processes)
    assert plan.model_size == "llama-1b" and plan.use_compile


def test_the_three_differ_in_their_technique_alone():
    settings = {name: dataclasses.asdict(settings_of(dry_run(name, RUN_NAME="a")[1])) for name in SCRIPTS}
    base = settings["baseline"]
    assert (base["precision"], base["attention_backend"], base["use_compile"]) == ("bf16", "sdpa", True)

    def changes(name: str) -> dict:
        return {key: value for key, value in settings[name].items() if value != base[key]}

    assert changes("flash-attn") == {"attention_backend": None, "use_flash_attention": True}
    assert changes("fp8") == {"precision": "fp8", "fp8_recipe": "tensorwise"}


def test_lines_for_sbatch_agree_with_the_command():
    """`sbatch FILE` reads the #SBATCH lines, the script started by hand gives the same as options."""
    for name, script in SCRIPTS.items():
        lines = re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.MULTILINE)
        assert "--requeue" in lines and set(lines) < set(dry_run(name)[0])
        assert os.access(script, os.X_OK)


def test_variables_of_the_cluster(tmp_path):
    text = tmp_path / "some text.jsonl"
    text.touch()
    given = {"ACCOUNT": "a01", "PARTITION": "gpu", "TIME_LIMIT": "00:30:00", "STOP_SECONDS": "300"}
    more = {"MORE_SBATCH": "--exclusive --mem=0", "DATASET_PATH": text, "RDZV_PORT": "30000", "NODES": "2"}
    image = {"CONTAINER": "/images/lab.sqsh", "CONTAINER_MOUNTS": "/scratch:/scratch", "MAX_RESTARTS": "0"}
    submitted, inside = dry_run("fp8", **given, **more, **image)
    expected = {"--account=a01", "--partition=gpu", "--time=00:30:00", "--signal=B:USR1@300", "--exclusive", "--mem=0"}
    assert expected < set(submitted)
    assert f"--container-mounts={ROOT}:{ROOT},{text}:{text},/scratch:/scratch" in inside
    assert {"--container-image=/images/lab.sqsh", f"--container-workdir={ROOT}", "--wait=300"} < set(inside)
    assert settings_of(inside).dataset_path == str(text)
    assert "--rdzv_endpoint=FIRST_NODE:30000" in inside and "--max_restarts=0" in inside
    assert not [word for word in dry_run("fp8")[1] if "container" in word]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NODES": "0"}, "NODES must be a whole number above 0, not '0'"),
        ({"TIME_LIMIT": "banana"}, "TIME_LIMIT must be a time such as 04:00:00, not 'banana'"),
        ({"TIME_LIMIT": "00:04:00"}, "TIME_LIMIT 00:04:00 must be more than twice STOP_SECONDS 120"),
        ({"STOP_SECONDS": "50000", "TIME_LIMIT": "1-00"}, "TIME_LIMIT 1-00 must be more than twice STOP_SECONDS"),
        ({"GPUS_PER_NODE": "four"}, "GPUS_PER_NODE must be a whole number above 0, not 'four'"),
        ({"PARALLEL": "zero"}, "PARALLEL must be ddp or fsdp, not 'zero'"),
        ({"GPUS_PER_NODE": "4", "BATCH_SIZE": "6"}, "BATCH_SIZE must be a multiple of the 4 GPUs"),
        ({"DATASET_PATH": "/no/such"}, "DATASET_PATH /no/such does not exist"),
        ({"REQUEUES": "-1"}, "REQUEUES must be a whole number from 0 up"),
        ({"CONTAINER_MOUNTS": "/a:/a"}, "CONTAINER_MOUNTS has no effect without CONTAINER"),
        ({"NODES": "2", "SLURM_JOB_NUM_NODES": "1"}, "NODES is 2 and this allocation has 1"),
    ],
)
def test_wrong_variables_are_one_sentence(variables, sentence):
    for extra in ({"DRY_RUN": "1"}, {}):
        done = subprocess.run(
            ["bash", SCRIPTS["fp8"]], env=environment(**variables, **extra), capture_output=True, text=True
        )
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(f"submit-fp8.sh: error: {sentence}") and done.stderr.count("\n") == 1


def test_without_slurm():
    done = subprocess.run(["bash", SCRIPTS["fp8"]], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "no sbatch" in done.stderr and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# How a job goes
# --------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_requeued(slurm):
    folder, start = slurm
    job = start("flash-attn", "--seed", "5", BEHAVIOUR="finish", ACCOUNT="a01")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "run flash-attn-1x1-77 is finished" in output
    assert calls(folder) == ["srun"]
    assert "--cpus-per-task=8 " in (folder / "step").read_text()
    words = (folder / "words").read_text().splitlines()
    settings = parse_settings(llm_train.Settings, words[1:])
    assert settings.run_name == "flash-attn-1x1-77" and settings.seed == 5 and settings.use_flash_attention


@pytest.mark.parametrize("restarts", ["0", "49", "50"])
def test_at_the_time_limit_the_run_saves_and_the_job_is_requeued(slurm, restarts):
    """TERM reaches the training and not srun; after REQUEUES times it is enough."""
    folder, start = slurm
    job = start("baseline", BEHAVIOUR="wait", SLURM_RESTART_COUNT=restarts)
    wait_for(folder / "begun")
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert (folder / "saved").exists(), output
    again = restarts != "50"
    assert job.returncode == (0 if again else 143), output
    assert calls(folder) == ["srun", "scancel --signal=TERM 77", *(["scontrol requeue 77"] if again else [])]
    assert "RUN_NAME=baseline-1x1-77" in output or again


def test_a_refused_requeue_is_said(slurm):
    folder, start = slurm
    (folder / "refuse").touch()
    job = start("baseline", BEHAVIOUR="wait")
    wait_for(folder / "begun")
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and "cannot be requeued; submit again with RUN_NAME=baseline-1x1-77" in output


def test_a_cancelled_job_does_not_come_back(slurm):
    """scancel sends TERM to the tasks and to the script; the script waits until the run has saved."""
    folder, start = slurm
    job = start("baseline", BEHAVIOUR="wait")
    wait_for(folder / "begun")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert job.poll() is None
    os.kill(int((folder / "task").read_text()), signal.SIGTERM)
    assert "waiting for the run to save" in job.communicate(timeout=60)[0]
    assert job.returncode == 143 and (folder / "saved").exists() and calls(folder) == ["srun"]


def test_a_failing_training_is_not_requeued(slurm):
    folder, start = slurm
    job = start("fp8", BEHAVIOUR="fail")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 3 and "ended with status 3" in output and calls(folder) == ["srun"]


def test_inside_an_allocation_it_takes_that_one(slurm):
    """Nodes and GPUs are those of the allocation where no variable says otherwise."""
    folder, start = slurm
    allocation = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    job = start("baseline", BEHAVIOUR="finish", SLURM_JOB_NODELIST="n[1-2]", **allocation)
    assert "on 2 x 4 GPUs" in job.communicate(timeout=60)[0]
    options = get_args_parser().parse_args((folder / "words").read_text().splitlines()[2:])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_id) == ("2", "4", "5")
    assert options.rdzv_endpoint == "localhost:29505"
    assert "sbatch" not in (folder / "calls").read_text()
    assert "--cpus-per-task" not in (folder / "step").read_text()  # the allocation may have fewer


def test_the_environment_at_hand(slurm):
    """Without PYTHON or CONTAINER uv names the interpreter, and the task is that and not uv."""
    folder, start = slurm
    uv = folder / "uv"
    uv.write_text(f'#!/usr/bin/env bash\n[[ "$*" == "run --no-sync python -c "* ]] && echo {folder}/training\n')
    uv.chmod(stat.S_IRWXU)
    job = start("baseline", BEHAVIOUR="finish", PYTHON="")
    assert "is finished" in job.communicate(timeout=60)[0] and job.returncode == 0
    assert f"--cpus-per-task=8 {folder}/training llm_train.py" in (folder / "step").read_text()
    uv.write_text("#!/usr/bin/env bash\nexit 1\n")
    (folder / "calls").unlink()
    job = start("baseline", PYTHON="")
    assert "torch is not installed here; on the login node: uv sync" in job.communicate(timeout=60)[0]
    assert job.returncode == 2 and not calls(folder)


def test_two_processes_stop_at_the_time_limit_and_go_on(slurm):
    """The job itself: torchrun, training, checkpoint, requeue, and the second start of the same job."""
    folder, start = slurm
    tiny = {"MODEL_TYPE": "transformer", "MODEL_SIZE": "tiny", "GPUS_PER_NODE": "2", "PYTHON": sys.executable}
    tiny |= {"BATCH_SIZE": "4", "OMP_NUM_THREADS": "1", "RDZV_PORT": "0"}
    words = "--device cpu --precision fp32 --use_compile false --evaluate_on none --figures false --max_documents 60"
    words += " --num_layers 1 --embedding_dim 32 --num_heads 2 --context_length 32 --vocab_size 300 --tracked_steps 1"
    words = [*words.split(), "--output_folder", str(folder), "--cache_folder", str(folder / "cache")]
    run = folder / "slurm" / "baseline-1x2-77"

    job = start("baseline", *words, STEPS="100000", EPOCHS="100000", **tiny)
    wait_for(run / "steps.jsonl")
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert calls(folder) == ["srun", "scancel --signal=TERM 77", "scontrol requeue 77"]
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "interrupted" and info["world_size"] == 2
    steps = len((run / "steps.jsonl").read_text().splitlines())
    assert (run / "checkpoint" / f"step-{steps}").is_dir()

    job = start("baseline", *words, STEPS=steps + 2, EPOCHS="100000", SLURM_RESTART_COUNT="1", **tiny)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert "run baseline-1x2-77 is finished" in output and calls(folder)[3:] == ["srun"]
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 3))
    assert json.loads((run / "run.json").read_text())["resumed"][0]["step"] == steps


# --------------------------------------------------------------------------------------------------------------------
# The image
# --------------------------------------------------------------------------------------------------------------------


def test_dockerfile():
    """What it copies is there, the extras exist, and run.json learns the commit; building it needs another machine."""
    text = (ROOT / "jobs" / "Dockerfile").read_text().replace("\\\n", " ")
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert list(ROOT.glob(source.removeprefix("./"))), source
    extras = set(re.findall(r"--extra (\w+)", text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras == {"torchao", "tensorboard", "liger", "flash"} <= set(project["optional-dependencies"])
    assert "uv.lock" not in text
    assert re.search(r"^ARG GIT_COMMIT=\nENV GIT_COMMIT=\$\{GIT_COMMIT\}$", text, re.MULTILINE)
    assert 'os.environ.get("GIT_COMMIT")' in (ROOT / "run_folder.py").read_text()


def test_the_three_jobs_differ_in_the_technique_alone():
    """Their variables stand at the top of each, where a user edits them; so they must not drift apart."""
    variables, techniques = set(), set()
    for name, path in SCRIPTS.items():
        text = path.read_text()
        variables.add(
            text[text.index("# The cluster.") : text.rindex("\n\n# ", 0, text.index("\nTECHNIQUE="))].replace(
                name, "JOB"
            )
        )
        techniques.add(text[text.index("\nTECHNIQUE=") : text.index("\n\nhere=")])
    assert len(variables) == 1 and "ACCOUNT=" in next(iter(variables)) and len(techniques) == 3
