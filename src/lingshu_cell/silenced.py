"""Genes to hold low while a perturbation is generated, by the preprint's rule: its target, and all that it all but
silences in other identities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lingshu_cell.checksums import sha256
from lingshu_cell.config import DataConfig
from lingshu_cell.data.condition_sums import Tally
from lingshu_cell.data.de_tables import join_de_tables, read_de_table, silenced_genes, strongly_down_regulated
from lingshu_cell.data.positions import pieces
from lingshu_cell.data.training_set import TrainingCells
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.output_files import writable, write_text

SILENCED_FILE = "silenced.csv"
_CELLS_AT_ONCE = 4096
_LEAST_CELLS = 3  # of a condition, for its test to say anything


@dataclass(frozen=True, eq=False)
class Silenced:
    """What perturbations silence: rows of tables of differential expression, and where they are from."""

    table: pd.DataFrame
    source: str

    def genes(self, label: str, identity: str, gene_names: Sequence[str], separator: str) -> tuple[str, ...]:
        """Name the genes to hold low for a perturbation label in an identity, whose own rows are not looked at."""
        own = identity if "identity" in self.table else None
        return silenced_genes(self.table, label, gene_names, except_identity=own, separator=separator)

    def n_other_identities(self, label: str, identity: str) -> int | None:
        """In how many other identities the label was measured; ``None`` where the tables do not tell identities."""
        if "identity" not in self.table:
            return None
        measured = set(self.table["identity"][self.table["target"] == label])
        return len(measured - {identity})


def read_silenced(run: Path, de_tables: Path | str | None = None, expected: str | None = None) -> Silenced:
    """Read tables of differential expression: those given, or those that training left in the run folder.

    Parameters
    ----------
    run
        The run folder.
    de_tables
        Tables of the user's own.
    expected
        The sha256 of those of training, where the checkpoint states it.

    Raises
    ------
    LingshuError
        If none are given and training left none, or they cannot be read, or are not what training wrote.
    """
    path = run / SILENCED_FILE if de_tables is None else Path(de_tables)
    if de_tables is None and not path.is_file():
        raise LingshuError(
            "Holding silenced genes low needs tables of differential expression",
            f"{run.name} has none from training",
            "Pass those of lingshu de with --de-tables, or train with data.silenced=true",
        )
    if de_tables is None and expected is not None and sha256(path) != expected:
        raise LingshuError(
            "The tables of a run must be whole",
            f"{path} does not match its checksum",
            "Copy the run again from where it came, or pass tables of lingshu de with --de-tables",
        )
    table = read_de_table(path)
    return Silenced(table, "the training cells" if de_tables is None else path.name)


def measure_silenced(
    cells: TrainingCells, identity_names: Callable[[np.ndarray], Sequence[str]], data: DataConfig
) -> pd.DataFrame:
    """Test the training cells of every perturbation against control cells of the same identity, by pdex.

    Means are counts per cell, normalised to the median library size of the training cells. One identity at a time is
    in memory.

    Parameters
    ----------
    cells
        The training cells.
    identity_names
        Names the identities of condition rows.
    data
        Which field holds the perturbations, and what control is called.

    Returns
    -------
    pandas.DataFrame
        As of :func:`lingshu_cell.data.de_tables.read_de_table`: a row for every gene that a perturbation silences, and
        for each perturbation and identity tested the gene of the smallest p-value, so that it is known to be measured.
    """
    from lingshu_cell.metrics.differential import differential_tables  # pdex is an extra

    row_RC, n_R = cells.condition_frequencies(cells.seen)
    label_R = cells.conditions.decode(row_RC)[data.perturbation_key].astype(str).to_numpy(object)
    identity_R = np.array(identity_names(row_RC), dtype=object)
    control, names = data.control, [cells.vocabulary.names[g] for g in cells.modelled]
    totals = Tally()
    for piece in pieces(cells.seen, _CELLS_AT_ONCE):
        totals.add(cells.counts_of(piece)[0].sum(1))
    target_sum = totals.median()
    tables: dict[tuple[str, str], pd.DataFrame] = {}
    for identity in sorted(set(identity_R)):
        of_rows = {
            tuple(row): label
            for row, label, n, name in zip(row_RC.tolist(), label_R, n_R, identity_R, strict=True)
            if name == identity and n >= _LEAST_CELLS
        }
        if control not in of_rows.values() or len(of_rows) < 2:
            continue
        here, labels = [], []
        for piece in pieces(cells.seen):
            found = [of_rows.get(tuple(row)) for row in cells.condition_rows(piece).tolist()]
            here += [cell for cell, label in zip(piece.tolist(), found, strict=True) if label is not None]
            labels += [label for label in found if label is not None]
        counts = cells.counts_of(np.array(here))[0]
        found = differential_tables(counts, np.array(labels, object), control, names, target_sum=target_sum)
        tables |= {(identity, label): table for label, table in found.items()}
    whole = join_de_tables(tables)
    first = ~whole.duplicated(["identity", "target"])
    return whole[first | _is_silenced(whole)].reset_index(drop=True)


def keep_silenced(
    run: Path,
    cells: TrainingCells,
    identity_names: Callable[[np.ndarray], Sequence[str]],
    data: DataConfig,
    known: str | None = None,
) -> str:
    """Measure what perturbations silence, as :func:`measure_silenced`, and leave it in the run folder.

    Parameters
    ----------
    run
        The run folder.
    cells, identity_names, data
        See :func:`measure_silenced`.
    known
        The sha256 of what an earlier part of the run left there; what matches it is not measured again.

    Returns
    -------
    The sha256 of the file.
    """
    file = run / SILENCED_FILE
    if known is None or not file.is_file() or sha256(file) != known:
        table = measure_silenced(cells, identity_names, data)
        with writable("The run folder must be writable", file, "Free some space, then go on with --resume"):
            write_text(file, table.to_csv(index=False))
    return sha256(file)


def describe_silenced(silenced: Silenced, held: dict[tuple[str, str], tuple[str, ...]]) -> list[str]:
    """Say which genes are held low in each condition, ``(identity, label)`` → genes."""
    notes = []
    for (identity, label), genes in held.items():
        n = silenced.n_other_identities(label, identity)
        where = "" if n is None else f", {n} other identities measured"
        what = f"{offenders(genes)} held at 1 UMI" if genes else "no gene to hold at 1 UMI"
        notes.append(f"{label} in {identity or 'all cells'}: {what} ({silenced.source}{where})")
    return notes


def _is_silenced(table: pd.DataFrame) -> np.ndarray:
    """Which rows obey the rule of :func:`lingshu_cell.data.de_tables.strongly_down_regulated`."""
    found = {
        (identity, target, gene)
        for identity, rows in table.groupby("identity", sort=False)
        for target, genes in strongly_down_regulated(rows).items()
        for gene in genes
    }
    keys = zip(table["identity"], table["target"], table["feature"], strict=True)
    return np.fromiter((key in found for key in keys), bool, len(table))
