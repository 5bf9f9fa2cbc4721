"""Loading: cells per CPU-second and peak memory of a store against other ways to hold the same cells.

30,000 cells × 18,000 genes drawn with replacement from real cells (their most detected genes), one epoch in minibatches
of 64. CPU-seconds of the process, in a fresh process each; the files are in the page cache.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from recording import ROOT, environment, markdown_table, run_in_child, say, write_result
from scipy import sparse

from lingshu_cell.data.loader import StoreLoader, balanced_groups
from lingshu_cell.data.store import open_store
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.prepare import prepare

MINIBATCH = 64
WINDOW, BLOCK = 4096, 64


def make_cells(source: str, n_cells: int, n_genes: int, file: Path) -> None:
    """Draw cells with replacement and write them as an uncompressed h5ad file and as raw arrays."""
    adata = ad.read_h5ad(source)
    detected = np.bincount(adata.X.indices, minlength=adata.n_vars)
    genes = np.sort(np.argsort(-detected, kind="stable")[:n_genes])
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(adata.X[rng.integers(0, adata.n_obs, n_cells)][:, genes].astype(np.uint16))
    counts.sort_indices()
    drawn = ad.AnnData(counts)
    drawn.var_names = adata.var_names[genes]
    drawn.obs["group"] = rng.choice(list("ABCDE"), n_cells, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    drawn.write_h5ad(file)
    for name in ("data", "indices", "indptr"):
        np.save(file.with_name(f"{name}.npy"), getattr(counts, name))


def timed(minibatches: Iterator[Any], n_cells: int) -> dict[str, float]:
    """Take minibatches until so many cells came."""
    cpu, wall, n = time.process_time(), time.perf_counter(), 0
    for minibatch in minibatches:
        n += minibatch.shape[0]
        if n >= n_cells:
            break
    return {
        "cells_per_cpu_second": n / (time.process_time() - cpu),
        "cells_per_second": n / (time.perf_counter() - wall),
    }


def from_store(folder: str, second_epoch: bool, dense: bool, how: str) -> dict[str, Any]:
    """Minibatches of a store: sparse int16 tokens, or dense ones with [MASK]."""
    store = open_store(Path(folder) / "store")
    options: dict[str, Any] = {
        "all": {},
        "genes": {"genes": store.modelled_genes(store.n_cells // 500)},
        "balanced": {"groups": balanced_groups(store, ["group"])},
        "rank 0 of 4": {"world_size": 4},
    }[how]
    loader = StoreLoader(store, MINIBATCH, 0, window_cells=WINDOW, block_cells=BLOCK, **options)
    measured = store.measured if "genes" not in options else store.measured[:, options["genes"]]
    stream = (m.dense(measured) if dense else m.tokens for m in loader)
    first = timed(stream, store.n_cells)
    return timed(stream, store.n_cells) if second_epoch else first


def _windows(n: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        blocks = rng.permutation(-(-n // BLOCK))
        for i in range(0, len(blocks), WINDOW // BLOCK):
            rows = (np.sort(blocks[i : i + WINDOW // BLOCK])[:, None] * BLOCK + np.arange(BLOCK)).ravel()
            yield rows[rows < n]


def _tokens(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix((encode(rows.data), rows.indices, rows.indptr), rows.shape)


def _cut(window: sparse.csr_matrix, rng: np.random.Generator) -> Iterator[sparse.csr_matrix]:
    window = _tokens(window)[rng.permutation(window.shape[0])]
    for i in range(0, window.shape[0], MINIBATCH):
        yield window[i : i + MINIBATCH]


def from_memory(folder: str) -> dict[str, Any]:
    """True random rows of a CSR matrix in memory."""
    counts = ad.read_h5ad(Path(folder) / "cells.h5ad").X
    rng = np.random.default_rng(0)
    order = rng.permutation(counts.shape[0])
    return timed((_tokens(counts[order[i : i + MINIBATCH]]) for i in range(0, len(order), MINIBATCH)), len(order))


def _raw(folder: str, n_genes: int) -> sparse.csr_matrix:
    arrays = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("data", "indices", "indptr")]
    return sparse.csr_matrix(tuple(arrays), shape=(len(arrays[2]) - 1, n_genes), copy=False)


def from_memmap(folder: str, n_genes: int, random: bool) -> dict[str, Any]:
    """Raw npy memory maps: true random rows, or the windows of the loader."""
    counts, rng = _raw(folder, n_genes), np.random.default_rng(0)
    n = counts.shape[0]
    if random:
        order = rng.permutation(n)
        return timed((_tokens(counts[order[i : i + MINIBATCH]]) for i in range(0, n, MINIBATCH)), n)
    return timed((part for rows in _windows(n) for part in _cut(counts[rows], rng)), n)


def from_h5py(folder: str, n_genes: int) -> dict[str, Any]:
    """The same uncompressed h5ad, its blocks read through h5py."""
    rng = np.random.default_rng(0)
    with h5py.File(Path(folder) / "cells.h5ad", "r") as file:
        data, indices, indptr = (file["X"][name] for name in ("data", "indices", "indptr"))
        pointers = indptr[:]
        n = len(pointers) - 1

        def blocks(rows: np.ndarray) -> sparse.csr_matrix:
            parts = []
            for first in rows[::BLOCK]:
                stop = min(first + BLOCK, n)
                a, b = pointers[first], pointers[stop]
                part = (data[a:b], indices[a:b], pointers[first : stop + 1] - a)
                parts.append(sparse.csr_matrix(part, shape=(stop - first, n_genes)))
            return sparse.vstack(parts, format="csr")

        return timed((part for rows in _windows(n) for part in _cut(blocks(rows), rng)), n)


def prepared(folder: str) -> dict[str, Any]:
    """Build the store."""
    cpu = time.process_time()
    result = prepare([Path(folder) / "cells.h5ad"], Path(folder) / "store")
    spent = time.process_time() - cpu
    n_bytes = sum(facts["bytes"] for facts in result.manifest["files"].values())
    return {"cells_per_cpu_second": result.manifest["n_cells"] / spent, "bytes": n_bytes}


def main() -> None:
    """Make the cells, measure every way, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=str(ROOT.parent / "shared" / "data" / "pbmc8k.h5ad"))
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--genes", type=int, default=18_000)
    arguments = parser.parse_args()
    if not Path(arguments.source).is_file():
        sys.exit(f"--source: there is no {arguments.source}")
    facts, folder = environment(), ROOT / "build" / "loader"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_cells(arguments.source, arguments.cells, arguments.genes, folder / "cells.h5ad")
    where, n_genes = str(folder), arguments.genes
    ways: list[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
        ("prepare: building the store", prepared, (where,)),
        ("store, sparse, first epoch (checksums included)", from_store, (where, False, False, "all")),
        ("store, sparse, later epochs", from_store, (where, True, False, "all")),
        ("store, dense int16", from_store, (where, True, True, "all")),
        ("store, sparse, modelled genes only", from_store, (where, True, False, "genes")),
        ("store, sparse, balanced over 5 groups", from_store, (where, True, False, "balanced")),
        ("store, sparse, process 0 of 4", from_store, (where, True, False, "rank 0 of 4")),
        ("in-memory CSR, true random, sparse", from_memory, (where,)),
        ("raw npy memory maps, true random, sparse", from_memmap, (where, n_genes, True)),
        ("raw npy memory maps, windows, sparse", from_memmap, (where, n_genes, False)),
        ("uncompressed h5ad through h5py, windows, sparse", from_h5py, (where, n_genes)),
    ]
    rows, results = [], {}
    for name, function, values in ways:
        say(name)
        results[name] = found = run_in_child(function, *values)
        wall = found.get("cells_per_second")
        rows.append(
            [name, round(found["cells_per_cpu_second"]), wall and round(wall), round(found["peak_memory_gib"] * 1024)]
        )
    header = ["way", "cells per CPU-second", "cells per second", "peak memory, MiB"]
    write_result(
        "loader", " ".join((__doc__ or "").split()), facts, {"results": results}, [markdown_table(header, rows)]
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
