"""The first pass over a file of counts: which cells are kept, and how often genes are detected in them."""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from lingshu_cell.data.quality import SCRUBLET_CELLS, QualityRules, counts_reads, doublets, failing, share_of_ones
from lingshu_cell.data.sources import CountSource
from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import write_atomically

_CELL_RULES = ("min_genes", "min_counts", "max_mito", "scrublet")
_SNAPSHOT_SECONDS = 30.0
_MANY_DOUBLETS = 0.2
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Scan:
    """What the first pass found out about a data set.

    Attributes
    ----------
    keep
        Which cells are kept, boolean.
    detected
        In how many kept cells each gene of the file is detected, int64.
    n_values, n_counts
        Stored values and sum of counts of the kept cells.
    quality
        ``cells``, cells breaking each rule in force (a cell may break several), ``dropped``, ``kept``.
    notes
        What a user should know.
    """

    keep: np.ndarray
    detected: np.ndarray
    n_values: int
    n_counts: int
    quality: dict[str, int]
    notes: tuple[str, ...]


def scan(
    source: CountSource,
    mitochondrial: np.ndarray,
    rules: QualityRules,
    seed: int,
    snapshot: Path,
    on_cells: Callable[[int], None] = lambda n: None,
) -> Scan:
    """Go through all counts once; what was seen is saved now and then, and a later call goes on from there.

    Parameters
    ----------
    source
        The opened file.
    mitochondrial
        Which of its genes are mitochondrial, boolean.
    rules
        Which cells to drop.
    seed
        Random state of Scrublet.
    snapshot
        File of what was seen so far, sha256 and ``.npz``; kept at the end, so that the next call needs no pass.
    on_cells
        Called with the number of cells seen.

    Raises
    ------
    LingshuError
        If the file is damaged, holds values that are no counts, or no cell is kept.
    """
    seen = _load(snapshot) or _nothing(source)
    assay, _ = _assays(source)
    saved = time.monotonic()
    left = _blocks(source, int(seen["next_cell"]), rules.scrublet) if seen["next_cell"] < source.n_cells else ()
    for start, counts in left:
        _take(seen, start, counts, assay[start : start + counts.shape[0]], mitochondrial, rules, seed)
        on_cells(int(seen["next_cell"]))
        if time.monotonic() - saved > _SNAPSHOT_SECONDS:
            _save(snapshot, seen)
            saved = time.monotonic()
    _save(snapshot, seen)
    return _judge(source, seen, mitochondrial, rules)


def _assays(source: CountSource) -> tuple[np.ndarray, list[str | None]]:
    """Give each cell's assay as an index, and the names."""
    if "assay" not in source.obs.columns:
        return np.zeros(source.n_cells, dtype=np.int64), [None]
    column = source.obs["assay"].astype(object).map(str, na_action="ignore").fillna("unknown").to_numpy()
    names, index = np.unique(column.astype(str), return_inverse=True)
    return index.ravel(), [str(name) for name in names]


def _nothing(source: CountSource) -> dict[str, np.ndarray]:
    n_assays = len(_assays(source)[1])
    return {
        "next_cell": np.array(0),
        "keep": np.zeros(source.n_cells, dtype=bool),
        "broken": np.zeros(len(_CELL_RULES), dtype=np.int64),
        "unscored": np.array(0),
        "detected": np.zeros((n_assays, source.n_genes), dtype=np.int64),
        "ones": np.zeros((n_assays, source.n_genes), dtype=np.int64),
        "n_kept": np.zeros(n_assays, dtype=np.int64),
        "n_counts": np.zeros(n_assays, dtype=np.int64),
    }


def _load(file: Path) -> dict[str, np.ndarray] | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, saved = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(saved).digest() != digest:
        return None  # damaged: the pass is made again
    with np.load(io.BytesIO(saved), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _save(file: Path, seen: dict[str, np.ndarray]) -> None:
    stream = io.BytesIO()
    np.savez(stream, **seen)
    saved = stream.getvalue()
    write_atomically(file, lambda draft: draft.write_bytes(hashlib.sha256(saved).digest() + saved))


def _blocks(source: CountSource, start: int, for_scrublet: bool) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Give chunks as they come, or joined to equal blocks of consecutive cells that Scrublet scores together."""
    if not for_scrublet:
        yield from source.chunks(start)
        return
    n_blocks = -(-source.n_cells // SCRUBLET_CELLS)
    bounds = iter([b for i in range(1, n_blocks + 1) if (b := i * source.n_cells // n_blocks) > start])
    bound, held, first = next(bounds, None), [], start
    for at, counts in source.chunks(start):
        while bound is not None and at + counts.shape[0] >= bound:
            held.append(counts[: bound - at])
            yield first, sparse.vstack(held, format="csr")
            counts, at, first, held = counts[bound - at :], bound, bound, []
            bound = next(bounds, None)
        if counts.shape[0]:
            held.append(counts)


def _take(
    seen: dict[str, Any],
    start: int,
    counts: sparse.csr_matrix,
    assay: np.ndarray,
    mitochondrial: np.ndarray,
    rules: QualityRules,
    seed: int,
) -> None:
    """Add a block of cells to what was seen."""
    n_cells, n_genes = counts.shape
    broken = failing(counts, mitochondrial, rules)
    keep = ~np.logical_or.reduce(list(broken.values())) if broken else np.ones(n_cells, dtype=bool)
    if rules.scrublet and keep.any():
        scored = np.flatnonzero(keep)
        called = doublets(counts[scored], seed)
        if called is None:
            seen["unscored"] += len(scored)
        else:
            broken["scrublet"] = np.zeros(n_cells, dtype=bool)
            broken["scrublet"][scored] = called
            keep &= ~broken["scrublet"]
    seen["broken"] += [int(broken[rule].sum()) if rule in broken else 0 for rule in _CELL_RULES]
    seen["keep"][start : start + n_cells] = keep
    for group in np.unique(assay[keep]):
        of_group = counts if keep.all() and (assay == group).all() else counts[np.flatnonzero(keep & (assay == group))]
        seen["detected"][group] += np.bincount(of_group.indices, minlength=n_genes)
        seen["ones"][group] += np.bincount(of_group.indices[of_group.data == 1], minlength=n_genes)
        seen["n_kept"][group] += of_group.shape[0]
        seen["n_counts"][group] += int(of_group.data.sum(dtype=np.int64))
    seen["next_cell"][...] = start + n_cells


def _judge(source: CountSource, seen: dict[str, np.ndarray], mitochondrial: np.ndarray, rules: QualityRules) -> Scan:
    """Decide on whole assays and put the numbers together."""
    assay, names = _assays(source)
    keep, notes = seen["keep"].copy(), []
    stays = np.ones(len(names), dtype=bool)
    for group, name in enumerate(names):
        n_kept = int(seen["n_kept"][group])
        why = (
            counts_reads(name, share_of_ones(n_kept, seen["detected"][group], seen["ones"][group])) if n_kept else None
        )
        if why:
            of_whom = f"{n_kept:,} cells" + (f" of assay {name!r}" if name else "")
            stays[group] = not rules.drop_read_counts
            what = "are left out" if rules.drop_read_counts else "are kept; leave them out with --drop-read-counts"
            notes.append(f"{of_whom} seem to hold read counts, not UMI counts ({why}): they {what}")
    n_reads = int((keep & ~stays[assay]).sum())
    keep &= stays[assay]
    if not keep.any():
        raise LingshuError(
            "Some cells of every data set must pass the quality rules",
            f"none of {source.n_cells:,} of {source.path.name} does",
            "Check the data, loosen the rules, or leave the file out",
        )
    if rules.max_mito < 1 and not mitochondrial.any():
        notes.append("no gene is named as mitochondrial, so the rule on their share drops nothing")
    if seen["unscored"]:
        notes.append(f"{int(seen['unscored']):,} cells were too few or too sparse for Scrublet, and were kept")
    in_force = {"min_genes": rules.min_genes, "min_counts": rules.min_counts, "max_mito": rules.max_mito < 1}
    in_force["scrublet"] = rules.scrublet
    quality = {"cells": source.n_cells}
    quality |= {rule: int(n) for rule, n in zip(_CELL_RULES, seen["broken"], strict=True) if in_force[rule]}
    if rules.drop_read_counts:
        quality["read_counts"] = n_reads
    quality |= {"dropped": int((~keep).sum()), "kept": int(keep.sum())}
    share = quality.get("scrublet", 0) / source.n_cells
    if share > _MANY_DOUBLETS:
        notes.append(f"Scrublet calls {share:.0%} of the cells doublets: its automatic threshold may be wrong here")
    detected = seen["detected"][stays].sum(axis=0)
    return Scan(keep, detected, int(detected.sum()), int(seen["n_counts"][stays].sum()), quality, tuple(notes))
