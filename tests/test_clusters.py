"""The scripts for SLURM and SkyPilot, run on two "machines" that are this one: the same training as one process."""

import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_stops import Process
from test_two_processes import free_port

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "accelerate_configs"

# What srun does: a task on each machine, signals passed on to all of them, the highest exit code. One line each, as
# the batch script asks for no option; and what scontrol answers.
SRUN = r"""#!/bin/bash
for node in 0 1; do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=("$!")
done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; done
    wait "$task"
    code=$(( $? > code ? $? : code ))
done
exit "$code"
"""
SCONTROL = r"""#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then echo "$3" | tr , "\n"; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def pictures(tmp_path):
    return tiny.photos(tmp_path / "pictures", 6, captions=[f"picture {number}" for number in range(6)])


@pytest.fixture
def cluster(tmp_path):
    """=> the variables of a job on two machines with one processor each."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


SHORT = "--report_to none --optimizer sgd --learning_rate 1e-3 --center_crop --resolution 64 --seed 3"


def words(model, pictures, folder, batch, more):
    given = f"--pretrained_model_name_or_path '{model}' --train_data_dir '{pictures}' --output_dir '{folder}'"
    return shlex.split(f"{given} {SHORT} --train_batch_size {batch} {more}")


def alone(script, folder, model, pictures, more):
    module = importlib.import_module(script)
    module.main(module.parse_args(words(model, pictures, folder, 4, more)))
    return losses(folder)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def same(folder, one, weights, step):
    """2 machines x batch 2 = batch 4; what was learned is there once, and as one process leaves it."""
    manifest = json.loads((folder / f"checkpoint-{step}" / "manifest.json").read_text())
    assert manifest["identity"]["examples_per_step"] == [2, 1, 2]  # batch, accumulated, processes
    ours, theirs = (load_file(each / weights) for each in (folder, one))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-7) for key in ours)
    left = [{path.name for path in each.glob("*") if "checkpoint-" not in path.name} for each in (folder, one)]
    assert left[0] == left[1]


def test_slurm_stops_in_time_queues_itself_and_goes_on(cluster, sd1, pictures, tmp_path):
    """Once to its time limit, told as --signal=B:USR1@600 tells it, and once more to the end."""
    steps, port, run = 30, free_port(), tmp_path / "run"
    script, weights = "train_text_to_image_lora", "pytorch_lora_weights.safetensors"
    cluster |= {"SLURM_JOB_ID": str(port - 10000), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,localhost"}
    cluster |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(ROOT), "REQUEUED": str(tmp_path / "requeued")}
    command = ["bash", CONFIGS / "slurm_multi_node.sh", f"{script}.py"]
    command += words(sd1, pictures, run, 2, f"--max_train_steps {steps}")
    with Process(*command, **cluster) as job:
        job.until(r"^step ")
        job.process.send_signal(signal.SIGUSR1)
        assert job.rest() == 75, job.said
        assert job.said.count("SIGUSR1: stopping after this step") == 2, "each machine was told"
    stopped = len(losses(run))
    assert 0 < stopped < steps and (run / f"checkpoint-{stopped}").is_dir() and not (run / weights).exists()
    assert (tmp_path / "requeued").read_text() == f"requeue {port - 10000}\n"
    with Process(*command, **cluster) as job:
        assert job.rest() == 0, job.said
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1, "finished: not queued again"
    expected = alone(script, tmp_path / "alone", sd1, pictures, f"--max_train_steps {steps}")
    assert losses(run) == pytest.approx(expected, rel=1e-5) and len(expected) == steps
    same(run, tmp_path / "alone", weights, stopped)


def test_a_job_that_fails_is_not_queued_again(cluster, sd1, tmp_path):
    cluster |= {"SLURM_JOB_ID": str(free_port() - 10000), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    cluster |= {"SLURM_SUBMIT_DIR": str(ROOT), "REQUEUED": str(tmp_path / "requeued")}
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    with Process("bash", CONFIGS / "slurm_multi_node.sh", "train_text_to_image.py", **cluster) as job:
        assert job.rest() == 1, job.said
    assert not (tmp_path / "requeued").exists()
    # It speaks when both are known to srun's stand-in, which else could not pass the signal on.
    waits = "#!/bin/bash\ntrap 'exit 1' USR1\nsleep 1\necho waiting\nwhile :; do sleep 0.1; done\n"
    (tmp_path / "bin" / "torchrun").write_text(waits)
    cluster |= {"SLURM_RESTART_COUNT": "100"}  # told to stop as often as it may
    with Process("bash", CONFIGS / "slurm_multi_node.sh", "train_text_to_image.py", **cluster) as job:
        job.until("waiting")
        job.process.send_signal(signal.SIGUSR1)
        assert job.rest() == 1, job.said
    assert not (tmp_path / "requeued").exists()


def test_skypilot_recovers_on_two_machines(cluster, sd1, pictures, tmp_path):
    """As two machines that replace a lost one find the bucket: with the checkpoint that went before them."""
    task = yaml.safe_load((CONFIGS / "skypilot.yaml").read_text())
    run, steps = tmp_path / "run", "--max_train_steps 4 --checkpointing_steps 2"
    expected = alone("train_text_to_image", tmp_path / "alone", sd1, pictures, steps)
    shutil.copytree(tmp_path / "alone" / "checkpoint-2", run / "checkpoint-2")
    given = {"MODEL": str(sd1), "PICTURES": str(pictures), "OUTPUT": str(run), "PORT": str(free_port())}
    given["OPTIONS"] = f"{SHORT} --train_batch_size 2 {steps} --allow_resume_mismatch examples_per_step"
    assert given.keys() == task["envs"].keys() and task["num_nodes"] == 2
    given |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    with contextlib.ExitStack() as machines:
        words = ["bash", "-c", f"cd '{ROOT}'\n{task['run']}"]
        ranks = [Process(*words, **cluster | given | {"SKYPILOT_NODE_RANK": str(rank)}) for rank in (0, 1)]
        for one in map(machines.enter_context, ranks):
            assert one.rest() == 0, one.said
    assert losses(run) == pytest.approx({step: expected[step] for step in (3, 4)}, rel=1e-5)
    same(run, tmp_path / "alone", "unet/diffusion_pytorch_model.safetensors", 4)
