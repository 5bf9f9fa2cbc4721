"""The evaluation folder: facts about software and provenance, and files that appear whole or not at all."""

import json
import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.data.cell_folder import is_cell_folder, shard_name
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import expanded

_PACKAGES = (
    "lingshu-cell", "numpy", "scipy", "pandas", "anndata", "scanpy", "scikit-learn", "scib-metrics", "jax",
    "umap-learn", "numba",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Name the version of Python and of every package that takes part in the metrics (None = not installed)."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def provenance(path: Path) -> dict[str, Any] | None:
    """Read what a generated file says about its own making, ``uns["lingshu_cell"]``, as plain JSON values.

    Parameters
    ----------
    path
        h5ad file, or folder of generated cells.

    Returns
    -------
    The record, or None when the file holds none (another model's cells, or not an h5ad).
    """
    import h5py
    from anndata.io import read_elem

    path = expanded(path) / shard_name(0) if is_cell_folder(expanded(path)) else path
    if not h5py.is_hdf5(path):
        return None
    try:
        with h5py.File(path, "r") as file:
            found = read_elem(file["uns/lingshu_cell"]) if "uns/lingshu_cell" in file else None
    except Exception:  # damaged in any way: a remark, no data
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return {"text": found}
    found = None if found is None else plain(found)
    return found if found is None or isinstance(found, dict) else {"text": str(found)}


def plain(value: Any) -> Any:
    """Turn numpy and pandas values into what JSON can hold; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("list"))
    if isinstance(value, (list, tuple, set, np.ndarray, pd.Series, pd.Index)):
        return [plain(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def refuse_unwritable(out: Path) -> None:
    """Refuse an output path that is a file or lies under one.

    Parameters
    ----------
    out
        Folder to be written later.

    Raises
    ------
    LingshuError
        If ``out`` or a parent of it is something else than a folder.
    """
    blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise LingshuError(
            "The output must be a folder", f"{blocked} is a file", "Name another folder, or move that file away"
        )


def write_folder(out: Path, tables: dict[str, pd.DataFrame], records: dict[str, dict]) -> None:
    """Write tables and records beside the folder first, then move them in, so that no file is ever half written.

    Parameters
    ----------
    out
        Folder, created when absent; other files in it stay.
    tables
        File name (``.csv`` or ``.csv.gz``) → table.
    records
        File name (``.json``) → content; moved last, in this order.

    Raises
    ------
    LingshuError
        If the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out))
        try:
            for name, table in tables.items():
                table.to_csv(partial / name, index=False, float_format="%.6g")
            for name, record in records.items():
                text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)
                (partial / name).write_text(text + "\n", encoding="utf-8")
            for name in (*tables, *records):
                os.replace(partial / name, out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise LingshuError(
            "The output folder must be writable", f"{out}: {error.strerror or error}", "Choose another folder"
        ) from error
