"""Real processes that train together on CPU (gloo): a small crew, started once, that does a list of jobs.

The processes are forked off a server that has imported everything but run nothing, so a job costs what it computes.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from conftest import real_cells, tiny_config

from lingshu_cell.launch import meeting_port

PATIENCE_SECONDS = 300
"""A hang, not a busy machine: all jobs take 40 s. Less than a test may take, so that this ends it."""


@dataclass(frozen=True)
class Job:
    """One call of ``train`` by ``size`` processes.

    Attributes
    ----------
    run
        Run folder; its name is that of the job.
    size
        How many processes.
    config
        Arguments of :func:`conftest.tiny_config`.
    preset
        The preset.
    resume
        Go on with the folder.
    terminate
        (rank, step): this process gets SIGTERM in this step.
    memory
        (rank, cells): for this process memory runs out above so many cells, with the error PyTorch raises on a GPU.
    address_space_mib
        Limit on the memory that a process may take in addition, set with the kernel.
    store
        Train on the store in this folder.
    """

    run: Path
    size: int
    config: dict[str, Any] = field(default_factory=dict)
    preset: str = "small"
    resume: bool = False
    terminate: tuple[int, int] | None = None
    memory: tuple[int, int] | None = None
    address_space_mib: int | None = None
    store: Path | None = None


def do_jobs(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Do jobs one after the other; give for each what its first process noted, or an error said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crew", "lingshu_cell.train"])
    ports = [meeting_port() for _ in jobs]
    members, ends = [], []
    for rank in range(max(job.size for job in jobs)):
        receiver, sender = context.Pipe(duplex=False)
        members.append(context.Process(target=_member, args=(rank, jobs, ports, sender)))
        ends.append(receiver)
        members[-1].start()
        sender.close()
    told: list[list[str]] = [[] for _ in jobs]
    deadline = time.monotonic() + PATIENCE_SECONDS
    for end in ends:
        for notes in told:
            if not end.poll(max(deadline - time.monotonic(), 0)):
                stacks = _stacks(members, jobs[0].run.parent)
                raise TimeoutError(f"the crew hangs; so far: {told}\n{stacks}")
            notes += end.recv()
    for member in members:
        member.join()
    names = dict.fromkeys(job.run.name for job in jobs)
    return {
        name: [n for job, notes in zip(jobs, told, strict=True) if job.run.name == name for n in notes]
        for name in names
    }


def _stacks(members: Sequence[Any], folder: Path) -> str:
    """Where each process is, and end them all."""
    for member in members:
        if member.is_alive():
            os.kill(member.pid, signal.SIGUSR1)
    time.sleep(2)
    for member in members:
        member.kill()
    return "\n".join(f"{path.stem}\n{path.read_text()}" for path in sorted(folder.glob("process-*.stack")))


def _member(rank: int, jobs: Sequence[Job], ports: Sequence[int], sender: Any) -> None:
    warnings.filterwarnings("ignore", "Cells without any counts")
    stack = open(jobs[0].run.parent / f"process-{rank}.stack", "w")  # noqa: SIM115 - open for as long as the process
    faulthandler.register(signal.SIGUSR1, stack)
    for job, port in zip(jobs, ports, strict=True):
        notes: list[str] = []
        if rank < job.size:
            try:
                _train(rank, job, port, notes)
            except Exception as error:
                error_rank = getattr(error, "process", rank)
                if error_rank == rank:
                    notes.append(f"{type(error).__name__}: {error}")
                if not hasattr(error, "process"):
                    notes.append(traceback.format_exc())
        sender.send(notes)


def screen() -> ad.AnnData:
    """240 real cells × 150 genes, called a screen of two lines."""
    cells, rng = real_cells(240, 150), np.random.default_rng(0)
    cells.obs["line"], cells.obs["drug"] = rng.choice(["A", "B"], 240), rng.choice(["none", "P", "Q", "Q+P"], 240)
    return cells


def _train(rank: int, job: Job, port: int, notes: list[str]) -> None:
    from lingshu_cell.engine.sharding import HeldNetwork
    from lingshu_cell.train import train

    os.environ.pop("WORLD_SIZE", None)
    if job.size > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.size, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in here.items()}, MASTER_PORT=str(port))
    step, score = [0], HeldNetwork.nll

    def watched(held: HeldNetwork, x_t_BG: torch.Tensor, *rest: Any) -> torch.Tensor:
        step[0] += 1
        if job.terminate == (rank, step[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        if job.memory and rank == job.memory[0] and len(x_t_BG) > job.memory[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score(held, x_t_BG, *rest)

    HeldNetwork.nll = watched
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if job.address_space_mib:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (job.address_space_mib << 20), limits[1]))
    try:
        train(
            [job.store or screen()],
            job.run,
            tiny_config(job.preset, **job.config),
            resume=job.resume,
            on_note=notes.append,
        )
    finally:
        HeldNetwork.nll = score
        resource.setrlimit(resource.RLIMIT_AS, limits)
