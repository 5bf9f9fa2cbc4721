"""Training by several processes on one machine: same losses, CPU seconds, bytes exchanged; kills and resumes.

PBMC 3k, preset small, 30 steps of 128 cells. Processes are on CPU and exchange through gloo; each run has a network of
its own (unshare -rn), so that what passes through its loopback device is what the processes sent. The second part kills
a random process with SIGKILL at a random moment and goes on with a random number of processes, until the run is done.
"""

import argparse
import csv
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from recording import ROOT, environment, markdown_table, say, write_result

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import load_config
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.train import Progress, train

STEPS, COUNTED_FROM = 30, 10
VARIANTS = ((1, "none"), (2, "none"), (4, "none"), (2, "full"), (4, "full"))
_SIOCSIFFLAGS, _UP = 0x8914, 1


def loopback_bytes() -> int:
    """Bytes sent through the loopback device of this network."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise OSError("no loopback device")


def member(rank: int, size: int, sharding: str, run: str, sender: Any) -> None:
    """Train as one of several processes and report CPU seconds, bytes and losses."""
    if size > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
        os.environ.update({name: str(value) for name, value in here.items()})
    training = {"steps": STEPS, "sharding": sharding, "validate_every": STEPS, "device": "cpu"}
    config = load_config(overrides={"training": training, "data": {"condition_keys": ["cell_type"]}})
    smooth: list[float] = []
    marks: dict[int, tuple[float, int]] = {}

    def note(progress: Progress) -> None:
        smooth.append(progress.loss)
        if progress.step in (COUNTED_FROM, STEPS - 1):
            marks[progress.step] = (time.perf_counter(), loopback_bytes())

    before = time.process_time()
    result = train([pbmc3k_path()], run, config, on_progress=note)
    told: dict[str, Any] = {"cpu_seconds": time.process_time() - before, "validation_nelbo": result.validation_nelbo}
    if rank == 0:
        (t0, b0), (t1, b1) = marks[COUNTED_FROM], marks[STEPS - 1]
        n = STEPS - 1 - COUNTED_FROM
        raw = [smooth[0]] + [(now - 0.98 * last) / 0.02 for last, now in pairwise(smooth)]
        told |= {"losses": raw, "seconds_per_step": (t1 - t0) / n, "bytes_per_step": (b1 - b0) / n}
        weights = load_checkpoint(run).tensors("weights")
        told["n_parameters"] = sum(one.numel() for one in weights.values())
        told["n_in_blocks"] = sum(one.numel() for name, one in weights.items() if name.startswith("blocks."))
    sender.send(told)


def one_run(size: int, sharding: str, run: str) -> dict[str, Any]:
    """Train once with some processes; called in a network of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lingshu_cell.train", "anndata"])
    receivers, members = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        members.append(context.Process(target=member, args=(rank, size, sharding, run, sender)))
        members[-1].start()
        sender.close()
        receivers.append(receiver)
    told = [receiver.recv() for receiver in receivers]
    for one in members:
        one.join()
    return {**told[0], "cpu_seconds": sum(one["cpu_seconds"] for one in told), "processes": size, "sharding": sharding}


def exchanged_by_formula(size: int, sharding: str, n_parameters: int, n_in_blocks: int) -> float:
    """Bytes a step that all processes send, 4 for a number.

    A ring passes every number N - 1 times to gather it, and 2 (N - 1) times to reduce it for all, which gloo also does
    where each process needs a part only. Blocks are gathered twice, forward and back.
    """
    gathers = {"none": 0, "full": n_parameters + n_in_blocks}[sharding]
    return 4 * (size - 1) * (gathers + 2 * n_parameters)


def kills(folder: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """Train with kills, and once without; compare."""
    choose = random.Random(seed)
    settings = ["training.steps=60", "training.checkpoint_every=5", "training.validate_every=20", "training.device=cpu",
                "network.width=128", "network.feedforward_width=256", "network.gene_width=32"]  # fmt: skip
    config = load_config(settings=settings, overrides={"data": {"condition_keys": ["cell_type"]}})
    train([pbmc3k_path()], folder / "whole", config)
    file = folder / "settings.toml"
    from lingshu_cell.console import settings_toml

    file.write_text(settings_toml(config), encoding="utf-8")
    run, ended, steps, sizes = folder / "killed", [], [], []
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    while True:
        size = choose.choice([1, 2, 3])
        resume = any(run.glob("checkpoint-*"))
        command = [sys.executable, "-m", "lingshu_cell", "train", str(pbmc3k_path()), "--out", str(run)]
        command += ["--config", str(file), "--processes", str(size), *(["--resume"] if resume else [])]
        process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        sizes.append(size)
        if len(ended) == n_kills:
            _, said = process.communicate()
            if process.returncode:
                raise RuntimeError(said)
            break
        newest = max((p.name for p in run.glob("checkpoint-*")), default="")
        while process.poll() is None and max((p.name for p in run.glob("checkpoint-*")), default="") == newest:
            time.sleep(0.05)
        time.sleep(choose.random() * 2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if size > 1 else []
        victim = int(choose.choice(children)) if children else process.pid
        os.kill(victim, signal.SIGKILL)
        since = time.perf_counter()
        _, said = process.communicate()
        seconds = time.perf_counter() - since
        lines = [line for line in said.splitlines() if line.startswith("error")]
        try:
            steps.append(load_checkpoint(run).step)
            load_checkpoint(run).tensors("weights")
        except LingshuError as error:
            raise RuntimeError(f"a checkpoint is not whole: {error}") from None
        ended.append(
            {"processes": size, "seconds_to_end": seconds, "exit_code": process.returncode, "lines": len(lines)}
        )
        say(f"kill {len(ended)}: {ended[-1]}, checkpoint of step {steps[-1]}")
    rows = []
    for name in ("whole", "killed"):
        with open(folder / name / "history.csv", newline="", encoding="utf-8") as stream:
            rows.append([[float(r["loss"]), float(r["validation_nelbo"])] for r in csv.DictReader(stream)])
    difference = float(np.abs(np.array(rows[1]) / np.array(rows[0]) - 1).max())
    several = [one for one in ended if one["processes"] > 1]
    return {
        "kills": ended,
        "checkpoint_steps": steps,
        "processes": sizes,
        "all_checkpoints_whole": True,
        "longest_seconds_to_end": max((one["seconds_to_end"] for one in several), default=None),
        "one_line_each": all(one["lines"] == 1 and one["exit_code"] == 1 for one in several),
        "largest_relative_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--run", nargs=3, metavar=("SIZE", "SHARDING", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(one_run(int(arguments.run[0]), arguments.run[1], arguments.run[2])))
        return
    facts = environment()
    folder = ROOT / "build" / "processes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runs = []
    for size, sharding in VARIANTS:
        say(f"{size} processes, sharding {sharding}")
        command = [
            "unshare",
            "-rn",
            sys.executable,
            __file__,
            "--run",
            str(size),
            sharding,
            str(folder / f"{size}{sharding}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    alone = runs[0]
    for run in runs:
        run["largest_relative_difference"] = float(np.abs(np.divide(run["losses"], alone["losses"]) - 1).max())
        run["cells_per_cpu_second"] = STEPS * 128 / run["cpu_seconds"]
        run["bytes_by_formula"] = exchanged_by_formula(
            run["processes"], run["sharding"], run["n_parameters"], run["n_in_blocks"]
        )
    killed = kills(folder, arguments.kills, seed=0)
    rows = [
        (
            f"{r['processes']}, {'DDP' if r['sharding'] == 'none' else 'FSDP2'}" if r["processes"] > 1 else "1",
            float(r["losses"][-1]), r["largest_relative_difference"], float(r["validation_nelbo"]),
            r["cells_per_cpu_second"], r["bytes_per_step"] / 2**20, r["bytes_by_formula"] / 2**20,
        )
        for r in runs
    ]  # fmt: skip
    header = (
        "processes", "loss of the last step", "largest relative difference of a step's loss", "held-out NELBO",
        "cells per CPU second, all told", "MiB exchanged a step, counted", "by formula",
    )  # fmt: skip
    n_several = sum(one["processes"] > 1 for one in killed["kills"])
    text = (
        f"**Kills.** {len(killed['kills'])} times one process of 1, 2 or 3 was killed (SIGKILL) at a random moment "
        f"({n_several} times one of several), and the run went on with another number of processes: "
        f"{', '.join(map(str, killed['processes']))}. After each kill the newest checkpoint was whole; the processes "
        f"that were left ended within {killed['longest_seconds_to_end']:.1f} s, in one line each time: "
        f"{'yes' if killed['one_line_each'] else 'no'}. Largest relative difference of loss and held-out NELBO from "
        f"the run that nobody disturbed: {killed['largest_relative_difference']:.1e}."
    )
    size = f"{runs[0]['n_parameters'] / 1e6:.1f} M parameters"
    about = (
        f"Preset small on PBMC 3k ({size}), {STEPS} steps of 128 cells on CPU through gloo, one thread each. CPU "
        "seconds count the whole of `train` in all processes, reading the data in each included. GPUs and NCCL were "
        "not to be had. Formula for N processes, P numbers, B of them in blocks: DDP 4 (N - 1) 2 P bytes, FSDP2 "
        "4 (N - 1) (P + B + 2 P); NCCL would reduce to parts in P in place of gloo's 2 P."
    )
    write_result("processes-cpu", about, facts, {"runs": runs, "kills": killed}, [markdown_table(header, rows), text])


if __name__ == "__main__":
    main()
