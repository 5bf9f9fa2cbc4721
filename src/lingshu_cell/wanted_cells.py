"""Which cells a folder of generated cells is to hold: rows of conditions with a seed each, cut into shards."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingshu_cell.arguments import whole_number
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_text

MOST_CELLS_PER_ROW = 1 << 32
NUMBER_KEY, DOSE_KEY, DEPTH_KEY = "n", "dose", "depth"
_NAME_LENGTH = 12
_RULE = "The table of wanted cells must be a CSV file with a row for each condition"
_EXAMPLE = "Write for example the columns cell_type,n and the rows B cells,1000 and NK cells,500"


@dataclass(frozen=True)
class WantedRow:
    """Cells of one condition.

    Attributes
    ----------
    condition
        Wanted label of some fields.
    n_cells, seed
        How many, and the seed they count from: cell i is that of ``generate`` with this seed and condition.
    name
        What the names of the cells begin with; None for the seed.
    dose, depth
        See :func:`lingshu_cell.request.resolve_request`.
    """

    condition: Mapping[str, str]
    n_cells: int
    seed: int
    name: str | None = None
    dose: float | None = None
    depth: float | str | None = None

    def to_json(self) -> list[Any]:
        """Give the row as plain JSON types, short, as there may be many."""
        return [dict(self.condition), self.n_cells, self.seed, self.name, self.dose, self.depth]


@dataclass(frozen=True)
class Piece:
    """Cells ``first … first + n_cells - 1`` of a row."""

    row: int
    first: int
    n_cells: int


def read_wanted_cells(
    path: Path | str, fields: Sequence[str], seed: int, *, n_cells: int | None = None, **others: Any
) -> list[WantedRow]:
    """Read a table of conditions.

    The seed of a row is made of the seed and of what the row asks for, its number of cells left out. So its cells do
    not change when other rows come, go or change their places, and more cells of it begin with those of fewer.

    Parameters
    ----------
    path
        CSV file with a header. Columns: fields of the model (empty: left open), ``n``, ``dose``, ``depth``.
    fields
        Condition fields of the model.
    seed
        Of the whole request.
    n_cells
        Of rows that do not say; all must say when not given.
    others
        ``condition``, ``dose`` and ``depth`` for all rows; a row may say otherwise.

    Raises
    ------
    LingshuError
        If the file is no such table, a column is unknown, a number is none, or two rows ask for the same.
    """
    lines = list(csv.reader(io.StringIO(read_text(path, _RULE), newline="")))
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    header = [name.strip() for name in lines[0]] if lines else []
    unknown = [name for name in header if name not in (*fields, NUMBER_KEY, DOSE_KEY, DEPTH_KEY)]
    if unknown or len(set(header)) < len(header):
        wrong = f"unknown: {offenders(unknown)}" if unknown else f"{offenders(header)} hold some twice"
        remedy = f"Columns may be {offenders([*fields, NUMBER_KEY, DOSE_KEY, DEPTH_KEY])}"
        raise LingshuError("Columns of wanted cells are conditions of the model", f"{path}: {wrong}", remedy)
    if len(lines) < 2:
        raise LingshuError(_RULE, f"{path} has no row", _EXAMPLE)
    uneven = [number for number, line in enumerate(lines[1:], start=1) if len(line) != len(header)]
    if uneven:
        finding = f"{path}: other numbers of values than columns in row {offenders(uneven)}"
        raise LingshuError(_RULE, finding, _EXAMPLE)
    rows = [
        _row(dict(zip(header, line, strict=True)), f"{path}, row {number}", fields, seed, n_cells, others)
        for number, line in enumerate(lines[1:], start=1)
    ]
    known: dict[str | None, int] = {}
    for number, row in enumerate(rows, start=1):
        if row.name in known:
            finding = f"{path}: rows {known[row.name]} and {number} do"
            raise LingshuError("No two rows may ask for the same cells", finding, "Put their numbers together")
        known[row.name] = number
    return rows


def _row(
    said: Mapping[str, str],
    where: str,
    fields: Sequence[str],
    seed: int,
    n_cells: int | None,
    others: Mapping[str, Any],
) -> WantedRow:
    said = {key: value.strip() for key, value in said.items() if value.strip()}
    condition = {**(others.get("condition") or {}), **{key: said[key] for key in fields if key in said}}
    in_fields = set(fields)  # a field that is called dose is a label
    text = said.get(NUMBER_KEY)
    if text is None and n_cells is None:
        raise LingshuError("Every row must say how many cells", f"{where} does not", "Add the column n, or --n")
    number = n_cells if text is None else int(text) if text.isdecimal() and len(text) < 12 else text
    number = whole_number(number, "The number of cells", 1, MOST_CELLS_PER_ROW, f"Change n in {where}")
    dose, depth = others.get("dose"), others.get("depth")
    if DOSE_KEY in said and DOSE_KEY not in in_fields:
        try:
            dose = float(said[DOSE_KEY])
        except ValueError:
            raise LingshuError("A dose must be a number", f"{where}: {said[DOSE_KEY]!r}", "Change it") from None
    if DEPTH_KEY in said and DEPTH_KEY not in in_fields:
        depth = said[DEPTH_KEY]
    asked = json.dumps([seed, sorted(condition.items()), dose, depth], ensure_ascii=False)
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
    return WantedRow(condition, number, int(digest[:8], 16) >> 1, digest[:_NAME_LENGTH], dose, depth)


def cut_into_shards(rows: Sequence[WantedRow], shard_cells: int, tile: int) -> list[tuple[Piece, ...]]:
    """Cut the cells of all rows into shards of at most so many, the same for everybody who does it.

    Rows are cut between tiles, so that no tile is computed twice, and small rows share a shard.

    Parameters
    ----------
    rows
        The rows, in order.
    shard_cells
        Most cells of a shard, a tile or more.
    tile
        Cells of a tile.
    """
    shards: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    space = shard_cells
    for number, row in enumerate(rows):
        first = 0
        while first < row.n_cells:
            left = row.n_cells - first
            n = left if left <= space else space // tile * tile
            if n:
                current.append(Piece(number, first, n))
                first, space = first + n, space - n
            if n < left or not space:
                shards.append(tuple(current))
                current, space = [], shard_cells
    if current:
        shards.append(tuple(current))
    return shards
