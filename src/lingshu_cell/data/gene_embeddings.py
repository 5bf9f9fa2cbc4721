"""A vector per gene: read from a file, looked up by any of a gene's names, joined with others."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import (
    HARMLESS_BYTES,
    MOST_UNPACKED,
    expanded,
    open_binary,
    read_npz,
    refuse_special,
)
from lingshu_cell.output_files import write_atomically

NAME_KEYS = ("genes", "names", "gene_names", "symbols", "gene_symbols", "ids", "gene", "name", "symbol", "var_names")
MATRIX_KEYS = ("embeddings", "embedding", "emb", "matrix", "vectors", "X")
_TEXT_ENDS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_FORMATS = "npz, safetensors, parquet, csv, tsv, csv.gz or tsv.gz"


@dataclass(frozen=True, eq=False)
class GeneEmbeddings:
    """A vector for each of many genes (or drugs, or whatever perturbs).

    Parameters
    ----------
    names
        Symbols or ids, unique.
    matrix
        The vectors, float32, finite, shape [n_genes, n_dimensions].
    source
        Where they come from, for people.
    sha256
        Of names and vectors, whatever the file format.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    source: str
    sha256: str

    @property
    def n_dimensions(self) -> int:
        """Length of each vector."""
        return self.matrix.shape[1]

    @classmethod
    def of(cls, names: Sequence[str], matrix: np.ndarray, source: str) -> "GeneEmbeddings":
        """Check names and vectors, and take their sum of digits.

        Parameters
        ----------
        names
            One per row.
        matrix
            Numbers, shape [number of names, n_dimensions].
        source
            Where they come from.

        Returns
        -------
        GeneEmbeddings

        Raises
        ------
        LingshuError
            If numbers and names differ in length, names repeat with different vectors, or a number is not finite.
        """
        names, matrix = tuple(str(name) for name in names), np.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != len(names) or not matrix.size or matrix.dtype.kind not in "iuf":
            raise LingshuError(
                "Embeddings must be a matrix of numbers with one row per gene",
                f"{source} has {len(names)} names and an array of shape {matrix.shape}, dtype {matrix.dtype}",
                "Check the file",
            )
        matrix = np.ascontiguousarray(matrix, dtype=np.float32)
        broken = [names[row] for row in np.flatnonzero(~np.isfinite(matrix).all(axis=1))]
        if broken:
            raise LingshuError(
                "Embeddings must be finite",
                f"{source} holds NaN or infinite numbers for {offenders(broken)}",
                "Drop them",
            )
        names, matrix = _without_repeats(names, matrix, source)
        digest = hashlib.sha256(json.dumps([list(names), list(matrix.shape)]).encode())
        digest.update(matrix.astype("<f4").tobytes())
        return cls(names, matrix, source, digest.hexdigest())

    def rows(
        self, labels: Sequence[str], other_names: Mapping[str, Sequence[str]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look up vectors: by name, then by other names, then by the name with capitals ignored where that is unique.

        Parameters
        ----------
        labels
            Genes wanted.
        other_names
            Label → further names to try in order, e.g. its Ensembl id or current symbol (see :func:`other_names`).

        Returns
        -------
        tuple
            float32 [number of labels, n_dimensions], rows of 0 where nothing is found, and bool [number of labels].
        """
        position = {name: row for row, name in enumerate(self.names)}
        capitals: dict[str, int] = {}
        for row, name in enumerate(self.names):
            capitals[name.upper()] = -1 if name.upper() in capitals else row
        found = np.full(len(labels), -1, dtype=np.int64)
        for i, label in enumerate(labels):
            tried = [label, *(other_names or {}).get(label, ())]
            exact = [position[name] for name in tried if name in position]
            loose = [capitals[name.upper()] for name in tried if name.upper() in capitals]
            found[i] = (exact or loose or [-1])[0]
        matrix = np.where(found[:, None] >= 0, self.matrix[np.maximum(found, 0)], np.float32(0))
        return matrix, found >= 0

    def coverage(self, labels: Sequence[str], other_names: Mapping[str, Sequence[str]] | None = None) -> str:
        """Tell in a line how many of the labels have a vector, and which have none.

        Parameters
        ----------
        labels, other_names
            As in :meth:`rows`.

        Returns
        -------
        str
        """
        found = self.rows(labels, other_names)[1]
        missing = [label for label, there in zip(labels, found, strict=True) if not there]
        return f"{found.sum():,} of {len(labels):,} have an embedding" + (
            f", none: {offenders(missing)}" if missing else ""
        )


def other_names(
    labels: Sequence[str],
    ids_of: Mapping[str, str] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Collect under which other names each label may be found: its Ensembl id, the symbol of an id, aliases.

    Parameters
    ----------
    labels
        Names in use.
    ids_of
        Symbol → Ensembl id, e.g. from a :class:`~lingshu_cell.data.vocabulary.GeneVocabulary`; used both ways.
    aliases
        Former or other symbol → current symbols; used both ways.

    Returns
    -------
    dict
        Label → other names, for labels that have any.
    """
    links: dict[str, list[str]] = {}
    pairs = [(symbol, gene_id) for symbol, gene_id in (ids_of or {}).items() if gene_id]
    pairs += [(old, new) for old, current in (aliases or {}).items() for new in current]
    for one, other in pairs:
        links.setdefault(one, []).append(other)
        links.setdefault(other, []).append(one)
    found = {}
    for label in dict.fromkeys(labels):
        near = links.get(label, [])
        # Two steps: the data's former symbol leads to the current one, and that to its id.
        reached = dict.fromkeys([*near, *(far for name in near for far in links.get(name, ()))])
        reached.pop(label, None)
        if reached:
            found[label] = tuple(reached)
    return found


def read_embeddings(path: Path | str) -> GeneEmbeddings:
    """Read gene embeddings from a file; nothing in it is ever executed (no pickle).

    ``npz``: an array of names (``genes``, ``names``, ``symbols`` …) and one of vectors (``embeddings``, ``emb`` …).
    ``safetensors``: one vector per gene, or a tensor ``embeddings`` with the names as JSON list in the metadata or in
    ``<file>.json``. ``parquet``, ``csv``, ``tsv``: names in the index or first column, numbers in all others.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    GeneEmbeddings

    Raises
    ------
    LingshuError
        If the file is absent, damaged, of another format, or holds no such table.
    """
    path = expanded(path)
    refuse_special(path, "The file of embeddings must be readable")
    if not path.is_file():
        raise LingshuError("The file of embeddings must exist", f"there is no {path}", "Check the path")
    name = path.name.lower()
    try:
        if name.endswith(".npz"):
            names, matrix = _read_npz(path)
        elif name.endswith(".safetensors"):
            names, matrix = _read_safetensors(path)
        elif name.endswith((".parquet", ".pq")):
            names, matrix = _of_table(_read_parquet(path), path)
        elif name.endswith(_TEXT_ENDS):
            separator = "\t" if ".tsv" in name else ","
            # A gene may be called NA: names are taken as they stand.
            with open_binary(path) as stream:
                table = pd.read_csv(stream, sep=separator, keep_default_na=False, na_values={}, low_memory=False)
            names, matrix = _of_table(table, path)
        else:
            raise LingshuError(
                f"Embeddings are read from {_FORMATS}",
                f"{path.name} is none of these",
                "Convert it, e.g. numpy.savez(file, genes=names, embeddings=matrix); pickled files (.pt, .pkl) are "
                "never opened",
            )
    except (LingshuError, MemoryError):
        raise
    except Exception as error:  # five formats, each with kinds of its own
        raise LingshuError(
            "The file of embeddings must be whole", f"{path} cannot be read ({error})", "Write or download it again"
        ) from error
    return GeneEmbeddings.of(names, matrix, path.name)


def write_embeddings(embeddings: GeneEmbeddings, path: Path | str) -> None:
    """Write embeddings as ``.npz`` or ``.safetensors``; :func:`read_embeddings` reads them back bit for bit.

    Parameters
    ----------
    embeddings
        What to write.
    path
        File to write; an existing one is replaced.

    Raises
    ------
    LingshuError
        If the ending is another one or the folder does not exist.
    """
    path = expanded(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise LingshuError("Embeddings are written as .npz or .safetensors", f"{path.name} is neither", "Rename it")
    if not path.parent.is_dir():
        raise LingshuError("The folder of the output must exist", f"there is no {path.parent}", "Create it first")
    if path.is_symlink() and not path.exists():
        raise LingshuError("The output must be a file", f"{path} is a link that leads nowhere", "Remove it first")

    def save(draft: Path) -> None:
        if path.suffix == ".npz":
            with open(draft, "wb") as stream:
                np.savez_compressed(stream, genes=np.array(embeddings.names), embeddings=embeddings.matrix)
        else:
            about = {"genes": json.dumps(list(embeddings.names)), "source": embeddings.source}
            save_file({"embeddings": embeddings.matrix}, draft, metadata=about)

    try:
        write_atomically(path, save)
    except (OSError, SafetensorError) as error:
        raise LingshuError(
            "The output must be writable", f"{path}: {error}", "Check the rights and the space on the disk"
        ) from error


def concatenate(blocks: Sequence[GeneEmbeddings]) -> GeneEmbeddings:
    """Put embeddings side by side, each block with vectors of length 1, centred and scaled to a total variance of 1.

    Length 1 first: how well a gene is studied sets the length of its vector in networks and gene sets, and says little
    of what its perturbation does (measured in docs/log.md). Genes of any block are kept; where a block lacks a gene it
    has the block's mean, 0. Names must be written alike.

    Parameters
    ----------
    blocks
        One or more.

    Returns
    -------
    GeneEmbeddings
        Also for a single block: standardised.

    Raises
    ------
    LingshuError
        If there is no block, one does not vary, or two share no gene.
    """
    if not blocks:
        raise LingshuError("Embeddings to join are needed", "none was given", "Pass one or more")
    shared = set.intersection(*(set(block.names) for block in blocks))
    if not shared:
        examples = "; ".join(f"{block.source}: {', '.join(block.names[:3])}" for block in blocks)
        raise LingshuError("Embeddings to join must share genes", examples, "Use one name style in all files")
    names = tuple(dict.fromkeys(name for block in blocks for name in block.names))
    position = {name: row for row, name in enumerate(names)}
    matrix = np.zeros((len(names), sum(block.n_dimensions for block in blocks)), dtype=np.float32)
    start = 0
    for block in blocks:
        vectors = block.matrix.astype(np.float64)
        centred = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        centred -= centred.mean(axis=0)
        scale = np.sqrt((centred**2).mean(axis=0).sum())
        if scale < 1e-6:
            raise LingshuError("Embeddings must differ between genes", f"{block.source} is constant", "Leave it out")
        matrix[[position[name] for name in block.names], start : start + block.n_dimensions] = centred / scale
        start += block.n_dimensions
    return GeneEmbeddings.of(names, matrix, " + ".join(block.source for block in blocks))


def _without_repeats(names: tuple[str, ...], matrix: np.ndarray, source: str) -> tuple[tuple[str, ...], np.ndarray]:
    if len(set(names)) == len(names):
        return names, matrix
    first: dict[str, int] = {}
    clashes = [
        name for row, name in enumerate(names) if not np.array_equal(matrix[first.setdefault(name, row)], matrix[row])
    ]
    if clashes:
        raise LingshuError(
            "A gene has one embedding",
            f"{source} has different ones for {offenders(dict.fromkeys(clashes))}",
            "Keep one",
        )
    return tuple(first), matrix[list(first.values())]


def _read_npz(path: Path) -> tuple[Sequence[str], np.ndarray]:
    arrays = read_npz(path)
    texts = [key for key, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "US"]
    numbers = [key for key, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "iuf"]
    name_key, matrix_key = _preferred(texts, NAME_KEYS), _preferred(numbers, MATRIX_KEYS)
    if name_key is None or matrix_key is None:
        raise LingshuError(
            "An npz of embeddings needs an array of names and a matrix, e.g. genes and embeddings",
            f"{path.name} holds {offenders(arrays)}",
            "Write it with numpy.savez(file, genes=names, embeddings=matrix)",
        )
    names = arrays[name_key]
    return [one.decode("utf-8") if isinstance(one, bytes) else str(one) for one in names.tolist()], arrays[matrix_key]


def _preferred(there: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first wanted key that is there, or the only one there is."""
    return next((key for key in wanted if key in there), there[0] if len(there) == 1 else None)


def _read_safetensors(path: Path) -> tuple[Sequence[str], np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        keys, about = list(file.keys()), file.metadata() or {}
        matrix_key = _preferred([key for key in keys if len(file.get_slice(key).get_shape()) == 2], MATRIX_KEYS)
        if matrix_key is None:
            return keys, np.stack([file.get_tensor(key).ravel() for key in keys])
        beside = path.with_name(f"{path.name}.json")
        if beside.is_file():
            about = {"genes": beside.read_text(encoding="utf-8"), **about}
        name_key = _preferred([key for key in NAME_KEYS if key in about], NAME_KEYS)
        if name_key is None:
            raise LingshuError(
                "A safetensors file with one matrix needs the names of its rows",
                f"{path.name} has no JSON list called genes in its metadata, and there is no {beside.name}",
                "Write them there, or store one tensor per gene",
            )
        names = json.loads(about[name_key])
        names = names.get(name_key) if isinstance(names, dict) else names
        if not isinstance(names, list):
            raise ValueError(f"{name_key} is no JSON list of names")
        return names, file.get_tensor(matrix_key)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        from pyarrow.parquet import read_metadata

        about = read_metadata(path)
        if about.num_rows * about.num_columns * 8 > max(HARMLESS_BYTES, MOST_UNPACKED * path.stat().st_size):
            raise ValueError(f"it announces {about.num_rows:,} rows in {path.stat().st_size:,} bytes")
        return pd.read_parquet(path)
    except ImportError as error:
        raise LingshuError(
            "Reading parquet needs pyarrow", "it is not installed", "Run pip install pyarrow, or convert to npz or csv"
        ) from error


def _of_table(table: pd.DataFrame, path: Path) -> tuple[Sequence[str], np.ndarray]:
    if isinstance(table.index, pd.RangeIndex) and table.shape[1]:
        table = table.set_index(table.columns[0])
    words = [str(column) for column in table.columns if not pd.api.types.is_numeric_dtype(table[column].dtype)]
    if words or not table.shape[1]:
        raise LingshuError(
            "A table of embeddings needs names first and numbers in all other columns",
            f"{path.name}: no numbers in {offenders(words)}" if words else f"{path.name} has one column only",
            "Drop the other columns; the file needs a header",
        )
    return [str(name) for name in table.index], table.to_numpy(dtype=np.float64)
