"""Many cells into a folder of shards: speed and memory of 1 and 2 processes, and 200,000 cells with kills in the run.

A tiny model (PBMC 3k, 100 genes, trained for seconds): what is measured is the machinery, not a network. Processes are
forked off a server that has imported everything, and then do what ``lingshu generate`` does. The killed folder is
compared byte by byte with an undisturbed one.
"""

import argparse
import hashlib
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from recording import ROOT, environment, markdown_table, peak_memory_gib, say, write_result

from lingshu_cell.config import load_config
from lingshu_cell.data.anndata_io import read_obs
from lingshu_cell.data.cell_folder import read_manifest, shard_files
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.generate import load_model
from lingshu_cell.generate_shards import generate_folder
from lingshu_cell.train import train
from lingshu_cell.wanted_cells import WantedRow

N_GENES, TILE = 100, 1024


def trained(folder: Path) -> Path:
    """A tiny run."""
    adata = ad.read_h5ad(pbmc3k_path())
    most = np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")[:N_GENES]
    config = load_config(
        overrides={
            "data": {"condition_keys": ["cell_type"]},
            "network": {"gene_width": 8, "width": 32, "n_blocks": 1, "feedforward_width": 64},
            "training": {"steps": 200, "device": "cpu"},
            "generation": {"steps": 4, "tile_size": TILE, "minibatch_size": TILE},
        }
    )
    train([adata[:, np.sort(most)].copy()], folder / "run", config)
    return folder / "run"


def member(run: Path, out: Path, n_cells: int, told: Any) -> None:
    """Be one of the processes that fill a folder."""
    model = load_model(run)
    told.send("ready")
    before = time.process_time()
    made = generate_folder(model, [WantedRow({}, n_cells, 0)], out).n_made
    told.send({"made": made, "cpu_seconds": time.process_time() - before, "peak_mib": 1024 * peak_memory_gib()})


class Crew:
    """Processes that fill a folder, ready to begin."""

    def __init__(self, run: Path, out: Path, n_cells: int, n_processes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lingshu_cell.generate_shards", "scipy.stats", "sklearn.linear_model"])
        self.members, self.ends = [], []
        for _ in range(n_processes):
            end, sender = context.Pipe(duplex=False)
            self.members.append(context.Process(target=member, args=(run, out, n_cells, sender)))
            self.members[-1].start()
            sender.close()
            self.ends.append(end)
        for end in self.ends:
            end.recv()

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the end; give what each did."""
        told = [end.recv() for end in self.ends]
        for one in self.members:
            one.join()
        return told


def speed(run: Path, out: Path, n_cells: int, n_processes: int) -> dict[str, Any]:
    """Fill a folder undisturbed."""
    crew = Crew(run, out, n_cells, n_processes)
    started = time.perf_counter()
    told = crew.finish()
    seconds, cpu = time.perf_counter() - started, sum(one["cpu_seconds"] for one in told)
    return {
        "processes": n_processes,
        "cells": n_cells,
        "cells_per_second": n_cells / seconds,
        "cells_per_cpu_second": n_cells / cpu,
        "peak_mib": max(one["peak_mib"] for one in told),
    }


def killed(run: Path, out: Path, n_cells: int, n_kills: int, seed: int) -> dict[str, Any]:
    """Fill a folder with kills at random moments, by random numbers of processes."""
    choose, kills, rounds = random.Random(seed), [], 0
    while len(kills) < n_kills and not (out / "manifest.json").exists():
        rounds += 1
        crew = Crew(run, out, n_cells, choose.choice([1, 2, 3]))
        begin = len(list(out.glob("shards/*.json"))) + choose.choice([0, 1, 2, 3])
        while len(list(out.glob("shards/*.json"))) < begin and not (out / "manifest.json").exists():
            time.sleep(0.01)
        for one in choose.sample(crew.members, len(crew.members)):  # one after the other, while the rest goes on
            time.sleep(choose.random())
            if one.is_alive():
                one.kill()
                kills.append(len(list(out.glob("shards/*.json"))))
            one.join()
        say(f"round {rounds}: {len(kills)} kills, {kills[-1:]} shards")
    Crew(run, out, n_cells, 2).finish()
    return {"n_kills": len(kills), "rounds": rounds, "shards_at_kills": kills}


def digest(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    facts, folder = environment(), ROOT / "build" / "generate-scale"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, part = trained(folder), asked.cells // 5
    rows = [
        speed(run, folder / f"{n_cells}-by-{n_processes}", n_cells, n_processes)
        for n_processes, n_cells in ((1, part), (2, part), (1, asked.cells))
    ]
    small, whole = [digest(folder / f"{part}-by-{n}") for n in (1, 2)], folder / f"{asked.cells}-by-1"
    kills = killed(run, folder / "killed", asked.cells, asked.kills, asked.seed)
    names = [name for file in shard_files(folder / "killed") for name in read_obs(file).index]
    kills |= {
        "same_bytes": digest(whole) == digest(folder / "killed"),
        "same_bytes_of_1_and_2_processes": small[0] == small[1],
        "cells": len(names),
        "distinct_names": len(set(names)),
        "shards": len(read_manifest(folder / "killed")["shards"]),
        "bytes_per_cell": sum(p.stat().st_size for p in shard_files(whole, check=False)) / asked.cells,
    }
    table = markdown_table(
        ["processes", "cells", "cells/s", "cells per CPU second", "peak memory of a process, MiB"],
        [list(row.values()) for row in rows],
    )
    about = (
        f"{N_GENES} genes of PBMC 3k, a network of one block, 4 steps, tiles of {TILE}, shards of 2,048 cells. Other "
        "work ran on the machine, at times more of it than there are cores, so cells/s say little; CPU seconds are "
        "those of all processes, the start of Python left out. Kills are SIGKILL at random moments, one by one."
    )
    text = (
        f"With kills: {asked.cells:,} cells in {kills['shards']} shards, {kills['n_kills']} kills in {kills['rounds']} "
        f"rounds of 1 to 3 processes. All files have the bytes of the undisturbed folder: **{kills['same_bytes']}** "
        f"(the smaller folders by 1 and by 2 processes: {kills['same_bytes_of_1_and_2_processes']}); "
        f"{kills['cells']:,} cells, {kills['distinct_names']:,} distinct names. A cell takes "
        f"{kills['bytes_per_cell']:,.0f} bytes."
    )
    write_result("generate-scale", about, facts, {"speed": rows, "kills": kills}, [table, text])
    shutil.rmtree(folder)
    if not (kills["same_bytes"] and kills["distinct_names"] == asked.cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
