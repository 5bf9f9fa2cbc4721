"""Read the folder that an evaluation wrote, and refuse what no report can be made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import open_binary, read_json, refuse_special

SOURCES = ("real", "generated")
GENE_PREFIX = "gene:"
_CELL_COLUMNS = ("source", "cell_type", "predicted_cell_type", "total_counts", "n_genes", "umap1", "umap2")
_GENE_COLUMNS = tuple(
    f"{what}_{side}" for side in SOURCES for what in ("mean", "variance", "zero_fraction", "mean_lognorm")
)
_PROPORTION_COLUMNS = ("cell_type", *SOURCES)
_EVALUATE_FIRST = "Run lingshu evaluate --real REAL.h5ad --generated GEN.h5ad --out DIR first and give that DIR"
_EVALUATE_AGAIN = "Run lingshu evaluate again; its files are not meant to be edited"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation wrote, read and checked."""

    name: str
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    cells: pd.DataFrame
    genes: pd.DataFrame
    proportions: pd.DataFrame
    history: pd.DataFrame | None
    evaluated: datetime


def read_evaluation(directory: Path) -> Evaluation:
    """Read the folder of an evaluation and refuse what a page cannot be made from.

    Parameters
    ----------
    directory
        Folder that ``lingshu evaluate`` wrote.

    Returns
    -------
    The measurements, facts and tables.

    Raises
    ------
    LingshuError
        If the folder or one of its files is missing, unreadable or lacks a column.
    """
    directory = Path(directory)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise LingshuError(
            "A report is made from the folder of an evaluation", f"{str(directory)!r} {found}", _EVALUATE_FIRST
        )
    wanted = ("metrics.json", "facts.json", "cells.csv.gz", "genes.csv.gz")
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        raise LingshuError(
            "A report is made from the folder of an evaluation",
            f"{str(directory)!r} lacks {offenders(missing)}",
            _EVALUATE_FIRST,
        )
    cells = _read_table(directory / "cells.csv.gz", _CELL_COLUMNS, text=("source", "cell_type", "predicted_cell_type"))
    absent = [side for side in SOURCES if not (cells["source"] == side).any()]
    if absent:
        raise LingshuError(
            "cells.csv.gz must hold real and generated cells", f"none are {offenders(absent)}", _EVALUATE_AGAIN
        )
    proportions, history = directory / "proportions.csv", directory / "history.csv"
    return Evaluation(
        name=directory.resolve().name,
        metrics=_read_metrics(directory / "metrics.json"),
        facts=_read_object(directory / "facts.json"),
        cells=cells,
        genes=_read_table(directory / "genes.csv.gz", ("gene", *_GENE_COLUMNS), text=("gene",)),
        proportions=_read_table(proportions, _PROPORTION_COLUMNS, text=("cell_type",))
        if proportions.is_file()
        else pd.DataFrame(columns=list(_PROPORTION_COLUMNS)),
        history=_read_table(history, ("step",), text=None) if history.is_file() else None,
        evaluated=datetime.fromtimestamp((directory / "metrics.json").stat().st_mtime),
    )


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, f"{path.name} must be valid JSON", _EVALUATE_AGAIN)


def _read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    metrics = _read_object(path)
    wrong = [name for name, entry in metrics.items() if not isinstance(entry, dict) or "value" not in entry]
    if not wrong:
        numeric = (int, float, type(None))
        keys = ("value", "real_vs_real", "shuffled")
        wrong = [n for n, entry in metrics.items() if not all(isinstance(entry.get(k), numeric) for k in keys)]
    if wrong or not metrics:
        raise LingshuError(
            "metrics.json must give every measurement a value and a real_vs_real, each a number or null",
            f"it is empty or these do not: {offenders(wrong)}",
            _EVALUATE_AGAIN,
        )
    return metrics


def _read_table(path: Path, columns: Sequence[str], text: Sequence[str] | None) -> pd.DataFrame:
    """Read a table; ``text`` columns become strings, every other wanted column must hold numbers (None: no check)."""
    try:
        refuse_special(path, f"{path.name} must be a table of comma-separated values")
        with open_binary(path) as stream:
            table = pd.read_csv(stream, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(text or (), str))
    except LingshuError:
        raise
    except Exception as error:  # pandas, gzip and the text decoder each have their own kinds
        raise LingshuError(
            f"{path.name} must be a table of comma-separated values", f"it cannot be read: {error}", _EVALUATE_AGAIN
        ) from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise LingshuError(
            f"{path.name} must have the columns {', '.join(columns)}",
            f"missing are {offenders(missing)}",
            _EVALUATE_AGAIN,
        )
    if text is not None:
        table[list(text)] = table[list(text)].fillna("")
        numbers = [c for c in table.columns if (c in columns and c not in text) or c.startswith(GENE_PREFIX)]
        wrong = [c for c in numbers if len(table) and not pd.api.types.is_numeric_dtype(table[c])]
        if wrong:
            raise LingshuError(
                f"Columns of {path.name} must hold numbers", f"text was found in {offenders(wrong)}", _EVALUATE_AGAIN
            )
    return table
