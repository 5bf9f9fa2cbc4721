"""Several processes train the model that one trains: same losses, same checkpoints, whatever their number, however the
network is held, however they end.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from crew import Job, do_jobs, screen
from torch import nn

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.diffusion.noising import MaskLaw, hide_by_place
from lingshu_cell.engine.minibatch import StepDraws, first_rows, parts_of
from lingshu_cell.engine.optimiser import clip
from lingshu_cell.engine.processes import World
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import load_model
from lingshu_cell.launch import meeting_port
from lingshu_cell.network.layers import RowDropout
from lingshu_cell.prepare import prepare
from lingshu_cell.tokens import MASK_TOKEN
from lingshu_cell.train import train

ROUNDING = 1e-5  # sums in another order, over 6 optimiser steps
STEPS = {"steps": 6, "validate_every": 1, "checkpoint_every": 3, "precision": "fp32"}
ONE_STEP = {**STEPS, "steps": 3}


def rows_of(run: Path) -> np.ndarray:
    """Loss, validation and gradient norm of every step."""
    with open(run / "history.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return np.array([[float(row[k]) for k in ("loss", "validation_nelbo", "gradient_norm")] for row in rows])


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the runs, and what was said in each."""
    folder = tmp_path_factory.mktemp("crew")

    def job(name: str, size: int, preset: str = "small", **training: object) -> Job:
        return Job(folder / name, size, {"training": {**STEPS, **training}}, preset)

    def perturbed(name: str, size: int, **training: object) -> Job:
        """Parameters for doses are never used here, those of the perturbations only later."""
        told = {"condition_keys": ["line"], "perturbation_key": "drug", "control": "none", "depth": True}
        return Job(folder / name, size, {"data": told, "training": {**STEPS, **training}})

    screen().write_h5ad(folder / "cells.h5ad")
    prepare([folder / "cells.h5ad"], folder / "store", cells_per_shard=50)
    told = {"condition_keys": ["line"], "perturbation_key": "drug", "control": "none"}
    stored = {"data": told, "training": {**STEPS, "balance": 0.5}}
    jobs = [
        Job(folder / "stored-one", 1, stored, store=folder / "store"),
        Job(folder / "stored-moved", 3, stored, store=folder / "store", terminate=(2, 2)),
        Job(folder / "stored-moved", 2, stored, store=folder / "store", resume=True),
        job("one", 1),
        job("paper-one", 1, "paper"),
        job("whole-3", 3, microbatch_size=4),  # 10, 11 and 11 cells
        job("parts-2", 2, sharding="full", microbatch_size=9),
        job("paper-parts-2", 2, "paper", sharding="full"),
        perturbed("perturbed-one", 1),
        perturbed("perturbed-whole-2", 2, microbatch_size=7),
        perturbed("perturbed-parts-2", 2, sharding="full"),
        Job(folder / "moved", 2, {"training": {**STEPS, "sharding": "full"}}, terminate=(1, 2)),
        Job(folder / "moved", 3, {"training": STEPS}, resume=True, terminate=(0, 2)),
        Job(folder / "moved", 1, {"training": STEPS}, resume=True),
        Job(folder / "no-memory-2", 2, {"training": STEPS}, memory=(1, 4)),
        Job(folder / "too-many", 2, {"training": {**ONE_STEP, "minibatch_size": 1}}),
        Job(folder / "diverged", 2, {"training": {**STEPS, "peak_learning_rate": 1e9, "warmup_steps": 0}}),
        # the last, as one waits until the other's process ends
        Job(folder / "no-memory-parts", 2, {"training": {**ONE_STEP, "sharding": "full"}}, memory=(1, 4)),
    ]
    return folder, do_jobs(jobs)


@pytest.mark.parametrize(
    ("run", "alone"),
    [
        ("whole-3", "one"),
        ("parts-2", "one"),
        ("paper-parts-2", "paper-one"),
        ("moved", "one"),
        ("no-memory-2", "one"),
        ("perturbed-whole-2", "perturbed-one"),
        ("perturbed-parts-2", "perturbed-one"),
        ("stored-moved", "stored-one"),
    ],
)
def test_loss_curve_is_that_of_one_process_within_rounding(crew, run, alone):
    folder, told = crew
    found, expected = rows_of(folder / run), rows_of(folder / alone)
    assert found.shape == expected.shape == (6, 3), told[run]
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
    assert len(np.unique(expected[:, 0])) == 6


@pytest.mark.parametrize("run", ["whole-3", "parts-2", "moved"])
def test_checkpoint_is_that_of_one_process_within_rounding_and_can_be_generated_from(crew, run):
    folder, _ = crew
    found, expected = load_checkpoint(folder / run), load_checkpoint(folder / "one")
    assert found.step == expected.step == 6
    for file in ("weights", "ema_0.05", "ema_0.10", "optimizer", "buffers", "data"):
        ours, theirs = found.tensors(file), expected.tensors(file)
        assert ours.keys() >= theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    curves = [c.manifest["information_curve"]["nats"] for c in (found, expected)]
    np.testing.assert_allclose(*curves, rtol=ROUNDING)
    model = load_model(folder / run, device="cpu")
    assert sum(p.numel() for p in model.network.parameters()) == found.manifest["n_parameters"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(crew):
    folder, told = crew
    assert sorted(p.name for p in folder.glob("moved/checkpoint-*")) == ["checkpoint-00000004", "checkpoint-00000006"]
    assert [note.split(", ")[-1] for note in told["moved"] if "parameters" in note] == [
        "2 processes", "3 processes", f"{len_train(folder)} training cells",
    ]  # fmt: skip


def len_train(folder: Path) -> int:
    return load_checkpoint(folder / "one").manifest["n_training_cells"]


def test_microbatches_become_smaller_in_every_process_until_all_have_the_memory(crew):
    _, told = crew
    assert [n for n in told["no-memory-2"] if "memory" in n] == [
        "memory ran out: going on in microbatches of 8 cells, with the same result",
        "memory ran out: going on in microbatches of 4 cells, with the same result",
    ]


def test_a_network_in_parts_says_which_microbatch_to_ask_for(crew):
    _, told = crew
    said = [line for line in told["no-memory-parts"] if "Error" in line]
    assert len(said) == 1, said
    assert said[0].startswith("LingshuError: Memory must suffice for a microbatch: it ran out at 16 cells per process")
    assert "--set training.microbatch_size=8" in said[0]


def test_what_all_find_wrong_is_said_once(crew):
    _, told = crew
    assert [line for line in told["too-many"] if "Error" in line] == [
        "LingshuError: Every process needs cells of the minibatch: 1 cells, 2 processes. Start fewer processes, or "
        "raise training.minibatch_size."
    ]
    diverged = [line for line in told["diverged"] if "Error" in line]
    assert len(diverged) == 1 and diverged[0].startswith("LingshuError: Training must stay finite: at step ")


def test_memory_that_the_kernel_refuses_halves_the_microbatch(tmp_path):
    """A real limit: the address space of the process."""
    training = {**ONE_STEP, "steps": 2, "minibatch_size": 32768}
    jobs = [
        Job(tmp_path / "limited", 1, {"training": training}, address_space_mib=100),
        Job(tmp_path / "free", 1, {"training": training}),
    ]
    told = do_jobs(jobs)
    assert "memory ran out: going on in microbatches of 16384 cells, with the same result" in told["limited"]
    assert not [n for n in told["free"] if "memory ran out" in n]
    np.testing.assert_allclose(rows_of(tmp_path / "limited"), rows_of(tmp_path / "free"), rtol=ROUNDING)


def start(run: Path, *more: str, n: int = 2) -> subprocess.Popen:
    """Start ``lingshu train --processes``, to be killed."""
    settings = ("gene_width=8", "width=16", "n_blocks=1", "feedforward_width=32")
    command = [sys.executable, "-m", "lingshu_cell", "train", str(run.parent / "cells.h5ad"), "--out", str(run)]
    command += ["--processes", str(n), *more]
    for setting in (*(f"network.{s}" for s in settings), "training.minibatch_size=32", "training.device=cpu",
                    "training.checkpoint_every=20", "training.validate_every=20", "training.steps=100000"):  # fmt: skip
        command += ["--set", setting]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def process_of(parent: int, rank: int) -> int:
    """Id of the process with this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_a_killed_process_ends_all_in_one_line_and_fewer_go_on(pbmc, tmp_path):
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    run = tmp_path / "run"
    process = start(run)
    wait_for(run / "checkpoint-00000020", process)
    os.kill(process_of(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    errors = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert errors == [
        "error: All processes must live to the end: process 1 of 2 was ended by SIGKILL. The last checkpoint, if there "
        "is one, is whole: go on with --resume and any number of processes."
    ]
    step = load_checkpoint(run).step
    assert step >= 20
    config = load_checkpoint(run).manifest["config"]
    config = tiny_config(**{name: config[name] for name in ("data", "network", "training", "generation")})

    def stop(progress):
        if progress.step == step + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train([pbmc], run, config, resume=True, on_progress=stop).step == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "launcher"])
def test_processes_asked_to_stop_save_once_and_go_on_in_another_number(pbmc, tmp_path, who):
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    run = tmp_path / "run"
    process = start(run)
    wait_for(run / "checkpoint-00000020", process)
    os.kill(process_of(process.pid, 1) if who == "rank" else process.pid, signal.SIGTERM)
    gave, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    step = load_checkpoint(run).step
    assert gave.startswith(f"{run}: step {step} of 100000") and gave.count("\n") == 1
    process = start(run, "--resume", n=3)
    wait_for(run / f"checkpoint-{(step // 20 + 1) * 20:08d}", process)
    process.terminate()
    gave, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "3 processes" in said


@pytest.mark.slow
def test_processes_end_when_what_started_them_is_killed(pbmc, tmp_path):
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    run = tmp_path / "run"
    process = start(run)
    wait_for(run / "checkpoint-00000020", process)
    ranks = [process_of(process.pid, rank) for rank in (0, 1)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert load_checkpoint(run).step >= 20


def test_shares_and_parts_cover_all_rows_once():
    for n, size in ((32, 3), (7, 7), (128, 4), (5, 2)):
        shares = [World(rank, size).share(n) for rank in range(size)]
        assert [i for share in shares for i in range(n)[share]] == list(range(n))
        assert max(share.stop - share.start for share in shares) == World(0, size).largest_share(n)
    assert parts_of(slice(3, 8), 2) == [slice(3, 5), slice(5, 8)]
    assert first_rows(parts_of(slice(0, 1), 2)) == [slice(0, 1), slice(0, 1)]


@pytest.mark.parametrize("first", [0, 5, 16, 37])
def test_genes_hidden_in_a_part_are_those_hidden_in_the_whole(first):
    draws = StepDraws.of(3, 50, 400, MaskLaw(0.5), 7, torch.device("cpu"))
    x_0_BG = torch.zeros(50, 400, dtype=torch.int16)
    whole = draws.hide(x_0_BG, 0)
    part = draws.hide(x_0_BG[first : first + 13], first)
    assert torch.equal(part, whole[first : first + 13])
    hidden_B = (whole == MASK_TOKEN).float().mean(1)
    assert (hidden_B + draws.visible_B - 1).abs().max() < 0.12
    other = StepDraws.of(4, 50, 400, MaskLaw(0.5), 7, torch.device("cpu"))
    assert not torch.equal(other.hide(x_0_BG, 0), whole)


def test_neighbouring_tiles_hide_independently():
    shown_BG = hide_by_place(torch.zeros(64, 5000), torch.full((64,), 0.5), lambda tile: tile, 0) == 0
    agreement = (shown_BG[:-1] == shown_BG[1:]).float().mean(1)
    assert (agreement - 0.5).abs().max() < 0.05


def test_dropout_of_a_part_is_that_of_the_whole():
    dropout = RowDropout(0.25)
    h_BD = torch.randn(20, 300)
    torch.manual_seed(1)
    whole = dropout(h_BD)
    dropout.first, dropout.n_places = 8, 20
    torch.manual_seed(1)
    assert torch.equal(dropout(h_BD[8:13]), whole[8:13])
    dropped = whole == 0
    assert abs(dropped.float().mean() - 0.25) < 0.02
    torch.testing.assert_close(whole[~dropped], h_BD[~dropped] / 0.75)
    assert torch.equal(dropout.eval()(h_BD), h_BD)


def test_held_out_cells_score_the_same_part_by_part():
    class Watcher:
        def __call__(self, x_t_BG, conditions):
            self.x_t_BG = x_t_BG
            return self

        def nll(self, x_0_BG, scored_BG):
            return (self.x_t_BG.float().sum(1) + scored_BG.float() @ torch.arange(30.0)).double()

    x_0_BG = torch.randint(0, 5, (11, 30), generator=torch.Generator().manual_seed(0)).short()
    told = torch.zeros(11, 0, dtype=torch.int64)
    whole, parts = (
        validation_nelbo(Watcher(), x_0_BG, told, torch.Generator().manual_seed(0), 3, rows)
        for rows in ([slice(None)], parts_of(slice(2, 9), 3))
    )
    assert torch.equal(parts, whole[2:9])


def test_gradients_are_clipped_as_torch_clips_them():
    parts = {name: nn.Parameter(torch.randn(5, 3)) for name in "ab"} | {"unused": nn.Parameter(torch.randn(2))}
    for name in "ab":
        parts[name].grad = torch.randn(5, 3) * 4
    expected = [parts[name].grad.clone() for name in "ab"]
    clones = [nn.Parameter(torch.zeros(5, 3)) for _ in "ab"]
    for clone, gradient in zip(clones, expected, strict=True):
        clone.grad = gradient
    norm = clip(parts, 0.7, lambda square: square)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(clones, 0.7)))
    for name, clone in zip("ab", clones, strict=True):
        torch.testing.assert_close(parts[name].grad, clone.grad)


def test_an_error_of_the_first_is_raised():
    with pytest.raises(LingshuError, match="a rule"):
        World().agreed(lambda: (_ for _ in ()).throw(LingshuError("a rule", "a finding", "a remedy")))
    assert World().agreed(lambda: 3) == 3


def test_processes_meet_at_a_free_port_that_no_connection_is_given(monkeypatch):
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    one, other = meeting_port(), meeting_port()
    assert 10_000 <= one < first_given and one != other
    monkeypatch.setattr("random.sample", lambda ports, n: [one, other])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one))
        assert meeting_port() == other
        with socket.socket() as another, pytest.raises(LingshuError, match="Processes need a port to meet at"):
            another.bind(("127.0.0.1", other))
            meeting_port()
    assert meeting_port() == one
