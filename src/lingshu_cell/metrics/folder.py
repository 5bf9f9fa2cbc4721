"""The evaluation folder: facts about software and provenance, and files that appear whole or not at all."""

import contextlib
import functools
import inspect
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from lingshu_cell.data.cell_folder import is_cell_folder, shard_name
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import expanded
from lingshu_cell.output_files import flush, flush_all, locked, writable

_RULE = "The output folder must be writable"
_PARTIAL = ".partial"
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


def holding_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function hold the folder of its argument ``out``, a path or its name, while it runs: two that write one
    folder are refused. It leaves OpenMP, so torch, the number of threads it had: numba, under scanpy and pdex, sets it
    for the whole process.
    """
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def held(*arguments: Any, **named: Any) -> Any:
        given = parameters.bind(*arguments, **named)
        out = given.arguments["out"] = Path(given.arguments["out"])
        refuse_unwritable(out)
        with contextlib.ExitStack() as stack:
            with writable(_RULE, out, "Check the rights, or choose another folder"):
                rule = "One folder is written by one process at a time"
                stack.enter_context(locked(out, rule, f"{out} is in use", "Wait, or choose another folder"))
            stack.enter_context(threadpool_limits(None, user_api="openmp"))
            return function(*given.args, **given.kwargs)

    return held


def write_folder(
    out: Path,
    tables: dict[str, pd.DataFrame],
    records: dict[str, dict],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write tables and records beside the folder first, then move them in, so that no file is ever half written.

    Parameters
    ----------
    out
        Folder, created when absent; other files in it stay.
    tables
        File name (``.csv`` or ``.csv.gz``) → table.
    records
        File name (``.json``) → content; moved last, in this order.
    texts
        File name → text.

    Raises
    ------
    LingshuError
        If the folder cannot be written.
    """
    partial = out / _PARTIAL
    with writable(_RULE, out, "Free some space, check the rights, or choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process: whoever writes holds the folder
        try:
            partial.mkdir()
            for name, table in tables.items():
                # The same bytes at any hour.
                compression = {"method": "gzip", "mtime": 1} if name.endswith(".gz") else None
                table.to_csv(partial / name, index=False, float_format="%.6g", compression=compression)
            for name, record in records.items():
                text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)
                (partial / name).write_text(text + "\n", encoding="utf-8")
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            flush_all(partial)
            for name in (*tables, *texts, *records):
                os.replace(partial / name, out / name)
            flush(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
