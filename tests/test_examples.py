"""The examples for clusters are what they say: read as they would be there, and run as two nodes on one machine."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.launch import meeting_port

yaml = pytest.importorskip("yaml")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SETTINGS = (
    "--set network.gene_width=8 --set network.width=16 --set network.n_blocks=1 --set network.feedforward_width=32 "
    "--set training.minibatch_size=32 --set training.device=cpu --set training.checkpoint_every=10"
)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """That of a job, with programs of ``tmp_path/bin`` first, then those beside this Python."""
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def program(tmp_path: Path, name: str, text: str) -> None:
    """Put a shell script in the place of a program of the cluster."""
    file = tmp_path / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def kubernetes() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text(encoding="utf-8"))
    return service, job


def test_batch_script_is_valid_bash_and_asks_for_a_signal_before_the_end():
    script = EXAMPLES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    assert "#SBATCH --signal=TERM@120" in script.read_text(encoding="utf-8")


def test_pods_of_the_job_meet_at_the_service():
    service, job = kubernetes()
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == {"job-name": name}
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert told["MEET"].startswith(f"{name}-0.{service['metadata']['name']}:")
    assert int(told["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert told["NPROC"] == container["resources"]["limits"]["nvidia.com/gpu"]
    subprocess.run(["bash", "-n"], input=container["args"][0], text=True, check=True)


def run_slurm(tmp_path: Path, run: Path, steps: int) -> None:
    # two tasks of srun on this machine are what would be one on each of two nodes
    program(tmp_path, "srun", '"$@" & one=$!\n"$@" & two=$!\nwait $one && wait $two')
    program(tmp_path, "scontrol", "echo localhost")
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", EXAMPLES / "slurm" / "train.sbatch", tmp_path / "cells.h5ad", run, *SETTINGS.split()]
    command += ["--set", f"training.steps={steps}"]
    port = {"LINGSHU_PORT": str(meeting_port()), "LINGSHU_PROCESSES": "1"}
    done = subprocess.run(
        command, env=environment(tmp_path, **slurm, **port), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr


@pytest.mark.slow
def test_batch_script_trains_on_two_nodes_and_goes_on_when_submitted_again(pbmc, tmp_path):
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    run_slurm(tmp_path, tmp_path / "run", 20)
    assert load_checkpoint(tmp_path / "run").step == 20
    run_slurm(tmp_path, tmp_path / "run", 20)  # a finished run is left as it is


@pytest.mark.slow
def test_pods_train_together(pbmc, tmp_path):
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    _, job = kubernetes()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}
    told |= {"NPROC": "1", "MEET": f"localhost:{meeting_port()}", "DATA": str(tmp_path / "cells.h5ad")}
    told |= {"RUN": str(tmp_path / "run"), "SETTINGS": f"{SETTINGS} --set training.steps=20 {told['SETTINGS']}"}
    command = [*container["command"], *container["args"]]
    pods = [
        subprocess.Popen(command, env=environment(tmp_path, **told), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [pod.communicate(timeout=200)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert load_checkpoint(tmp_path / "run").step == 20
