"""Which cells are compared when predicted responses are judged: truth, prediction, ceiling, and their controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.data.anndata_io import CountMatrix
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.metrics import embedding, memorisation, responses

CEILING = "ceiling_"
"""Prefix of what other real cells reach in the place of the prediction."""

LEAST_CELLS = 10
"""Cells in each group of a comparison."""

_SPARE_CONTROLS = 0.2  # share of each identity's control cells that fit the PCA when there are no training cells

Condition = tuple[str, str]
"""Identity ("" when there are none) and perturbation."""

Role = Literal["truth", "judged", "ceiling"]


@dataclass(frozen=True)
class Protocol:
    """The choices that decide which cells are compared; each is explained in ``evaluate_responses``."""

    perturbation_key: str
    control: str
    identity_key: str | None
    target_sum: float
    max_cells_per_condition: int
    ceiling: bool
    split_controls: bool
    use_predicted_controls: bool
    seed: int

    def rng(self, *names: str) -> np.random.Generator:
        """Give the randomness of one condition, which does not depend on what other conditions there are."""
        return np.random.default_rng([self.seed, crc32("\0".join(names).encode())])


@dataclass(frozen=True, eq=False)
class Side:
    """One file: raw counts (cells, genes), and the row numbers of each condition, controls included."""

    counts: sp.csr_matrix
    rows: dict[Condition, np.ndarray]


class Sides(NamedTuple):
    """The two files to be compared."""

    real: Side
    predicted: Side


@dataclass(frozen=True, eq=False)
class Group:
    """Some cells with what is computed from them once: raw counts, log expression, statistics of the genes."""

    counts: sp.csr_matrix
    expression: sp.csr_matrix
    statistics: responses.GeneStatistics

    @property
    def n(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]


@dataclass(frozen=True, eq=False)
class Controls:
    """Control cells of one identity, behind the truth, the prediction, and other real cells in its place.

    ``halves`` are two groups without a common cell, for the slope. ``generated`` are predicted control cells, None
    with fewer than ten or when ``copied``, that is, at least half of them equal real ones. ``unseen`` says that no cell
    behind the truth is a training cell (None when the training cells are not known).
    """

    truth: Group
    judged: Group
    ceiling: Group
    halves: tuple[Group, Group]
    generated: Group | None
    copied: bool
    unseen: bool | None


@dataclass(frozen=True, eq=False)
class Sample:
    """Cells of one condition: real ones, predicted ones, and other real ones in the place of the prediction."""

    truth: Group
    judged: Group
    ceiling: Group | None


class ControlRows(NamedTuple):
    """Two groups of an identity's real control cells, by row, and whether the first holds no training cell."""

    first: np.ndarray
    second: np.ndarray
    unseen: bool | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """All cells of one identity that take part: its control cells, and the sample of each perturbation."""

    identity: str
    controls: Controls
    samples: dict[str, Sample]

    def stack(self, role: Role, control: str) -> tuple[sp.csr_matrix, sp.csr_matrix, np.ndarray]:
        """Put the perturbed and control cells of one role together: counts, log expression, perturbations."""
        groups = {control: getattr(self.controls, role)}
        groups |= {perturbation: getattr(sample, role) for perturbation, sample in self.samples.items()}
        counts, expression = (
            sp.vstack([getattr(group, what) for group in groups.values()], format="csr")
            for what in ("counts", "expression")
        )
        return counts, expression, np.repeat(np.array(list(groups)), [group.n for group in groups.values()])


def aligned_counts(matrix: CountMatrix, genes: pd.Index, called: str) -> sp.csr_matrix:
    """Bring the counts of a file to the genes of the real one.

    Parameters
    ----------
    matrix
        Counts of the file.
    genes
        Genes of the real file, in its order.
    called
        The file in the words of the error.

    Returns
    -------
    CSR counts with sorted indices, (cells, genes).

    Raises
    ------
    LingshuError
        If the two do not have the same genes.
    """
    if matrix.gene_names.equals(genes):
        return matrix.counts
    lacking, unknown = genes.difference(matrix.gene_names), matrix.gene_names.difference(genes)
    if len(lacking) or (len(unknown) and called == "predicted"):
        found = [f"not in the {called} data: {offenders(lacking)}"] if len(lacking) else []
        found += [f"only in the {called} data: {offenders(unknown)}"] if len(unknown) else []
        raise LingshuError(
            "Real and predicted cells must have the same genes",
            "; ".join(found),
            "Keep the genes both have in both files; a gene left out of a prediction is not a gene predicted as zero",
        )
    counts = matrix.counts[:, matrix.gene_names.get_indexer(genes)]
    counts.sort_indices()
    return counts


def read_side(matrix: CountMatrix, genes: pd.Index, called: str, protocol: Protocol) -> Side:
    """Align one file and find the rows of every condition.

    Parameters
    ----------
    matrix
        Counts of the file, labels checked to be there.
    genes
        Genes of the real file, in its order.
    called
        ``"real"`` or ``"predicted"``.
    protocol
        Names of the obs columns.

    Returns
    -------
    Side.

    Raises
    ------
    LingshuError
        If the genes are not those of the real file.
    """
    perturbations = matrix.obs[protocol.perturbation_key].astype(str).to_numpy()
    key = protocol.identity_key
    identities = np.full(matrix.n_cells, "") if key is None else matrix.obs[key].astype(str).to_numpy()
    table = pd.DataFrame({"identity": identities, "perturbation": perturbations})
    rows = {
        (str(i), str(p)): np.asarray(r) for (i, p), r in table.groupby(["identity", "perturbation"]).indices.items()
    }
    return Side(aligned_counts(matrix, genes, called), rows)


def check_conditions(sides: Sides, protocol: Protocol, only_predicted: bool) -> list[Condition]:
    """Check that both sides have the same conditions, and each identity real control cells.

    Parameters
    ----------
    sides
        The two files.
    protocol
        The label of control cells.
    only_predicted
        Leave out real conditions without a prediction instead of refusing them.

    Returns
    -------
    The conditions to be judged, sorted.

    Raises
    ------
    LingshuError
        If the control label is unknown, or conditions or control cells are missing.
    """
    control, real = protocol.control, sides.real
    measured, asked = ({c for c in side.rows if c[1] != control} for side in sides)
    if control not in {perturbation for _, perturbation in real.rows}:
        raise LingshuError(
            "The real data must have control cells",
            f"no cell has {control!r} in obs[{protocol.perturbation_key!r}]",
            f"Say which label is the control; found: {offenders(sorted({p for _, p in real.rows}))}",
        )
    unknown, lacking = sorted(asked - measured), sorted(measured - asked)
    if unknown:
        raise LingshuError(
            "Every predicted condition must have real cells to be judged by",
            f"not in the real data: {offenders(called(c) for c in unknown)}",
            f"Drop them, or check their labels; real ones: {offenders(called(c) for c in sorted(measured))}",
        )
    if lacking and not (only_predicted and asked):
        raise LingshuError(
            "Every real condition must be predicted",
            f"not in the prediction: {offenders(called(c) for c in lacking)}",
            "Predict them, or judge only what was predicted (only_predicted=True)",
        )
    least = 2 * LEAST_CELLS
    poor = [i for i in sorted({i for i, _ in asked}) if len(real.rows.get((i, control), ())) < least]
    if poor:
        raise LingshuError(
            f"Every identity needs at least {least} real control cells",
            f"fewer in {offenders(i or 'the data' for i in poor)}",
            "Add control cells of these identities, or leave the identities out of both files",
        )
    return sorted(asked & measured)


def refuse_training_cells(real: Side, conditions: Sequence[Condition], training: sp.csr_matrix) -> int:
    """Refuse real perturbed cells that the model was trained on.

    Parameters
    ----------
    real
        The real file; its control cells may be training cells.
    conditions
        The conditions to be judged.
    training
        Counts of the training cells, (cells, genes).

    Returns
    -------
    Number of real perturbed cells that equal a training cell, less than half of them.

    Raises
    ------
    LingshuError
        If half of them or more do.
    """
    rows = np.concatenate([real.rows[condition] for condition in conditions])
    n = memorisation.n_copies(*(memorisation.cell_fingerprints(x) for x in (real.counts[rows], training)))
    if 2 * n >= len(rows):
        raise LingshuError(
            "Real perturbed cells must be held out from training",
            f"{n} of {len(rows)} equal a training cell in every gene",
            "Pass the training cells without the held-out conditions, or leave them out",
        )
    return n


def divide_controls(
    real: Side, identities: Sequence[str], protocol: Protocol, training: sp.csr_matrix | None
) -> tuple[np.ndarray, dict[str, ControlRows]]:
    """Divide each identity's real control cells in two groups, and set some aside for the PCA.

    A model that was trained on the very control cells behind the truth repeats their noise, which the truth holds with
    the other sign: its correlations come out too low, below 0 for a prediction of no change. So control cells that are
    not among the training cells stand behind the truth, where there are enough of both kinds.

    Parameters
    ----------
    real
        The real file.
    identities
        Identities to be judged.
    protocol
        Label of control cells and randomness.
    training
        Counts of the training cells, (cells, genes); None when they are not known: then a fifth is set aside.

    Returns
    -------
    Rows set aside, of all identities, and the two groups of each identity in random order.
    """
    aside, groups = [np.empty(0, dtype=np.intp)], {}
    known = None if training is None else set(memorisation.cell_fingerprints(training))
    for identity in identities:
        rows = protocol.rng("controls", identity).permutation(real.rows[identity, protocol.control])
        if known is None:
            n = int(_SPARE_CONTROLS * len(rows))
            aside.append(rows[:n])
            groups[identity] = ControlRows(*np.array_split(rows[n:], 2), None)
            continue
        seen = np.array([digest in known for digest in memorisation.cell_fingerprints(real.counts[rows])])
        apart = min(seen.sum(), (~seen).sum()) >= 2 * LEAST_CELLS
        first, second = (rows[~seen], rows[seen]) if apart else np.array_split(rows, 2)
        groups[identity] = ControlRows(first, second, bool(apart or not seen.any()))
    return np.concatenate(aside), groups


def draw(sides: Sides, identity: str, rows: ControlRows, perturbations: Sequence[str], protocol: Protocol) -> Drawn:
    """Choose all cells that take part in the comparisons of one identity.

    Parameters
    ----------
    sides
        The two files.
    identity
        Whose cells.
    rows
        The two groups of its real control cells.
    perturbations
        Its conditions.
    protocol
        How to divide, and the most cells of a group.

    Returns
    -------
    Drawn; conditions in which a group would have fewer than ten cells are left out of its samples.
    """
    drawn = {perturbation: _draw_sample(sides, (identity, perturbation), protocol) for perturbation in perturbations}
    samples = {perturbation: sample for perturbation, sample in drawn.items() if sample is not None}
    return Drawn(identity, _draw_controls(sides, identity, rows, protocol), samples)


def _draw_controls(sides: Sides, identity: str, rows: ControlRows, protocol: Protocol) -> Controls:
    most, real = protocol.max_cells_per_condition, sides.real
    halves = tuple(_group(real.counts[half[:most]], protocol) for half in (rows.first, rows.second))
    truth, ceiling = halves
    if not protocol.split_controls:
        together = protocol.rng("all controls", identity).permutation(np.concatenate([rows.first, rows.second]))
        truth = ceiling = _group(real.counts[together[:most]], protocol)
    generated, copied = None, False
    found = sides.predicted.rows.get((identity, protocol.control), np.empty(0, dtype=np.intp))
    if len(found) >= LEAST_CELLS:
        chosen = protocol.rng("predicted controls", identity).permutation(found)[:most]
        cells, everything = sides.predicted.counts[chosen], real.counts[real.rows[identity, protocol.control]]
        prints = (memorisation.cell_fingerprints(counts) for counts in (cells, everything))
        copied = 2 * memorisation.n_copies(*prints) >= len(chosen)
        generated = None if copied else _group(cells, protocol)
    judged = generated if protocol.use_predicted_controls and generated is not None else ceiling
    return Controls(truth, judged, ceiling, halves, generated, copied, rows.unseen)


def _draw_sample(sides: Sides, condition: Condition, protocol: Protocol) -> Sample | None:
    real, predicted = sides
    most, rng = protocol.max_cells_per_condition, protocol.rng(*condition)
    rows, asked = rng.permutation(real.rows[condition]), rng.permutation(predicted.rows[condition])
    truth, others = np.array_split(rows, 2) if protocol.ceiling else (rows, rows)
    m = min(len(others), len(asked), most)
    if min(m, len(truth)) < LEAST_CELLS:
        return None
    return Sample(
        truth=_group(real.counts[truth[:most]], protocol),
        judged=_group(predicted.counts[asked[:m]], protocol),
        ceiling=_group(real.counts[others[:m]], protocol) if protocol.ceiling else None,
    )


def called(condition: Condition) -> str:
    """Name a condition in messages."""
    return " / ".join(part for part in condition if part)


def _group(counts: sp.csr_matrix, protocol: Protocol) -> Group:
    expression = embedding.log_normalise(counts, protocol.target_sum)
    return Group(counts, expression, responses.gene_statistics(expression))
