"""What training says of conditions, added up while cells pass by once: no more is held than the sums.

Shapes: B cells of a piece, G modelled genes, C condition fields, I identities, K profiles, R condition rows.
"""

from typing import Protocol

import numpy as np
from scipy import sparse

from lingshu_cell.data.condition_rows import ConditionRows

_MOST_LIBRARIES = 8192  # of a condition row: so many are as good as all
_MOST_PENDING = 1 << 20


class Taker(Protocol):
    """Something that takes in cells piece by piece."""

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """Say which cells it must be shown, boolean, B; others may come too."""

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Take in cells: counts of the modelled genes, their exact sums, condition rows."""


class ContextSums:
    """Sums over control cells by identity: over all of them, and over random parts.

    Parameters
    ----------
    identity_IC, n_I
        Identities, as condition rows with 0 in the perturbation field, and how many control cells each has.
    perturbation_field
        Column of the perturbations in a condition row.
    control
        Index of control in that field.
    n_genes
        G.
    least_cells
        Identities of fewer control cells get no profile.
    n_parts
        Random parts of each identity.
    part_cells
        Least and most cells of a part; their number is log-uniform in between.
    seed
        Seed of the parts.

    Attributes
    ----------
    known_IC
        The identities that get profiles.
    sum_KJG, n_K
        For each of them, one after the other, all its cells and then each part: cells that detect a gene and sum of
        log(1 + count), and the number of cells.
    overall_JG, n_cells
        The same over all control cells.
    """

    def __init__(
        self,
        identity_IC: np.ndarray,
        n_I: np.ndarray,
        perturbation_field: int,
        control: int,
        n_genes: int,
        *,
        least_cells: int,
        n_parts: int,
        part_cells: tuple[int, int],
        seed: int,
    ) -> None:
        self._field, self._control = perturbation_field, control
        enough = np.flatnonzero(n_I >= least_cells)
        self.known_IC, self.n_parts = identity_IC[enough], n_parts
        self._identities = ConditionRows(self.known_IC)
        rng, low, high = np.random.default_rng(seed), *np.log(part_cells)
        self.n_K = np.zeros(len(enough) * (1 + n_parts), dtype=np.int64)
        rank, profile, bounds = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
        for i, n in enumerate(n_I[enough].tolist()):
            first = i * (1 + n_parts)
            self.n_K[first] = n
            ranks = []
            for k in range(first + 1, first + 1 + n_parts):
                self.n_K[k] = min(int(np.exp(rng.uniform(low, high))), n)
                ranks.append(rng.choice(n, self.n_K[k], replace=False))
            of_part = np.repeat(np.arange(first + 1, first + 1 + n_parts), self.n_K[first + 1 : first + 1 + n_parts])
            order = np.argsort(np.concatenate(ranks), kind="stable")
            rank.append(np.concatenate(ranks)[order])
            profile.append(of_part[order])
            bounds.append(bounds[-1] + len(order))
        self._rank, self._profile, self._bounds = np.concatenate(rank), np.concatenate(profile), bounds
        self._n_taken = np.zeros(len(enough), dtype=np.int64)
        self.sum_KJG = np.zeros((len(self.n_K), 2, n_genes))
        self.overall_JG, self.n_cells = np.zeros((2, n_genes)), 0

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """Control cells."""
        return condition_BC[:, self._field] == self._control

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Take in cells, which come in the same order whenever this is repeated."""
        here = np.flatnonzero(self.wants(condition_BC))
        if not len(here):
            return
        counts, identity_BC = counts[here], condition_BC[here]
        identity_BC[:, self._field] = 0
        seen = counts.copy()
        seen.data = np.ones(len(seen.data))
        logs = counts.copy()
        logs.data = np.log1p(counts.data).astype(np.float64)
        self.overall_JG += np.stack([np.asarray(one.sum(0)).ravel() for one in (seen, logs)])
        self.n_cells += len(here)
        identity_B = self._identities.find(identity_BC)
        cell, profile = [], []
        for i in np.unique(identity_B[identity_B >= 0]):
            mine = np.flatnonzero(identity_B == i)
            cell.append(mine)
            profile.append(np.full(len(mine), i * (1 + self.n_parts)))
            ranks = self._rank[self._bounds[i] : self._bounds[i + 1]]
            a, b = np.searchsorted(ranks, (self._n_taken[i], self._n_taken[i] + len(mine)))
            cell.append(mine[ranks[a:b] - self._n_taken[i]])
            profile.append(self._profile[self._bounds[i] + a : self._bounds[i] + b])
            self._n_taken[i] += len(mine)
        if not cell:
            return
        there, place = np.unique(np.concatenate(profile), return_inverse=True)
        to_profile = sparse.csr_matrix(
            (np.ones(len(place)), (place, np.concatenate(cell))), shape=(len(there), len(here))
        )
        for j, values in enumerate((seen, logs)):
            self.sum_KJG[there, j] += (to_profile @ values).toarray()


class LibrarySample:
    """Library sizes of the cells of each condition row: all of them, or about 8,192 at random of a row that has more.

    Parameters
    ----------
    condition_RC
        The condition rows.
    n_R
        How many cells each has.
    seed
        Seed of the part.
    """

    def __init__(self, condition_RC: np.ndarray, n_R: np.ndarray, seed: int) -> None:
        self._rows = ConditionRows(condition_RC)
        self._share_R = np.minimum(1.0, _MOST_LIBRARIES / np.maximum(n_R, 1))
        self._rng, self._choice = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
        self._taken: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, keys, library sizes
        self._n_pending = 0

    def wants(self, condition_BC: np.ndarray) -> np.ndarray:
        """Random cells, so that few have to be read of a row that has many."""
        if (self._share_R == 1).all():
            return np.ones(len(condition_BC), dtype=bool)
        return self._choice.random(len(condition_BC)) < self._share_R[self._rows.find(condition_BC)]

    def add(self, counts: sparse.csr_matrix, library_B: np.ndarray, condition_BC: np.ndarray) -> None:
        """Take in cells, also those that somebody else wanted."""
        self._taken.append((self._rows.find(condition_BC), self._rng.random(len(library_B)), library_B))
        self._n_pending += len(library_B)
        if self._n_pending > max(_MOST_PENDING, len(self._taken[0][0])):
            self._prune()

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Give how many library sizes of each row there are, R, and these, rising in each row, int64, M."""
        self._prune()
        row_M, _, library_M = self._taken[0]
        return np.bincount(row_M, minlength=len(self._rows)), library_M[np.lexsort((library_M, row_M))]

    def _prune(self) -> None:
        """Keep those of the smallest keys in each row."""
        row_M, key_M, library_M = (np.concatenate(parts) for parts in zip(*self._taken, strict=True))
        order = np.lexsort((key_M, row_M))
        row_M = row_M[order]
        kept = np.arange(len(row_M)) - np.searchsorted(row_M, row_M) < _MOST_LIBRARIES
        self._taken = [(row_M[kept], key_M[order][kept], library_M[order][kept].astype(np.int64))]
        self._n_pending = 0


class Tally:
    """How often each value occurred, for the exact median of values too many to hold."""

    def __init__(self) -> None:
        self._values, self._n = np.empty(0), np.empty(0, dtype=np.int64)
        self._pending: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Take in values."""
        self._pending.append(np.asarray(values, dtype=np.float64))
        if sum(map(len, self._pending)) > _MOST_PENDING:
            self._merge()

    def median(self) -> float:
        """Give the median, NaN of nothing."""
        self._merge()
        ends = np.cumsum(self._n)
        if not len(ends):
            return float("nan")
        middle = self._values[np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")]
        return float(middle.mean())

    def _merge(self) -> None:
        if not self._pending:
            return
        values, n = np.unique(np.concatenate(self._pending), return_counts=True)
        both, place = np.unique(np.concatenate([self._values, values]), return_inverse=True)
        self._n = np.bincount(place, np.concatenate([self._n, n]), len(both)).astype(np.int64)
        self._values, self._pending = both, []
