"""From training cells to the conditioner of a run: one pass that measures contexts, effects and library sizes.

Shapes: R condition rows, C condition fields, B cells of a piece, G modelled genes, J numbers per gene.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse

from lingshu_cell.conditioning import (
    CELLS_OF_OVERALL,
    LEAST_CONTEXT_CELLS,
    Conditioner,
    ContextTable,
    DepthTable,
    EffectTable,
    scaled_rows,
)
from lingshu_cell.config import Config
from lingshu_cell.data.condition_labels import canonical_name
from lingshu_cell.data.condition_rows import ConditionRows
from lingshu_cell.data.condition_sums import ContextSums, LibrarySample, Taker
from lingshu_cell.data.effects import GroupSums, effects_of_sums
from lingshu_cell.data.gene_embeddings import concatenate, read_embeddings
from lingshu_cell.data.perturbations import PerturbationVocabulary, check_log_doses
from lingshu_cell.data.positions import pieces
from lingshu_cell.data.prior_effects import prior_effects
from lingshu_cell.data.training_set import TrainingCells
from lingshu_cell.errors import LingshuError, offenders

_MOST_CONTEXT_DRAWS = 16
_MOST_PROFILES = 512  # of all identities together: memory is this times twice the genes
_CONTEXT_CELLS = (32, 256)  # control cells behind one context; fewer are noisy, more teach nothing about noise
_CELLS_AT_ONCE = 4096


def build_conditioner(cells: TrainingCells, config: Config) -> Conditioner:
    """Make the conditioner of a training run.

    Parameters
    ----------
    cells
        The training set; its perturbation labels are the last condition field.
    config
        All settings. The paper's transformer takes perturbation labels as plain categories.

    Raises
    ------
    LingshuError
        If the paper's network is asked for what it cannot be told, or labels cannot be taken apart.
    """
    data = config.data
    if config.network.kind == "transformer":
        asked = [name for name in ("dose_key", "embeddings") if getattr(data, name)] + ["depth"] * config.has_depth
        if asked:
            raise LingshuError(
                "The paper's network knows categories only",
                f"data.{asked[0]} is set",
                "Leave it out, or take --preset small",
            )
        if data.perturbation_key is None:
            return Conditioner(cells.conditions, states=cells.states)
        labels = cells.conditions.fields[data.perturbation_key]
        known = PerturbationVocabulary.from_labels(labels, data.control, separator="")
        return Conditioner(cells.conditions, data.perturbation_key, known, as_category=True)
    conditioner = Conditioner(cells.conditions, states=cells.states)
    if data.perturbation_key is None:
        return _with_tables(conditioner, cells, config)
    labels = cells.conditions.fields[data.perturbation_key]
    known = PerturbationVocabulary.from_labels(labels, data.control, data.combination_separator)
    conditioner = replace(conditioner, perturbation_key=data.perturbation_key, perturbations=known)
    if data.dose_key is not None:
        mean, sd = _dose_scale(cells, conditioner)
        conditioner = replace(conditioner, dose_mean=mean, dose_sd=sd)
    if data.embeddings:
        embeddings = concatenate([read_embeddings(path) for path in data.embeddings])
        vectors, found = scaled_rows(embeddings, known.names[1:])
        if not found.any():
            raise LingshuError(
                "Embeddings must be those of the perturbations",
                f"none of {offenders(known.names[1:])} is in {offenders(data.embeddings)}",
                "Name them as the perturbations are named",
            )
        control_1Q = np.zeros((1, embeddings.n_dimensions), np.float32)
        conditioner = replace(conditioner, embeddings=embeddings, embedding_PQ=np.concatenate([control_1Q, vectors]))
    return _with_tables(conditioner, cells, config)


def _with_tables(conditioner: Conditioner, cells: TrainingCells, config: Config) -> Conditioner:
    """Add what is measured in the cells, each of which is read once and forgotten."""
    data, seed, field = config.data, config.training.seed, conditioner.perturbation_field
    row_RC, n_R = cells.condition_frequencies(cells.seen)
    libraries = LibrarySample(row_RC, n_R, seed) if config.has_depth else None
    contexts, effects, n_genes = None, None, len(cells.modelled)
    of_libraries, (row_RC, n_R) = row_RC, _states_open(conditioner, row_RC, n_R)
    if field is not None and data.context:
        contexts = _context_sums(conditioner, row_RC, n_R, n_genes, seed)
    if field is not None and data.prior_effects:
        effects = _EffectSums(conditioner, row_RC, n_genes)
    takers = [_StatesOpen(conditioner, one) for one in (contexts, effects) if one is not None]
    read_through(cells, cells.seen, ([] if libraries is None else [libraries]) + takers)
    if libraries is not None:
        conditioner = replace(conditioner, depths=DepthTable(of_libraries, *libraries.sizes()))
    if contexts is not None:
        conditioner = replace(conditioner, contexts=build_contexts(contexts))
    return conditioner if effects is None else _with_prior_effects(conditioner, cells, effects, seed)


def read_through(cells: TrainingCells, positions: np.ndarray | range, takers: Sequence[Taker]) -> None:
    """Show cells to takers, in pieces; counts are read only of cells that one of them wants."""
    for piece in pieces(positions, _CELLS_AT_ONCE) if takers else ():
        condition_BC = cells.condition_rows(piece)
        wanted = np.any([taker.wants(condition_BC) for taker in takers], axis=0)
        if wanted.any():
            counts, library_B = cells.counts_of(piece[wanted])
            for taker in takers:
                taker.add(counts, library_B, condition_BC[wanted])


def _states_open(conditioner: Conditioner, row_RC: np.ndarray, n_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Condition rows without the state of the cells, and how often each occurs."""
    opened_RC, place_R = np.unique(conditioner.states_open(row_RC), axis=0, return_inverse=True)
    return opened_RC, np.bincount(place_R.reshape(-1), weights=n_R, minlength=len(opened_RC)).astype(np.int64)


class _StatesOpen:
    """A taker that is not told the state of the cells."""

    def __init__(self, conditioner: Conditioner, taker: Taker) -> None:
        self._open, self._taker = conditioner.states_open, taker

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """What the taker wants."""
        return self._taker.wants(self._open(condition_BC))

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Hand over cells."""
        self._taker.add(counts, library_B, self._open(condition_BC))


class _EffectSums:
    """Sums over the cells of each identity and perturbation, in its canonical spelling: A+B is B+A."""

    def __init__(self, conditioner: Conditioner, row_RC: np.ndarray, n_genes: int) -> None:
        field, known = conditioner.perturbation_field, conditioner.perturbations
        labels = conditioner.vocabulary.fields[conditioner.perturbation_key]
        spelt = [canonical_name(label, known.separator, known.control) for label in labels]
        self.row_RC, self._rows = row_RC, ConditionRows(row_RC)
        names = conditioner.identity_names(row_RC)
        self.key_R = [(name, spelt[row[field] - 1]) for name, row in zip(names, row_RC, strict=True)]
        self.keys = sorted(set(self.key_R))
        place = {key: number for number, key in enumerate(self.keys)}
        self._group_R = np.array([place[key] for key in self.key_R])
        self.sums = GroupSums(len(self.keys), n_genes)

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """All cells."""
        return np.ones(len(condition_BC), dtype=bool)

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Take in cells."""
        self.sums.add(counts, self._group_R[self._rows.find(condition_BC)])


def _with_prior_effects(conditioner: Conditioner, cells: TrainingCells, sums: _EffectSums, seed: int) -> Conditioner:
    """Keep the effects measured in training cells: what training tells of them, and what others are foretold from."""
    prior = prior_effects(
        effects_of_sums(sums.sums, sums.keys, conditioner.perturbations.control),
        control=conditioner.perturbations.control,
        gene_names=[cells.vocabulary.names[g] for g in cells.modelled],
        embeddings=conditioner.embeddings,
        separator=conditioner.perturbations.separator,
        seed=seed,
    )
    effect_KG, found = prior.measured_effects()
    if not found.any():
        return conditioner
    place = {condition: k for k, condition in enumerate(prior.conditions) if found[k]}
    effects, rows = [np.zeros_like(effect_KG[0])], [np.full_like(sums.row_RC[0], -1)]
    for row, key in zip(sums.row_RC, sums.key_R, strict=True):
        if key in place:
            effects.append(effect_KG[place[key]])
            rows.append(row)
    table = EffectTable(np.stack(effects), np.stack(rows))
    return replace(conditioner, effects=table, prior=prior)


def _dose_scale(cells: TrainingCells, conditioner: Conditioner) -> tuple[float, float]:
    """Mean and standard deviation of the log doses of perturbed training cells; refuses what is no dose."""
    n, first, second, origin = 0, 0.0, 0.0, None
    for part in (cells.validation, cells.train):
        for piece in pieces(part):
            log_dose = check_log_doses(cells.doses(piece)[conditioner.is_perturbed(cells.condition_rows(piece))])
            if part is cells.train and len(log_dose):
                origin = log_dose[0] if origin is None else origin  # about it, equal doses have no variance at all
                n += len(log_dose)
                first += float((log_dose - origin).sum())
                second += float(((log_dose - origin) ** 2).sum())
    if not n:
        return 0.0, 1.0
    sd = max(second / n - (first / n) ** 2, 0.0) ** 0.5
    return float(origin) + first / n, sd if sd > 1e-6 else 1.0  # one dose for all


def _context_sums(
    conditioner: Conditioner, row_RC: np.ndarray, n_R: np.ndarray, n_genes: int, seed: int
) -> ContextSums:
    """Prepare to average control cells of each identity: all of them, and random parts of 32 to 256 cells."""
    field, control = conditioner.perturbation_field, conditioner.perturbations.control
    index = 1 + conditioner.vocabulary.fields[conditioner.perturbation_key].index(control)
    of_control = row_RC[:, field] == index
    identity_IC = row_RC[of_control].copy()
    identity_IC[:, field] = 0
    order = np.lexsort(identity_IC.T[::-1])
    identity_IC, n_I = identity_IC[order], n_R[of_control][order]
    n_known = max(int((n_I >= LEAST_CONTEXT_CELLS).sum()), 1)
    return ContextSums(
        identity_IC, n_I, field, index, n_genes,
        least_cells=LEAST_CONTEXT_CELLS,
        n_parts=int(np.clip(_MOST_PROFILES // n_known - 1, 1, _MOST_CONTEXT_DRAWS)),
        part_cells=_CONTEXT_CELLS,
        seed=seed,
    )  # fmt: skip


def build_contexts(sums: ContextSums) -> ContextTable:
    """Average control cells of each identity; those of fewer than 8 control cells get no profile.

    The average over all identities counts like 4 more cells in each, so that no gene is certain to be silent.
    """
    n_each, n_known = 1 + sums.n_parts, len(sums.known_IC)
    overall_JG = (sums.overall_JG / max(sums.n_cells, 1)).astype(np.float32)
    n_K = (sums.n_K + CELLS_OF_OVERALL)[:, None, None]
    profile_KJG = ((sums.sum_KJG + CELLS_OF_OVERALL * overall_JG) / n_K).astype(np.float32)
    return ContextTable(
        np.concatenate([overall_JG[None], profile_KJG]),
        sums.known_IC,
        1 + n_each * np.arange(n_known, dtype=np.int64),
        np.full(n_known, n_each, dtype=np.int64),
    )
