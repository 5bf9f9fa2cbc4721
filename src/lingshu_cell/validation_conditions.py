"""How well a network in training foretells conditions held out for validation, without generating a cell.

With all genes hidden a denoiser states the mean of every gene: under a perturbation and under control, hence a log fold
change, to be compared with the measured one.

Shapes: B cells, K validation conditions, G modelled genes, C condition fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from lingshu_cell.checkpoint import holds_step, mark_best, read_best
from lingshu_cell.conditioning import Conditioner, standard_doses
from lingshu_cell.conditioning_of_cells import read_through
from lingshu_cell.data.condition_rows import ConditionRows
from lingshu_cell.data.positions import pieces
from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.data.training_set import TrainingCells
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.expected_effects import with_expected_effects
from lingshu_cell.history import RunTable
from lingshu_cell.network.distribution import Denoise
from lingshu_cell.network.stated_means import stated_log_shares

FILE = "conditions.csv"
_COLUMNS = ("step", "condition", "r", "slope", "explained")
_TARGET_SUM = 1e4
_PSEUDOCOUNT = 0.5  # counts in 10,000: folds of genes hardly seen are noise
_LEAST_CELLS = 8  # perturbed and control cells of a condition, for its folds to be measured
_MOST_CELLS = 128  # for the NELBO, spread over the conditions
_N_MASKS = 2


@dataclass(frozen=True)
class Score:
    """Predicted log fold changes p against measured ones m, over genes.

    Attributes
    ----------
    r
        Their Pearson correlation.
    slope
        Σ p² / Σ p m: how much larger predicted changes are; noise in m does not bias it. ``None`` where they have
        nothing in common.
    explained
        1 - Σ (m - p)² / Σ m²: 1 is perfect, 0 as good as predicting no change.
    """

    r: float
    slope: float | None
    explained: float


def compare(predicted_G: np.ndarray, measured_G: np.ndarray) -> Score:
    """Compare predicted with measured log fold changes."""
    joint, size = float(predicted_G @ measured_G), float(predicted_G @ predicted_G)
    p, m = predicted_G - predicted_G.mean(), measured_G - measured_G.mean()
    r = float(p @ m / max(np.sqrt((p @ p) * (m @ m)), 1e-12))
    explained = 1 - float(((measured_G - predicted_G) ** 2).sum()) / max(float(measured_G @ measured_G), 1e-12)
    return Score(r, size / joint if joint > 0 else None, explained)


@dataclass(eq=False)
class ValidationConditions:
    """The validation conditions of a run, and the best step so far.

    Attributes
    ----------
    conditioner
        That of the run, with the effects expected of these conditions.
    names, row_KC, dose_K
        Label, condition row and mean standardised dose of each.
    measured_KG
        Measured log fold changes against control cells of the same identity.
    tokens, cell_row_BC, cell_dose_B
        Perturbed validation cells: expression tokens B × G, condition rows, doses.
    best, best_step
        Score of the best step, the mean of ``explained``, and the step.
    """

    conditioner: Conditioner
    names: tuple[str, ...]
    row_KC: np.ndarray
    dose_K: np.ndarray
    measured_KG: np.ndarray
    tokens: np.ndarray
    cell_row_BC: np.ndarray
    cell_dose_B: np.ndarray
    best: float | None = None
    best_step: int | None = None

    @classmethod
    def of(cls, cells: TrainingCells, conditioner: Conditioner) -> "ValidationConditions | None":
        """Find the perturbed conditions that validation cells have and training cells do not; ``None`` where there are
        none with enough cells, and control cells, to measure anything.
        """
        if conditioner.perturbation_key is None or not len(cells.validation):
            return None
        known_RC, _ = cells.condition_frequencies()
        row_RC, _ = cells.condition_frequencies(cells.validation)
        row_RC = row_RC[conditioner.is_perturbed(row_RC)]
        known = {tuple(row) for row in known_RC.tolist()}
        row_RC = row_RC[[tuple(row) not in known for row in row_RC.tolist()]].reshape(-1, row_RC.shape[1])
        if not len(row_RC):
            return None
        sums = _LogMeans(row_RC, conditioner.as_control(row_RC), len(cells.modelled))
        for part in (cells.validation, cells.seen):
            read_through(cells, part, [sums])
        enough = np.flatnonzero(sums.n_cells.min(0) >= _LEAST_CELLS)
        if not len(enough):
            return None
        chosen, doses = _cells_of(cells, row_RC), []
        for of_row in chosen:
            dose_B = _doses_of(cells, of_row, conditioner)
            doses.append(0.0 if dose_B is None else float(dose_B.mean()))
        row_KC, each = row_RC[enough], max(_MOST_CELLS // len(enough), 1)
        some = np.concatenate([chosen[k][:: -(-len(chosen[k]) // each)] for k in enough])
        extended, _ = with_expected_effects(conditioner, row_KC, known_RC)
        labels = extended.vocabulary.decode(row_KC).astype(str).to_numpy()
        rows, dose_B = cells.rows(some), _doses_of(cells, some, conditioner)
        log_mean_2RG = sums.log_means()
        return cls(
            extended,
            tuple(" / ".join(one) for one in labels),
            row_KC,
            np.array(doses)[enough],
            (log_mean_2RG[0] - log_mean_2RG[1])[enough],
            rows.tokens_BG,
            rows.condition_BC,
            np.zeros(len(some)) if dose_B is None else dose_B,
        )

    def scores(self, denoise: Denoise, device: torch.device) -> list[Score]:
        """Score every condition; the network is in evaluation mode."""
        count_V, found = torch.from_numpy(token_midpoints()).float().to(device), []
        for row_C, dose, measured_G in zip(self.row_KC, self.dose_K, self.measured_KG, strict=True):
            both = np.stack([row_C, self.conditioner.as_control(row_C[None])[0]])
            told = self.conditioner.conditions(both, dose_N=np.array([dose, 0.0])).to(device)
            asked = denoise, told, len(measured_G), count_V, _PSEUDOCOUNT / _TARGET_SUM
            perturbed_G, control_G = stated_log_shares(*asked)
            found.append(compare(perturbed_G - control_G, measured_G))
        return found

    @torch.no_grad()
    def nelbo(self, denoise: Denoise, device: torch.device) -> float:
        """Estimate the NELBO of cells of these conditions, nats per cell, always under the same masks."""
        generator = torch.Generator(device).manual_seed(2)
        told = self.conditioner.conditions(self.cell_row_BC, dose_N=self.cell_dose_B).to(device)
        x_0_BG = torch.from_numpy(self.tokens).to(device)
        return float(validation_nelbo(denoise, x_0_BG, told, generator, _N_MASKS).mean())

    def measure(self, denoise: Denoise, device: torch.device) -> tuple[list[Score], float]:
        """Score all conditions, and give the NELBO of their cells; the network is in evaluation mode."""
        return self.scores(denoise, device), self.nelbo(denoise, device)

    def take_in(self, step: int, measured: tuple[list[Score], float]) -> tuple[dict[str, float], bool]:
        """Remember the best step by what :meth:`measure` gave.

        Returns
        -------
        tuple
            Columns of history.csv, and whether no step before was better.
        """
        scores, nelbo = measured
        slopes = [score.slope for score in scores if score.slope is not None]
        score = float(np.mean([one.explained for one in scores]))
        improved = self.best is None or score > self.best
        if improved:
            self.best, self.best_step = score, step
        return {
            "condition_nelbo": nelbo,
            "condition_r": float(np.mean([one.r for one in scores])),
            "condition_slope": float(np.mean(slopes)) if slopes else None,
            "condition_explained": score,
        }, improved

    def begin(self, run: Path, step: int, best: Mapping[str, Any] | None, keep_best: bool) -> None:
        """Begin the tables of a run, or go on from a step: forget what was measured after it.

        Parameters
        ----------
        run
            The run folder.
        step
            Where the run goes on; 0 for a new one.
        best
            What :meth:`best_so_far` said at that step.
        keep_best
            Mark it, if the run ended before it was marked.
        """
        self._table = RunTable(run / FILE, _COLUMNS, step, texts=("condition",))
        if best is not None and keep_best and holds_step(run, best["step"]):
            marked = read_best(run)
            if marked is None or marked["step"] != best["step"]:
                mark_best(run, best["step"], self._facts(best["condition_explained"]))

    def keep(self, run: Path) -> None:
        """Say that the best checkpoint, which was just measured and saved, is the best."""
        mark_best(run, self.best_step, self._facts(self.best))

    def best_so_far(self) -> dict[str, Any] | None:
        """Give step and score of the best, for the manifest."""
        return None if self.best is None else {"step": self.best_step, "condition_explained": self.best}

    def write(self, step: int, measured: tuple[list[Score], float]) -> None:
        """Append what :meth:`measure` gave to ``RUN/conditions.csv``."""
        self._table.add(
            *(
                {"step": step, "condition": name, "r": s.r, "slope": s.slope, "explained": s.explained}
                for name, s in zip(self.names, measured[0], strict=True)
            )
        )

    def _facts(self, score: float) -> dict[str, Any]:
        return {"condition_explained": score, "conditions": list(self.names)}


def _cells_of(cells: TrainingCells, row_RC: np.ndarray) -> list[np.ndarray]:
    """Find the validation cells of each condition row."""
    rows, found = ConditionRows(row_RC), [[] for _ in row_RC]
    for piece in pieces(cells.validation):
        row_B = rows.find(cells.condition_rows(piece))
        for i in np.unique(row_B[row_B >= 0]):
            found[i].append(piece[row_B == i])
    return [np.concatenate(parts) for parts in found]


def _doses_of(cells: TrainingCells, some: np.ndarray, conditioner: Conditioner) -> np.ndarray | None:
    return standard_doses(cells.doses(some), cells.condition_rows(some), conditioner)


class _LogMeans:
    """Mean counts in 10,000 of conditions and of their control cells, each cell weighing the same."""

    def __init__(self, row_RC: np.ndarray, control_RC: np.ndarray, n_genes: int) -> None:
        self._rows = [{tuple(row): i for i, row in enumerate(row_RC.tolist())}]
        self._control_IC, self._identity_of = np.unique(control_RC, axis=0, return_inverse=True)
        self._rows.append({tuple(row): i for i, row in enumerate(self._control_IC.tolist())})
        self._sums = [np.zeros((len(of), n_genes)) for of in self._rows]
        self._n_used, self._n_cells = ([np.zeros(len(of), dtype=np.int64) for of in self._rows] for _ in range(2))

    @property
    def n_cells(self) -> np.ndarray:
        """Perturbed and control cells of each condition, 2 × R."""
        return np.stack([self._n_cells[0], self._n_cells[1][self._identity_of.reshape(-1)]])

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """Say which cells are of a condition, or of its control cells."""
        return np.max(self._places(condition_BC), axis=0) >= 0

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Take in cells."""
        totals = np.asarray(counts.sum(1)).ravel().astype(np.float64)
        weight = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        for which, place_B in enumerate(self._places(condition_BC)):
            for i in np.unique(place_B[place_B >= 0]):
                mine = place_B == i
                self._sums[which][i] += counts[mine].T @ weight[mine]
                self._n_used[which][i] += np.count_nonzero(weight[mine])
                self._n_cells[which][i] += mine.sum()

    def log_means(self) -> np.ndarray:
        """Give the logs of the means of each condition and of its control cells, 2 × R × G."""
        perturbed, control = (
            np.log(total / np.maximum(n, 1)[:, None] + _PSEUDOCOUNT)
            for total, n in zip(self._sums, self._n_used, strict=True)
        )
        return np.stack([perturbed, control[self._identity_of.reshape(-1)]])

    def _places(self, condition_BC: np.ndarray) -> np.ndarray:
        """Place of each cell's row among the conditions, and among their control rows; -1 where it has none."""
        rows = [tuple(row) for row in condition_BC.tolist()]
        return np.array([[of.get(row, -1) for row in rows] for of in self._rows])
