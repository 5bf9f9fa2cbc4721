"""Writing a training store: buckets that shuffle cells in bounded memory, shards, arrays, and the manifest."""

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

from lingshu_cell.checksums import checksum, sha256
from lingshu_cell.data.hdf5_output import writing_hdf5
from lingshu_cell.data.store_files import FORMAT_VERSION, MANIFEST
from lingshu_cell.errors import LingshuError
from lingshu_cell.output_files import flush, write_atomically, write_json

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, eq=False)
class _Segment:
    """Cells that one flush appended to a bucket."""

    slot: np.ndarray
    names: np.ndarray
    per_row: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one clear error."""
    try:
        yield
    except OSError as error:
        text = str(error)
        full = error.errno in _NO_SPACE or any(os.strerror(code) in text for code in _NO_SPACE)
        rule = "The disk must have space for the store" if full else "The store must be writable"
        finding = f"{path}: {os.strerror(error.errno) if error.errno in _NO_SPACE else text[:200]}"
        remedy = "Free some space" if full else "Check the rights"
        raise LingshuError(
            rule, finding, f"{remedy} and give the same command again: it goes on where it stopped"
        ) from error


def unfinished_damaged(work: Path, finding: str) -> LingshuError:
    """Say that what an interrupted call left in ``work`` is not whole."""
    return LingshuError("An unfinished store must be whole", finding, f"Delete {work.parent} and begin anew")


def write_array(file: Path, array: np.ndarray) -> None:
    """Write one array as ``.npy``, atomically."""

    def save(draft: Path) -> None:
        with open(draft, "wb") as stream:
            np.lib.format.write_array(_Plain(stream), array, allow_pickle=False)

    write_atomically(file, save)


def write_shard(
    file: Path, counts: sparse.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame, varm: Mapping[str, Any], uns: Mapping
) -> None:
    """Write an AnnData whose counts lie in one piece, so that plain reads and memory maps reach them.

    Parameters
    ----------
    file
        Where to; written atomically.
    counts
        Canonical counts, cells × genes; stored as uint16 if they fit, else as int32.
    obs, var
        Labels of cells and genes; text columns are categorical.
    varm, uns
        As in AnnData.
    """
    fits = not counts.nnz or counts.data.max() < 2**16
    arrays = {
        "data": counts.data.astype(np.uint16 if fits else np.int32),
        "indices": counts.indices.astype(np.int32),
        "indptr": counts.indptr.astype(np.int32 if counts.nnz < 2**31 else np.int64),
    }

    def save(draft: Path) -> None:
        with writing_hdf5(draft, alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT) as shard:
            shard.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            group = shard.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            group.attrs["shape"] = np.array(counts.shape, dtype=np.int64)
            for name, array in arrays.items():
                group.create_dataset(name, data=array)
            write_elem(shard, "obs", obs)
            write_elem(shard, "var", var)
            write_elem(shard, "varm", dict(varm))
            write_elem(shard, "uns", dict(uns))
            for name in ("layers", "obsm", "obsp", "varp"):
                write_elem(shard, name, {})

    write_atomically(file, save)


class _Plain:
    """A stream that numpy does not take for a file: it would write past Python and not say why it could not."""

    def __init__(self, stream: BinaryIO) -> None:
        self.write = stream.write


def write_manifest(store: Path, content: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Write ``manifest.json`` last of all, with sizes and checksums of the files.

    Parameters
    ----------
    store
        The folder.
    content
        All but ``format_version``, ``files`` and ``checksum``.
    files
        Files of the store, relative to it.

    Returns
    -------
    dict
        The manifest.
    """
    facts = {name: {"bytes": (store / name).stat().st_size, "sha256": sha256(store / name)} for name in files}
    manifest = json.loads(json.dumps({"format_version": FORMAT_VERSION, **content, "files": facts}))
    manifest["checksum"] = checksum(manifest)
    write_json(store / MANIFEST, manifest)
    return manifest


class Buckets:
    """Cells on their way to their shards: appended bucket by bucket, read back one bucket at a time.

    Each flush appends a segment to every bucket that has cells waiting; :meth:`lengths` then says how long the files
    are, and truncating them to these lengths undoes whatever a killed process wrote later.

    Parameters
    ----------
    folder
        Where the files are; made if absent.
    n_buckets
        How many.
    n_genes
        Columns of the counts.
    lengths
        Bytes of each file that count, from a journal; None to begin anew.
    """

    def __init__(self, folder: Path, n_buckets: int, n_genes: int, lengths: Sequence[int] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._n_genes = folder, n_genes
        self._lengths = list(lengths) if lengths is not None else [0] * n_buckets
        self._waiting: list[tuple[np.ndarray, np.ndarray, sparse.csr_matrix, np.ndarray]] = []
        self.waiting_bytes = 0
        for b, length in enumerate(self._lengths):
            file = self._file(b)
            if not file.exists():
                continue  # never begun, or a shard already
            if file.stat().st_size < length:
                raise unfinished_damaged(folder.parent, f"bucket {b} is cut off")
            os.truncate(file, length)

    @property
    def lengths(self) -> list[int]:
        """Bytes of each file as of the last flush."""
        return list(self._lengths)

    def add(self, bucket: np.ndarray, slot: np.ndarray, counts: sparse.csr_matrix, names: np.ndarray) -> None:
        """Hand in cells.

        Parameters
        ----------
        bucket, slot
            Bucket of each cell and its place therein.
        counts
            int32 CSR, one row per cell.
        names
            Name of each cell.
        """
        self._waiting.append((bucket, slot, counts, names))
        self.waiting_bytes += counts.data.nbytes + counts.indices.nbytes + 100 * len(bucket)

    def flush(self) -> None:
        """Append all waiting cells to their files."""
        if not self._waiting:
            return
        bucket, slot, names = (np.concatenate([part[i] for part in self._waiting]) for i in (0, 1, 3))
        counts = sparse.vstack([part[2] for part in self._waiting], format="csr")
        self._waiting, self.waiting_bytes = [], 0
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(len(self._lengths) + 1))
        for b in np.flatnonzero(np.diff(bounds)):
            rows = order[bounds[b] : bounds[b + 1]]
            self._append(int(b), slot[rows], counts[rows], names[rows])
        flush(self._folder)

    def read(self, bucket: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Give the cells of a bucket in the order of their slots.

        Returns
        -------
        tuple
            Counts, and the cells' names, object array.
        """
        segments = list(self._segments(bucket))
        n_rows = sum(len(segment.slot) for segment in segments)
        per_row = np.zeros(n_rows, dtype=np.int64)
        names = np.empty(n_rows, dtype=object)
        for segment in segments:
            per_row[segment.slot] = segment.per_row
            names[segment.slot] = segment.names
        indptr = np.append(0, np.cumsum(per_row))
        columns, values = (np.empty(indptr[-1], dtype=np.int32) for _ in range(2))
        for segment in segments:
            first_of_row = np.cumsum(segment.per_row) - segment.per_row
            target = np.repeat(indptr[segment.slot] - first_of_row, segment.per_row) + np.arange(len(segment.values))
            columns[target] = segment.columns
            values[target] = segment.values
        indptr = indptr.astype(np.int32 if indptr[-1] < 2**31 else np.int64)
        return sparse.csr_matrix((values, columns, indptr), (n_rows, self._n_genes), copy=False), names

    def remove(self, bucket: int) -> None:
        """Delete the file of a bucket."""
        self._file(bucket).unlink(missing_ok=True)

    def _file(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:06d}"

    def _append(self, bucket: int, slot: np.ndarray, counts: sparse.csr_matrix, names: np.ndarray) -> None:
        texts = [str(name).encode() for name in names]
        head = np.array([len(slot), counts.nnz, sum(map(len, texts)), 0], dtype="<i8")
        body = [
            slot.astype("<i8"), np.array([len(t) for t in texts], "<i8"), np.diff(counts.indptr).astype("<i4"),
            counts.indices.astype("<i4"), counts.data.astype("<i4"), np.frombuffer(b"".join(texts), np.uint8),
        ]  # fmt: skip
        for array in body:
            head[3] = zlib.crc32(array.tobytes(), int(head[3]))
        with open(self._file(bucket), "ab") as stream:
            for array in (head, *body):
                stream.write(array.tobytes())
            stream.flush()
            os.fsync(stream.fileno())  # the journal that counts on it must not reach the disk before it
        self._lengths[bucket] += head.nbytes + sum(array.nbytes for array in body)

    def _segments(self, bucket: int) -> Iterator["_Segment"]:
        """Map the segments of a bucket into memory."""
        stored = np.memmap(self._file(bucket), dtype=np.uint8, mode="r")
        at = 0

        def part(dtype: str, n: int) -> np.ndarray:
            nonlocal at
            size = n * np.dtype(dtype).itemsize
            found = stored[at : at + size]
            at += size
            crcs.append(zlib.crc32(found, crcs[-1]))
            return found.view(dtype)

        while at < len(stored):
            crcs = [0]
            n_rows, n_values, n_text, expected = (int(n) for n in part("<i8", 4))
            crcs = [0]
            slot, lengths = part("<i8", n_rows), part("<i8", n_rows)
            per_row, columns, values = part("<i4", n_rows), part("<i4", n_values), part("<i4", n_values)
            text = part("u1", n_text).tobytes()
            if crcs[-1] != expected:
                raise unfinished_damaged(self._folder.parent, f"bucket {bucket} does not match its checksum")
            ends = np.cumsum(lengths)
            names = np.array([text[e - n : e].decode() for e, n in zip(ends, lengths, strict=True)], dtype=object)
            yield _Segment(slot, names, per_row, columns, values)
