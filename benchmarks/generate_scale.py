"""Many cells into a folder of shards: speed and memory of 1 and 2 processes, and 200,000 cells with kills in the run.

A tiny model (PBMC 3k, 300 genes, trained for seconds): what is measured is the machinery, not a network. Every process
is the real command. The killed folder is compared byte by byte with an undisturbed one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from recording import ROOT, environment, markdown_table, say, write_result

from lingshu_cell.config import load_config
from lingshu_cell.data.cell_folder import read_manifest, shard_files
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.train import train

N_GENES, TILE = 300, 256


def trained(folder: Path) -> Path:
    """A tiny run."""
    adata = ad.read_h5ad(pbmc3k_path())
    most = np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")[:N_GENES]
    config = load_config(
        overrides={
            "data": {"condition_keys": ["cell_type"]},
            "network": {"gene_width": 16, "width": 64, "n_blocks": 1, "feedforward_width": 128},
            "training": {"steps": 200, "device": "cpu"},
            "generation": {"steps": 8, "tile_size": TILE, "minibatch_size": 4 * TILE},
        }
    )
    train([adata[:, np.sort(most)].copy()], folder / "run", config)
    return folder / "run"


class Command:
    """``lingshu generate`` as a process, with its children watched."""

    def __init__(self, run: Path, out: Path, n_cells: int, n_processes: int) -> None:
        words = ["generate", str(run), "--n", str(n_cells), "--out", str(out), "--processes", str(n_processes)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.started, self.peak_mib = time.perf_counter(), 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lingshu_cell.cli", *words], env=environ, stdout=subprocess.DEVNULL
        )
        self.children: set[int] = set()

    def look(self) -> list[int]:
        """Give the processes that make cells, and note their memory."""
        try:
            found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        workers = [int(pid) for pid in found] or [self.process.pid]
        for pid in workers:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue
            kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            self.peak_mib = max(self.peak_mib, *(k / 1024 for k in kib or [0]))
        return workers

    def finish(self) -> dict[str, Any]:
        """Wait for the end."""
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            self.look()
            time.sleep(0.1)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mib": self.peak_mib,
            "exit_code": self.process.returncode,
        }


def killed(run: Path, out: Path, n_cells: int, n_kills: int, seed: int) -> dict[str, Any]:
    """Fill a folder with kills at random moments, by random numbers of processes, often two commands at once."""
    choose, kills, rounds = random.Random(seed), [], 0
    while len(kills) < n_kills and not (out / "manifest.json").exists():
        rounds += 1
        commands = [Command(run, out, n_cells, choose.choice([1, 2])) for _ in range(choose.choice([1, 2]))]
        for command in commands:
            before = len(list(out.glob("shards/*.json")))
            while command.process.poll() is None and len(list(out.glob("shards/*.json"))) <= before:
                time.sleep(0.02)
        time.sleep(choose.random() * 2)
        done = len(list(out.glob("shards/*.json")))
        victims = [pid for command in commands for pid in command.look()]
        choose.shuffle(victims)
        for pid in victims:  # one after the other, while the rest goes on
            os.kill(pid, signal.SIGKILL)
            kills.append(done)
            time.sleep(choose.random())
        for command in commands:
            command.finish()
        say(f"round {rounds}: {len(kills)} kills, {done} shards")
    last = Command(run, out, n_cells, 2).finish()
    if last["exit_code"]:
        raise RuntimeError("the folder could not be finished")
    return {"n_kills": len(kills), "rounds": rounds, "shards_at_kills": kills}


def digest(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    facts, folder = environment(), ROOT / "build" / "generate-scale"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = trained(folder)
    rows = []
    for n_processes, n_cells in ((1, asked.cells // 5), (2, asked.cells // 5), (2, asked.cells)):
        out = folder / f"{n_cells}-by-{n_processes}"
        told = Command(run, out, n_cells, n_processes).finish()
        rows.append({"processes": n_processes, "cells": n_cells, **told, "cells_per_second": n_cells / told["seconds"]})
        rows[-1]["cells_per_cpu_second"] = n_cells / told["cpu_seconds"]
        say(json.dumps(rows[-1]))
    small = [digest(folder / f"{asked.cells // 5}-by-{n}") for n in (1, 2)]
    whole = folder / f"{asked.cells}-by-2"
    with_kills = killed(run, folder / "killed", asked.cells, asked.kills, asked.seed)
    expected, got = digest(whole), digest(folder / "killed")
    names = [name for file in shard_files(folder / "killed") for name in ad.read_h5ad(file, backed="r").obs_names]
    with_kills |= {
        "same_bytes": expected == got,
        "same_bytes_of_1_and_2_processes": small[0] == small[1],
        "cells": len(names),
        "distinct_names": len(set(names)),
        "shards": len(read_manifest(folder / "killed")["shards"]),
        "bytes_per_cell": sum(p.stat().st_size for p in shard_files(whole, check=False)) / asked.cells,
    }
    keys = ("processes", "cells", "cells_per_second", "cells_per_cpu_second", "peak_mib")
    table = markdown_table(
        ["processes", "cells", "cells/s", "cells per CPU second", "peak memory of a process, MiB"],
        [[row[key] for key in keys] for row in rows],
    )
    about = (
        f"{N_GENES} genes of PBMC 3k, a network of one block, 8 steps, tiles of {TILE}, shards of 2,048 cells; each "
        "process is the command `lingshu generate RUN --n N --out FOLDER --processes K`, start of Python included. "
        "Other work ran on the machine, so cells/s are a lower bound; CPU seconds are those of all processes. Kills "
        "are SIGKILL at random moments, of one process after the other."
    )
    text = (
        f"With kills: {asked.cells:,} cells in {with_kills['shards']} shards, {with_kills['n_kills']} kills in "
        f"{with_kills['rounds']} rounds of 1 or 2 commands of 1 or 2 processes. All files have the bytes of the "
        f"undisturbed folder: **{with_kills['same_bytes']}** (the smaller folders by 1 and by 2 processes: "
        f"{with_kills['same_bytes_of_1_and_2_processes']}); {with_kills['cells']:,} cells, "
        f"{with_kills['distinct_names']:,} distinct names. A cell takes {with_kills['bytes_per_cell']:,.0f} bytes."
    )
    write_result("generate-scale", about, facts, {"speed": rows, "kills": with_kills}, [table, text])
    shutil.rmtree(folder)
    if not (with_kills["same_bytes"] and with_kills["distinct_names"] == asked.cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
