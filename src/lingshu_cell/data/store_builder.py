"""The second half of preparing a store: scatter cells to buckets, make each a shard, sum up, write the manifest."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.checksums import sha256
from lingshu_cell.data.gene_doctor import JoinedGenes
from lingshu_cell.data.labels import constant_label, joined_labels, label_names
from lingshu_cell.data.scan import Scan
from lingshu_cell.data.sources import CountSource
from lingshu_cell.data.store import DATA_SET, SPECIES
from lingshu_cell.data.store_files import shard_file
from lingshu_cell.data.store_writer import Buckets, unfinished_damaged, write_array, write_manifest, write_shard
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import read_checked_json, write_checked_json
from lingshu_cell.tokens import N_EXPRESSION_TOKENS

RARE_UP_TO_CELLS = 64
"""Counts of genes detected in at most so many cells are also listed one by one, as training draws them."""

_FLUSH_BYTES = 1 << 27  # cells wait in memory up to this size
_PIECE = 1 << 20  # values tokenized at a time
_BYTES_PER_VALUE = 8  # in a bucket; a shard has 6
_BYTES_PER_CELL = 200


@dataclass(frozen=True, eq=False)
class StoreBuilder:
    """Builds the shards of a store; every step may be killed, and goes on where it stopped.

    Attributes
    ----------
    out, work
        Folder of the store and of what is unfinished.
    names
        Names of the data sets.
    opened
        Their files.
    joined
        The joint genes.
    scans
        What the first pass found.
    cells_per_shard, seed
        Size of shards and seed of the shuffle.
    obs_keys
        Labels to keep, None for all.
    """

    out: Path
    work: Path
    names: Sequence[str]
    opened: Sequence[CountSource]
    joined: JoinedGenes
    scans: Sequence[Scan]
    cells_per_shard: int
    seed: int
    obs_keys: Sequence[str] | None

    @property
    def n_cells(self) -> int:
        """Kept cells of all data sets."""
        return sum(int(s.keep.sum()) for s in self.scans)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_cells // self.cells_per_shard)

    def build(self, content: Mapping[str, Any], on_stage: Callable[[str], None]) -> dict[str, Any]:
        """Write everything.

        Parameters
        ----------
        content
            What the manifest shall say beside.
        on_stage
            Called with the name of each stage when it is done.

        Returns
        -------
        dict
            The manifest.
        """
        position = np.random.Generator(np.random.Philox(self.seed)).permutation(self.n_cells)
        buckets, journal = self._scatter(position)
        on_stage("scatter")
        notes: list[str] = []
        labels, arrays = self._labels(position, notes)
        totals = _Totals(joint_sum([s.detected for s in self.scans], self.joined))
        for number in range(self.n_shards):
            cells = np.arange(number * self.cells_per_shard, min((number + 1) * self.cells_per_shard, self.n_cells))
            if number < len(journal["shards"]):
                counts = self._shard_made(number, journal["shards"][number])
            else:
                counts = self._shard(number, cells, buckets, labels, arrays)
                journal["shards"].append(sha256(self.out / shard_file(number)))
                write_checked_json(self.work / "journal.json", journal)
            buckets.remove(number)
            totals.add(counts, int(cells[0]))
        on_stage("shards")
        manifest = self._finish({**content, "notes": notes}, labels, totals)
        on_stage("manifest")
        return manifest

    def _shard(
        self,
        number: int,
        cells: np.ndarray,
        buckets: Buckets,
        labels: Sequence[Mapping[str, Any]],
        arrays: Mapping[str, np.ndarray],
    ) -> sparse.csr_matrix:
        counts, names = buckets.read(number)
        if counts.shape[0] != len(cells):
            raise unfinished_damaged(self.work, f"bucket {number} holds {counts.shape[0]} of {len(cells)} cells")
        ids = self.joined.vocabulary.ensembl_ids
        genes = pd.Index(list(self.joined.vocabulary.names))
        var = pd.DataFrame({} if ids is None else {"gene_ids": list(ids)}, index=genes)
        uns = {"lingshu_cell": {"shard": number, "n_shards": self.n_shards, "data_sets": np.array(self.names)}}
        obs = _obs(labels, arrays, cells, names)
        write_shard(self.out / shard_file(number), counts, obs, var, {"measured": self.joined.measured.T}, uns)
        return counts

    def _shard_made(self, number: int, expected: str) -> sparse.csr_matrix:
        """Read a shard that an earlier call made, if it is still what that call wrote."""
        file = self.out / shard_file(number)
        if not file.is_file() or sha256(file) != expected:
            raise unfinished_damaged(self.work, f"{shard_file(number)} does not match its checksum")
        return _read_shard(file)

    def _scatter(self, position: np.ndarray) -> tuple[Buckets, dict[str, Any]]:
        """Send each kept cell to the bucket of its place; the journal says how far that was done."""
        file = self.work / "journal.json"
        journal: dict[str, Any] = {"source": 0, "cell": 0, "lengths": None, "shards": []}
        if file.exists():
            try:
                journal = read_checked_json(file)
            except ValueError as error:
                raise unfinished_damaged(self.work, f"{file.name}: {error}") from None
        else:
            self._check_space()
        n_genes, n_sources = len(self.joined.vocabulary), len(self.opened)
        buckets = Buckets(self.work / "buckets", self.n_shards, n_genes, journal["lengths"])
        for i in range(journal["source"], n_sources):
            source, keep = self.opened[i], self.scans[i].keep
            first = journal["cell"] if i == journal["source"] else 0
            done = sum(int(s.keep.sum()) for s in self.scans[:i]) + int(keep[:first].sum())
            for start, counts in source.chunks(first) if first < source.n_cells else ():
                stop = start + counts.shape[0]
                rows = np.flatnonzero(keep[start:stop])
                moved = _to_joint(counts[rows], self.joined.columns[i], n_genes)
                names = source.obs_names[start:stop].to_numpy(dtype=object)[rows]
                if n_sources > 1:
                    names = np.array([f"{self.names[i]}:{name}" for name in names], dtype=object)
                place = position[done : done + len(rows)]
                buckets.add(place // self.cells_per_shard, place % self.cells_per_shard, moved, names)
                done += len(rows)
                if buckets.waiting_bytes > _FLUSH_BYTES:
                    buckets.flush()
                    journal.update(source=i, cell=stop, lengths=buckets.lengths)
                    write_checked_json(file, journal)
        if journal["source"] < n_sources:
            buckets.flush()
            journal.update(source=n_sources, cell=0, lengths=buckets.lengths)
            write_checked_json(file, journal)
        return buckets, journal

    def _check_space(self) -> None:
        needed = sum(s.n_values for s in self.scans) * _BYTES_PER_VALUE + _BYTES_PER_CELL * self.n_cells
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise LingshuError(
                "The disk must have space for the store",
                f"about {needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free at {self.out}",
                "Free some space and give the same command again: it goes on where it stopped",
            )

    def _labels(self, position: np.ndarray, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Write the labels of all cells in the order of the store, one file each; give them as memory maps."""
        keep = [s.keep for s in self.scans]
        tables = [source.obs for source in self.opened]
        sizes = [int(mask.sum()) for mask in keep]
        species = [report.species for report in self.joined.reports]
        wanted = label_names(tables, self.obs_keys)
        own = (constant_label(DATA_SET, self.names, sizes), constant_label(SPECIES, species, sizes))
        described, arrays = [], {}
        for i, label in enumerate([*own, *joined_labels(tables, keep, wanted, notes)]):
            placed = np.empty_like(label.values)
            placed[position] = label.values
            file = f"arrays/obs_{i:03d}.npy"
            write_array(self.out / file, placed)
            arrays[label.name] = np.load(self.out / file, mmap_mode="r")
            kind = "number" if label.categories is None else "category"
            described.append({"name": label.name, "kind": kind, "dtype": str(placed.dtype), "file": file})
            if label.categories is not None:
                described[-1]["categories"] = list(label.categories)
        return described, arrays

    def _finish(
        self, content: Mapping[str, Any], labels: Sequence[Mapping[str, Any]], totals: "_Totals"
    ) -> dict[str, Any]:
        joined, arrays = self.joined, {"measured": self.joined.measured, **totals.arrays()}
        for name, array in arrays.items():
            write_array(self.out / f"arrays/{name}.npy", array)
        data_sets = [
            {
                "name": name, "species": report.species, "n_cells": int(s.keep.sum()), "n_counts": s.n_counts,
                "n_measured_genes": int(measured.sum()), "notes": list(s.notes),
            }
            for name, report, s, measured in zip(self.names, joined.reports, self.scans, joined.measured, strict=True)
        ]  # fmt: skip
        facts = {
            "n_cells": self.n_cells, "n_shards": self.n_shards, "cells_per_shard": self.cells_per_shard,
            "n_values": totals.n_values, "rare_up_to_cells": RARE_UP_TO_CELLS,
            "genes": joined.vocabulary.to_json(), "data_sets": data_sets, "obs": list(labels),
            "quality": {name: s.quality for name, s in zip(self.names, self.scans, strict=True)},
            "gene_reports": [report.to_json() for report in joined.reports],
        }  # fmt: skip
        files = [shard_file(i) for i in range(self.n_shards)]
        files += [label["file"] for label in labels] + [f"arrays/{name}.npy" for name in arrays]
        return write_manifest(self.out, {**facts, **content}, files)


class _Totals:
    """Sums over all cells that training would otherwise need a pass for."""

    def __init__(self, detected: np.ndarray) -> None:
        self._n_genes = len(detected)
        self._is_rare = detected <= RARE_UP_TO_CELLS
        self._detected = np.zeros(self._n_genes, dtype=np.int64)
        self._tokens = np.zeros(self._n_genes * N_EXPRESSION_TOKENS, dtype=np.int64)
        self._rare: list[np.ndarray] = []
        self.n_values = 0

    def add(self, counts: sparse.csr_matrix, first_cell: int) -> None:
        """Add the cells of a shard."""
        self.n_values += counts.nnz
        self._detected += np.bincount(counts.indices, minlength=self._n_genes)
        for i in range(0, counts.nnz, _PIECE):
            flat = counts.indices[i : i + _PIECE] * np.int64(N_EXPRESSION_TOKENS)
            flat += encode(counts.data[i : i + _PIECE])
            np.add.at(self._tokens, flat, 1)
        here = np.flatnonzero(self._is_rare[counts.indices])
        cell = np.searchsorted(counts.indptr, here, side="right") - 1 + first_cell
        self._rare.append(np.stack([cell, counts.indices[here], counts.data[here]], axis=1).astype(np.int64))

    def arrays(self) -> dict[str, np.ndarray]:
        """Give the sums under the names of their files."""
        used = np.flatnonzero(self._tokens)
        entries = [used // N_EXPRESSION_TOKENS, used % N_EXPRESSION_TOKENS, self._tokens[used]]
        return {
            "detected_in": self._detected,
            "token_counts": np.stack(entries, axis=1),
            "rare_counts": np.concatenate(self._rare),
        }


def joint_sum(per_set: Sequence[np.ndarray], joined: JoinedGenes) -> np.ndarray:
    """Add up numbers per gene of the files on the joint list."""
    total = np.zeros(len(joined.vocabulary) + 1, dtype=np.int64)
    for values, places in zip(per_set, joined.columns, strict=True):
        np.add.at(total, places, values)  # −1 takes the last place
    return total[:-1]


def _to_joint(counts: sparse.csr_matrix, places: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Bring counts onto the joint gene list."""
    columns = places[counts.indices]
    values, indptr = counts.data, counts.indptr
    if (places < 0).any():
        on_list = columns >= 0
        indptr = np.append(0, np.cumsum(on_list))[indptr]
        values, columns = values[on_list], columns[on_list]
    moved = sparse.csr_matrix((values, columns.astype(np.int32), indptr), (counts.shape[0], n_genes))
    moved.sort_indices()
    return moved


def _obs(
    labels: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], cells: np.ndarray, names: np.ndarray
) -> pd.DataFrame:
    columns = {}
    for label in labels:
        values = np.array(arrays[label["name"]][cells])
        is_label = label["kind"] == "category"
        columns[label["name"]] = pd.Categorical.from_codes(values, label["categories"]) if is_label else values
    return pd.DataFrame(columns, index=pd.Index(names))


def _read_shard(file: Path) -> sparse.csr_matrix:
    import h5py

    with h5py.File(file, "r") as shard:
        group = shard["X"]
        arrays = group["data"][:], group["indices"][:], group["indptr"][:]
        return sparse.csr_matrix(arrays, shape=tuple(int(n) for n in group.attrs["shape"]))
