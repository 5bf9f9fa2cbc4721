"""The rules of a Virtual Cell Challenge 2026 submission, and the check of a file against every one of them."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from lingshu_cell.data.anndata_io import read_obs
from lingshu_cell.data.condition_labels import labels_of
from lingshu_cell.data.count_blocks import VALUES_PER_BLOCK, CountBlocks
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_text

TARGET_KEY, CONTEXT_KEY, CONTROL = "target_gene", "context", "non-targeting"
N_GENES = 18_533
CELLS_PER_CONDITION = 400
MOST_CELLS = 400_000
MOST_COUNTS_PER_CELL = 1_000_000
MOST_STORED = 4_750_000_000
_GENE_HEADERS = ("gene_name", "gene_names", "gene", "genes", "gene_symbol")
_GUIDE = re.compile(r"-\d$")

Panel = Mapping[str | None, Mapping[str, int | None]]
"""Cells wanted of each target (None: any number), by context; the context None stands for every one."""


@dataclass(frozen=True)
class Rule:
    """One rule of the submission: what it asks, what was found, what to do where it fails."""

    name: str
    requirement: str
    found: str
    passed: bool
    remedy: str = ""


@dataclass(frozen=True)
class Vcc2026Report:
    """A file held against every rule."""

    path: Path
    n_cells: int
    n_genes: int
    n_stored: int
    rules: tuple[Rule, ...]

    @property
    def passed(self) -> bool:
        """Whether no rule fails."""
        return all(rule.passed for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Give everything as values of JSON."""
        return {**asdict(self), "path": str(self.path), "rules": [asdict(r) for r in self.rules], "passed": self.passed}

    def to_text(self) -> str:
        """Write a line for each rule."""
        lines = [f"{self.path}: {self.n_cells:,} cells x {self.n_genes:,} genes, {self.n_stored:,} stored entries"]
        for rule in self.rules:
            lines.append(f"{'pass' if rule.passed else 'FAIL'}  {rule.requirement}: {rule.found}")
            lines += [f"      {rule.remedy}"] if rule.remedy and not rule.passed else []
        n_failed = sum(not rule.passed for rule in self.rules)
        return "\n".join([*lines, "every rule holds" if self.passed else f"{n_failed} of {len(self.rules)} rules fail"])


def read_gene_list(path: Path | str) -> tuple[str, ...]:
    """Read the genes of a submission in their order: one per line, or the first column of a CSV file.

    Parameters
    ----------
    path
        The file; a first line such as ``gene_name`` is a heading.

    Returns
    -------
    tuple of str
        The genes.

    Raises
    ------
    LingshuError
        If the file cannot be read, is empty, or names a gene twice.
    """
    genes = [row[0].strip() for row in _rows(path) if row and row[0].strip()]
    if genes and genes[0].lower() in _GENE_HEADERS:
        genes = genes[1:]
    names = pd.Index(genes)
    if not len(names):
        raise LingshuError("The gene list must have genes", f"{path} has none", "Name the list of the challenge")
    if not names.is_unique:
        finding = f"{path} repeats {offenders(names[names.duplicated()].unique())}"
        raise LingshuError("The gene list names each gene once", finding, "Take the list of the challenge as it is")
    return tuple(genes)


def read_panel(path: Path | str, control: str = CONTROL) -> Panel:
    """Read the targets of a submission: names line by line, or a CSV file such as the challenge's ``pert_counts.csv``.

    Parameters
    ----------
    path
        CSV with a column ``target_gene`` and, if wanted, ``context`` and ``n_cells``; or one name per line.
    control
        Name that is left out.

    Returns
    -------
    Panel
        Targets by context, under None where the file has no contexts.

    Raises
    ------
    LingshuError
        If the file cannot be read or names no target.
    """
    rows = [row for row in _rows(path) if any(cell.strip() for cell in row)]
    columns = [cell.strip() for cell in rows[0]] if rows else []
    if TARGET_KEY in columns:
        rows = rows[1:]
    elif len(columns) == 1:
        columns = [TARGET_KEY]
    else:
        raise LingshuError(f"A list of targets has a column {TARGET_KEY}", f"{path} has {offenders(columns)}", "Add it")
    panel: dict[str | None, dict[str, int | None]] = {}
    for row in rows:
        values = dict(zip(columns, (cell.strip() for cell in row), strict=False))
        target, n_cells = values[TARGET_KEY], values.get("n_cells", "")
        if target and target != control:
            wanted = int(float(n_cells)) if n_cells.replace(".", "", 1).isdecimal() else None
            panel.setdefault(values.get(CONTEXT_KEY) or None, {})[target] = wanted or None
    if not panel:
        raise LingshuError("A list of targets has targets", f"{path} has none", "Name the list of the challenge")
    return panel


def label_rules(
    targets: np.ndarray,
    contexts: np.ndarray,
    *,
    control: str = CONTROL,
    wanted_contexts: Sequence[str] | None = None,
    panel: Panel | None = None,
    cells_per_condition: int | None = CELLS_PER_CONDITION,
) -> list[Rule]:
    """Hold the labels of the cells against the rules on controls, contexts, targets and numbers of cells.

    Parameters
    ----------
    targets, contexts
        Target gene and context of each cell, str, shape [n_cells].
    control
        Label that no cell may have.
    wanted_contexts
        Contexts that must all be there, and no other; those of ``panel``, or any, when None.
    panel
        Targets that every context must have, and no other; when None, each context must have the same ones.
    cells_per_condition
        Cells of each target in each context where ``panel`` says no number; None for any number.

    Returns
    -------
    list of Rule
        Every rule on labels.
    """
    if wanted_contexts is None and panel is not None and None not in panel:
        wanted_contexts = [str(context) for context in panel]
    is_control = targets == control
    counts = pd.crosstab(contexts[~is_control], targets[~is_control]) if (~is_control).any() else pd.DataFrame()
    found = [str(context) for context in counts.index]
    n_controls = int(is_control.sum())
    rules = [
        Rule("cells", f"at most {MOST_CELLS:,} cells", f"{len(targets):,}", 0 < len(targets) <= MOST_CELLS),
        Rule("controls", "no control cells", f"{n_controls:,} '{control}'", n_controls == 0, "Leave them out"),
    ]
    if wanted_contexts is not None:
        odd = sorted(set(found) ^ set(wanted_contexts))
        said = f"contexts are {', '.join(wanted_contexts)}"
        remedy = "Use the labels of the challenge's control files, each for its own cells"
        rules.append(Rule("contexts", said, ", ".join(found) or "none", not odd, remedy))
    wanted = {context: _panel_of(panel, context, counts) for context in found}
    rules.append(_target_rule(counts, wanted, panel is not None))
    if cells_per_condition is not None or panel is not None:
        rules.append(_number_rule(counts, wanted, cells_per_condition))
    return rules


def gene_rules(names: Sequence[str], genes: Sequence[str], n_genes: int | None = N_GENES) -> list[Rule]:
    """Hold the genes of a file against the list.

    Parameters
    ----------
    names
        Genes of the file in order.
    genes
        Genes of the list in order.
    n_genes
        Length that the list must have; None for any.

    Returns
    -------
    list of Rule
        Every rule on genes.
    """
    rules = []
    if n_genes is not None:
        remedy = "Take this year's list, or say how long another list is (--n-genes)"
        passed = len(genes) == n_genes
        rules.append(Rule("gene list", f"the gene list has {n_genes:,} genes", f"{len(genes):,}", passed, remedy))
    same = list(names) == list(genes)
    missing, extra = set(genes) - set(names), set(names) - set(genes)
    found = f"all {len(genes):,}" if same else "the same genes in another order"
    if missing or extra:
        found = f"absent: {offenders(sorted(missing))}; not in the list: {offenders(sorted(extra))}"
    rules.append(
        Rule("genes", "exactly the genes of the list, in its order", found, same, "Write it with lingshu export")
    )
    return rules


class MatrixScan:
    """What the rules ask of the counts, gathered block by block.

    Parameters
    ----------
    conditions
        Number of the condition of each cell, int, shape [n_cells].
    """

    def __init__(self, conditions: np.ndarray) -> None:
        self._conditions = conditions
        self.has_counts = np.zeros(int(conditions.max(initial=-1)) + 1, dtype=bool)
        self.n_stored = self.n_negative = self.n_fractions = self.n_lost = self.n_disordered = self.n_over = 0
        self.most_counts = 0.0

    def add(self, start: int, block: sparse.csr_matrix) -> None:
        """Look at a block.

        Parameters
        ----------
        start
            Number of its first cell.
        block
            Values of any dtype, shape [n_cells_of_the_block, n_genes].
        """
        values = block.data
        self.n_stored += len(values)
        if values.dtype.kind == "f":
            self.n_lost += int((~np.isfinite(values)).sum())
            self.n_fractions += int((values != np.trunc(values)).sum())
        self.n_negative += int((values < 0).sum())
        self.n_disordered += _n_disordered(block)
        totals = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        self.n_over += int((totals > MOST_COUNTS_PER_CELL).sum())
        self.most_counts = max(self.most_counts, float(totals.max(initial=0)))
        conditions = self._conditions[start : start + block.shape[0]]
        self.has_counts[conditions[totals > 0]] = True

    def rules(self, encoding: str, condition_names: Sequence[str]) -> list[Rule]:
        """Give every rule on the matrix.

        Parameters
        ----------
        encoding
            How the file stores it, e.g. ``"csr_matrix"``.
        condition_names
            Name of each condition.
        """
        is_csr = encoding.startswith("csr") and not self.n_disordered
        disordered = f", {self.n_disordered:,} gene numbers out of order or repeated" if self.n_disordered else ""
        n_bad = self.n_lost + self.n_negative + self.n_fractions
        bad = f"{self.n_lost:,} NaN or infinite, {self.n_negative:,} negative, {self.n_fractions:,} fractions"
        over = f"most {self.most_counts:,.10g}" + (f", {self.n_over:,} cells have more" if self.n_over else "")
        empty = [name for name, seen in zip(condition_names, self.has_counts, strict=True) if not seen]
        again = "Write it with lingshu export"
        return [
            Rule("storage", "X is CSR in canonical form", encoding + disordered, is_csr, again),
            Rule("counts", "values are whole numbers, 0 or more", bad if n_bad else "all", not n_bad, "Use raw counts"),
            Rule(
                "counts per cell",
                f"at most {MOST_COUNTS_PER_CELL:,} counts in a cell",
                over,
                self.n_over == 0,
                "Scale the predicted depth down",
            ),
            Rule(
                "stored entries",
                f"at most {MOST_STORED:,} stored entries",
                f"{self.n_stored:,}",
                self.n_stored <= MOST_STORED,
                "Predict fewer expressed genes per cell",
            ),
            Rule(
                "empty conditions",
                "no condition without any counts",
                offenders(empty) if empty else "none",
                not empty,
                "Predict these conditions again",
            ),
        ]


def validate_vcc2026(
    path: Path | str,
    genes: Sequence[str],
    *,
    control: str = CONTROL,
    contexts: Sequence[str] | None = None,
    panel: Panel | None = None,
    cells_per_condition: int | None = CELLS_PER_CONDITION,
    n_genes: int | None = N_GENES,
    values_per_block: int = VALUES_PER_BLOCK,
) -> Vcc2026Report:
    """Hold a submission against every rule, reading it block by block.

    Parameters
    ----------
    path
        h5ad file.
    genes
        Genes of the challenge's list, in order.
    control, contexts, panel, cells_per_condition
        See :func:`label_rules`.
    n_genes
        See :func:`gene_rules`.
    values_per_block
        Stored values held at a time.

    Returns
    -------
    Vcc2026Report
        Every rule with what was found.

    Raises
    ------
    LingshuError
        If the file cannot be read at all: it is no h5ad file, is damaged, is stored by genes, or lacks a column.

    Sources
    -------
    The challenge's own checker, ``vcc prep`` of vcc-cli 0.3.0, and the preset vcc2026 of cell-eval2.
    """
    obs = read_obs(path)
    targets, of_context = labels_of(obs, TARGET_KEY), labels_of(obs, CONTEXT_KEY)
    codes, names = condition_codes(targets, of_context)
    with CountBlocks(path) as stored:
        rules = gene_rules(stored.gene_names, genes, n_genes)
        rules += label_rules(
            targets,
            of_context,
            control=control,
            wanted_contexts=contexts,
            panel=panel,
            cells_per_condition=cells_per_condition,
        )
        scan = MatrixScan(codes)
        for start, block in stored.blocks(values_per_block):
            scan.add(start, block)
        scan.n_stored = max(scan.n_stored, stored.n_stored or 0)  # entries past the last row pointer count as well
        rules += scan.rules(stored.encoding, names)
        return Vcc2026Report(Path(path), stored.n_cells, stored.n_genes, scan.n_stored, tuple(rules))


def condition_codes(targets: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number the conditions of the cells.

    Parameters
    ----------
    targets, contexts
        Labels, str, shape [n_cells].

    Returns
    -------
    tuple
        Number of each cell's condition, and the names ``"context · target"`` by number.
    """
    target_codes, target_names = pd.factorize(targets)
    context_codes, context_names = pd.factorize(contexts)
    codes, pairs = pd.factorize(context_codes * max(len(target_names), 1) + target_codes)
    return codes, [
        f"{context_names[pair // len(target_names)]} · {target_names[pair % len(target_names)]}" for pair in pairs
    ]


def _panel_of(panel: Panel | None, context: str, counts: pd.DataFrame) -> Mapping[str, int | None]:
    if panel is None:
        return dict.fromkeys(str(target) for target in counts.columns)
    return panel.get(context, panel.get(None, {}))


def _target_rule(counts: pd.DataFrame, wanted: Mapping[str, Mapping[str, int | None]], is_given: bool) -> Rule:
    missing, extra = [], []
    for context, targets in wanted.items():
        present = {str(target) for target in counts.columns[counts.loc[context] > 0]}
        missing += [f"{context} · {target}" for target in sorted(set(targets) - present)]
        extra += [f"{context} · {target}" for target in sorted(present - set(targets))]
    said = "every context has the targets of the list" if is_given else "every context has the same targets"
    found = f"{counts.shape[1]:,} targets"
    if missing or extra:
        found = f"absent: {offenders(missing)}" + (f"; not in the list: {offenders(extra)}" if extra else "")
    is_guide = any(_GUIDE.search(name) for name in extra)
    remedy = "Name targets by gene, ADNP and not ADNP-1" if is_guide else "Predict every target in every context"
    return Rule("targets", said, found, bool(wanted) and not (missing or extra), remedy)


def _number_rule(counts: pd.DataFrame, wanted: Mapping[str, Mapping[str, int | None]], usual: int | None) -> Rule:
    wrong, expected = [], set()
    for context, targets in wanted.items():
        for target, number in targets.items():
            asked = usual if number is None else number
            found = int(counts.at[context, target]) if target in counts.columns else 0
            if asked is not None and found:
                expected.add(asked)
                wrong += [f"{context} · {target}: {found:,}"] if found != asked else []
    said = f"{' or '.join(f'{number:,}' for number in sorted(expected)) or 'any number of'} cells of every condition"
    remedy = "Generate exactly so many: more or fewer change the power of the tests that score them"
    return Rule("cells per condition", said, offenders(wrong) if wrong else "all", not wrong, remedy)


def _n_disordered(block: sparse.csr_matrix) -> int:
    """Count gene numbers that do not rise within their cell."""
    falls = np.diff(block.indices) <= 0
    starts = block.indptr[1:-1]
    falls[starts[(starts > 0) & (starts < len(block.indices))] - 1] = False  # from one cell to the next
    return int(falls.sum())


def _rows(path: Path | str) -> list[list[str]]:
    rule = "The list must be a readable text or CSV file"
    text = read_text(path, rule, "Check it")
    try:
        return list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise LingshuError(rule, f"{path}: {error}", "Check it") from error
