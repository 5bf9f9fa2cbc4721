"""Cell states: groups of similar training cells, as conditions that are drawn before library size and genes.

What many genes share would otherwise have to be found again, gene by gene, from those already drawn; a state says the
coarse part of it at once, and a programme, how a cell differs from the middle of its state, says more of it
(docs/decisions/0011-state-first.md). Together they are a vector quantisation of principal components in two stages.

Shapes: N cells, G modelled genes, H variable genes among them, Q principal components, K states, L programmes.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from lingshu_cell.errors import LingshuError
from lingshu_cell.tokens import STATE_FIELDS

_MOST_STATES, _CELLS_OF_A_STATE, _FEWEST_STATES = 64, 100, 8
_LEAST_CELLS = 20  # a state of fewer would be a portrait of its cells
FEWEST_GENES = 200
_MOST_GENES, _MOST_COMPONENTS = 2000, 20
_TARGET_SUM = 1e4
_LEAST_DETECTIONS, _BINS_OF_MEAN = 3, 20
_MOST_DEVIATIONS, _LEAST_VARIANCE = 10.0, 1e-9


@dataclass(frozen=True, eq=False)
class CellStates:
    """Which state a cell is in: the nearest of K centres in the space of scaled principal components; and in which
    programme: the nearest of L offsets to what is left, the same in all states.

    Attributes
    ----------
    gene_H
        Variable genes, as indices of the modelled ones, int64.
    mean_H, sd_H
        Of log(1 + counts per 10,000) over the cells they were learned from, float64.
    axes_HQ
        Principal axes, each over the square root of its component's standard deviation, so that weak ones are heard.
    centre_KQ
        Centres, those of the most cells first.
    offset_LQ
        Offsets from a centre, likewise; there may be none.
    """

    gene_H: np.ndarray
    mean_H: np.ndarray
    sd_H: np.ndarray
    axes_HQ: np.ndarray
    centre_KQ: np.ndarray
    offset_LQ: np.ndarray

    def __len__(self) -> int:
        return len(self.centre_KQ)

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        """Condition fields and their labels: 01, 02, …"""
        sizes = zip(STATE_FIELDS, (len(self.centre_KQ), len(self.offset_LQ)), strict=True)
        return {field: tuple(f"{k + 1:0{max(2, len(str(n)))}}" for k in range(n)) for field, n in sizes if n}

    def of(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Give the state of each cell; see :meth:`nearest`.

        Parameters
        ----------
        counts
            UMI counts of the modelled genes, shape [N, G].
        """
        return self.nearest(self.scores(counts))

    def scores(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Give where each cell lies in the space of the centres, float64, N × Q."""
        log_NH, at_zero_H = _log_shares(counts, self.gene_H), self.mean_H / self.sd_H
        deviation_M = (log_NH.data - self.mean_H[log_NH.indices]) / self.sd_H[log_NH.indices]
        log_NH.data = np.minimum(deviation_M, _MOST_DEVIATIONS) + at_zero_H[log_NH.indices]
        return log_NH @ self.axes_HQ - at_zero_H @ self.axes_HQ

    def nearest(self, score_NQ: np.ndarray) -> np.ndarray:
        """Give the state of what lies there, 1 … K, and where there are programmes that, 1 … L, int64, N × 1 or 2."""
        state_N = _nearest(self.centre_KQ, score_NQ)
        if not len(self.offset_LQ):
            return 1 + state_N[:, None]
        return 1 + np.stack([state_N, _nearest(self.offset_LQ, score_NQ - self.centre_KQ[state_N])], axis=1)

    def checked(self, n_genes: int) -> "CellStates":
        """Refuse arrays that do not belong together or to a model of so many genes."""
        h, q = self.axes_HQ.shape
        whole = self.gene_H.dtype.kind == "i" and self.gene_H.shape == self.mean_H.shape == self.sd_H.shape == (h,)
        whole = whole and all(points.ndim == 2 and points.shape[1] == q for points in (self.centre_KQ, self.offset_LQ))
        if not (whole and len(self)):
            raise ValueError("cell states of other types or shapes")
        finite = all(np.isfinite(array).all() for array in vars(self).values())
        if not (finite and ((self.gene_H >= 0) & (self.gene_H < n_genes)).all() and (self.sd_H > 0).all()):
            raise ValueError("cell states out of range")
        return self


def number_of_states(asked: int | str, n_cells: int, kind: str = "training cells") -> int:
    """Say how many states so many training cells are grouped into; 0 = none.

    Parameters
    ----------
    asked
        A number, or ``"auto"``: one for each 100 cells, 8 to 64; none for fewer than 800 cells.
    n_cells
        Cells that states are learned from.
    kind
        What these are.

    Raises
    ------
    LingshuError
        If each state asked for would have fewer than 20 cells.
    """
    if asked == "auto":
        n_states = min(n_cells // _CELLS_OF_A_STATE, _MOST_STATES)
        return n_states if n_states >= _FEWEST_STATES else 0
    if asked and int(asked) * _LEAST_CELLS > n_cells:
        raise LingshuError(
            f"A cell state needs {_LEAST_CELLS} {kind}",
            f"{asked} states of {n_cells:,} {kind}",
            f"Ask for {n_cells // _LEAST_CELLS} or fewer with data.states, or for none (0)",
        )
    return int(asked)


def learn_states(counts: sparse.csr_matrix, n_states: int, seed: int, usable_G: np.ndarray | None = None) -> CellStates:
    """Group cells by k-means over principal components of their variable genes, and what is left in each once more.

    One thread computes it, so that all processes of a run find the same.

    Parameters
    ----------
    counts
        UMI counts of the modelled genes, shape [N, G].
    n_states
        How many groups to look for, and half as many programmes; those of fewer than 20 cells are given to their
        neighbours.
    seed
        Of k-means.
    usable_G
        Genes that may be used, boolean; all when not given.

    Returns
    -------
    CellStates
        With ``n_states`` states or fewer; none where fewer than 200 genes vary, or all cells are alike.
    """
    from sklearn.decomposition import PCA

    with threadpool_limits(1):
        gene_H = _variable_genes(counts, usable_G)
        log_NH = _log_shares(counts, gene_H).toarray()
        mean_H, sd_H = log_NH.mean(0), log_NH.std(0)
        gene_H, log_NH, mean_H, sd_H = gene_H[sd_H > 0], log_NH[:, sd_H > 0], mean_H[sd_H > 0], sd_H[sd_H > 0]
        nothing = CellStates(gene_H, mean_H, sd_H, np.zeros((len(gene_H), 0)), np.zeros((0, 0)), np.zeros((0, 0)))
        if len(gene_H) < FEWEST_GENES:
            return nothing
        z_NH = np.minimum((log_NH - mean_H) / sd_H, _MOST_DEVIATIONS)
        pca = PCA(min(_MOST_COMPONENTS, len(z_NH) - 1), svd_solver="randomized", random_state=seed).fit(z_NH)
        heard = pca.explained_variance_ > _LEAST_VARIANCE * pca.explained_variance_[0]
        axes_HQ = pca.components_[heard].T / pca.explained_variance_[heard] ** 0.25
        score_NQ = z_NH @ axes_HQ  # not centred again: clipping moved the means a little
        centre_KQ = _groups(score_NQ, n_states, seed)
        if not len(centre_KQ):
            return nothing
        left_NQ = score_NQ - centre_KQ[_nearest(centre_KQ, score_NQ)]
        varies = left_NQ.var(0).sum() > _LEAST_VARIANCE * score_NQ.var(0).sum()
        offset_LQ = _groups(left_NQ, n_states // 2, seed) if varies and n_states >= 4 else left_NQ[:0]
        return CellStates(gene_H, mean_H, sd_H, axes_HQ, centre_KQ, offset_LQ if len(offset_LQ) > 1 else left_NQ[:0])


def _groups(point_NQ: np.ndarray, n_groups: int, seed: int) -> np.ndarray:
    """Centres of k-means that have 20 points or more, those of the most points first."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different cells than groups
        found = KMeans(n_groups, n_init=5, random_state=seed).fit(point_NQ)
    n_K = np.bincount(found.labels_, minlength=n_groups)
    order_K = np.argsort(-n_K, kind="stable")
    return found.cluster_centers_[order_K[n_K[order_K] >= _LEAST_CELLS]]


def _nearest(centre_KQ: np.ndarray, point_NQ: np.ndarray) -> np.ndarray:
    return np.argmin((centre_KQ**2).sum(1) - 2 * point_NQ @ centre_KQ.T, axis=1)


def _variable_genes(counts: sparse.csr_matrix, usable_G: np.ndarray | None) -> np.ndarray:
    """Indices of the genes, rising, whose log expression varies most beyond the median of genes of like mean."""
    usable = np.arange(counts.shape[1]) if usable_G is None else np.flatnonzero(usable_G)
    usable = usable[np.asarray((counts[:, usable] > 0).sum(0)).ravel() >= _LEAST_DETECTIONS]
    if len(usable) <= _MOST_GENES:
        return usable
    log = _log_shares(counts, usable)
    mean = np.asarray(log.mean(0)).ravel()
    variance = np.asarray(log.power(2).mean(0)).ravel() - mean**2
    beyond = np.log(np.maximum(variance, 1e-12)) - np.log(mean)
    for like in np.array_split(np.argsort(mean), _BINS_OF_MEAN):
        spread = np.median(np.abs(beyond[like] - np.median(beyond[like])))
        beyond[like] = (beyond[like] - np.median(beyond[like])) / max(spread, 1e-12)
    return usable[np.sort(np.argsort(-beyond, kind="stable")[:_MOST_GENES])]


def _log_shares(counts: sparse.csr_matrix, gene_H: np.ndarray) -> sparse.csr_matrix:
    """log(1 + counts per 10,000) of some genes, CSR, N × H."""
    place_G = np.full(counts.shape[1], -1, dtype=np.int32)
    place_G[gene_H] = np.arange(len(gene_H))
    total_N = np.maximum(np.asarray(counts.sum(1), dtype=np.float64).ravel(), 1.0)
    place_M = place_G[counts.indices]
    used = np.flatnonzero(place_M >= 0)
    starts_N = np.searchsorted(used, counts.indptr)
    log_M = np.log1p(counts.data[used] * np.repeat(_TARGET_SUM / total_N, np.diff(starts_N)))
    return sparse.csr_matrix((log_M, place_M[used], starts_N), shape=(counts.shape[0], len(gene_H)))
