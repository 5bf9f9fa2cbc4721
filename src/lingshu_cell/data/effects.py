"""Log fold changes of perturbations, with their sampling noise, and shrunk by it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lingshu_cell.data.condition_sums import Tally
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.tokens import EFFECT_PSEUDOCOUNT

_LEAST_VARIANCE = 1e-6
_NULL_PENALTY = 10.0
_GRID_STEPS_PER_OCTAVE = 1.5


@dataclass(frozen=True, eq=False)
class Effects:
    """Measured log fold changes of C conditions against the control cells of the same identity.

    Parameters
    ----------
    identities, perturbations
        Labels of every condition, C each; control is none of them.
    delta
        Natural-log fold changes, float16, shape [C, n_genes]; 0 for conditions that could not be measured.
    variance
        Their sampling variance, float16, shape [C, n_genes].
    n_cells
        Perturbed and control cells together as one number, 1 / (1/n_perturbed + 1/n_control), float32, shape [C]; 0
        where the identity has no control cells, so that nothing could be measured.
    profile_identities
        Identities with control cells, I of them.
    profiles
        Mean of their control cells, each normalised to ``target_sum``; float32, shape [I, n_genes].
    profile_variance
        Sampling variance of log(profile + ε), float16, shape [I, n_genes].
    target_sum
        Total every cell was normalised to: the median total.
    pseudocount
        ε of log(mean + ε), as a share of ``target_sum``.
    """

    identities: tuple[str, ...]
    perturbations: tuple[str, ...]
    delta: np.ndarray
    variance: np.ndarray
    n_cells: np.ndarray
    profile_identities: tuple[str, ...]
    profiles: np.ndarray
    profile_variance: np.ndarray
    target_sum: float
    pseudocount: float

    def log_profiles(self, profiles: np.ndarray | None = None) -> np.ndarray:
        """Give log(share + ε) of control profiles, or of others in any unit, float64, shape [I, n_genes]."""
        counts = (self.profiles if profiles is None else profiles).astype(np.float64)
        return np.log(counts / np.maximum(counts.sum(1, keepdims=True), 1e-12) + self.pseudocount)


def effects_of_sums(
    sums: "GroupSums", keys: Sequence[tuple[str, str]], control: str, pseudocount: float = EFFECT_PSEUDOCOUNT
) -> Effects:
    r"""Measure Δ_g = log(m_perturbed,g + ε) − log(m_control,g + ε) of every perturbed condition.

    m is the mean over cells of counts normalised to the median total s, and ε = ``pseudocount`` · s. So a gene that
    control cells hardly express is told by how much it rises, others by what factor. The sampling variance is
    Var(m) / (m + ε)², summed over both sides; Var(m) is that between cells, but at least the Poisson variance of
    m + ε, as a gene that no cell of a condition shows is not known to be silent.

    Parameters
    ----------
    sums
        Sums over the cells of each condition; they are used up.
    keys
        Identity and perturbation of each condition, sorted.
    control
        Label of control cells.
    pseudocount
        ε as a share of all counts, above 0.

    Returns
    -------
    Effects
        Conditions in the order of ``keys``. An identity without control cells is kept unmeasured, with a warning.

    Raises
    ------
    LingshuError
        If no identity has control cells, nothing is perturbed, or all counts are 0.
    """
    is_control = np.array([label == control for _, label in keys])
    if not is_control.any() or is_control.all():
        raise LingshuError(
            "Effects need control and perturbed cells",
            f"no cell is {control!r}" if not is_control.any() else f"every cell is {control!r}",
            f"Labels: {offenders(sorted({label for _, label in keys}))}",
        )
    sums = sums.normalised()
    n = np.maximum(sums.n_cells, 1)
    mean = sums.first / n[:, None]
    epsilon = pseudocount * sums.target_sum
    between_cells = (sums.second / n[:, None] - mean**2) / np.maximum(n - 1, 1)[:, None]
    poisson = (mean + epsilon) * (sums.per_umi / n**2)[:, None]
    variance = np.maximum(between_cells, poisson) / (mean + epsilon) ** 2
    log_mean = np.log(mean + epsilon)

    reference = {keys[place][0]: place for place in np.flatnonzero(is_control) if sums.n_cells[place] > 0}
    conditions = [place for place in range(len(keys)) if not is_control[place] and sums.n_cells[place] > 0]
    lonely = sorted({keys[place][0] for place in conditions} - set(reference))
    if lonely:
        warnings.warn(f"No effects can be measured without control cells: {offenders(lonely)}", stacklevel=2)
    delta = np.zeros((len(conditions), mean.shape[1]), dtype=np.float16)
    noise = np.full(delta.shape, np.float16(1.0))
    weight = np.zeros(len(conditions), dtype=np.float32)
    for c, place in enumerate(conditions):
        base = reference.get(keys[place][0])
        if base is not None:
            delta[c] = log_mean[place] - log_mean[base]
            noise[c] = np.maximum(variance[place] + variance[base], _LEAST_VARIANCE)
            weight[c] = 1 / (1 / sums.n_cells[place] + 1 / sums.n_cells[base])
    return Effects(
        identities=tuple(keys[place][0] for place in conditions),
        perturbations=tuple(keys[place][1] for place in conditions),
        delta=delta,
        variance=noise,
        n_cells=weight,
        profile_identities=tuple(reference),
        profiles=mean[list(reference.values())].astype(np.float32),
        profile_variance=variance[list(reference.values())].astype(np.float16),
        target_sum=sums.target_sum,
        pseudocount=pseudocount,
    )


def shrink(delta: np.ndarray, variance: np.ndarray, n_rounds: int = 200) -> np.ndarray:
    r"""Shrink effects by their noise: posterior means under a scale mixture of normals fitted to all genes.

    Δ_g ~ N(δ_g, v_g), δ_g ~ Σ_k π_k N(0, τ_k²) with τ_0 = 0 and a grid of others; π by EM with a pull towards τ_0.
    With a single τ the posterior mean is Δ τ² / (τ² + v); the mixture leaves strong effects of a few genes alone where
    most genes do nothing.

    Parameters
    ----------
    delta
        Measured effects, shape [n_genes].
    variance
        Their sampling variance, above 0, shape [n_genes].
    n_rounds
        Rounds of EM.

    Returns
    -------
    np.ndarray
        Shrunk effects, float64, shape [n_genes].

    References
    ----------
    Stephens 2017, False discovery rates: a new deal (adaptive shrinkage).
    """
    d, v = np.asarray(delta, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    highest = 2 * np.sqrt(max(float((d**2 - v).max()), float(v.min())))
    lowest = max(np.sqrt(float(v.min())) / 10, highest / 512)
    n_steps = 2 + int(np.ceil(max(0.0, np.log2(highest / lowest)) * _GRID_STEPS_PER_OCTAVE))
    tau_2 = np.concatenate([[0.0], np.geomspace(lowest, highest, n_steps) ** 2])
    total = v[:, None] + tau_2
    log_likelihood = -0.5 * (np.log(total) + d[:, None] ** 2 / total)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    pi = np.full(len(tau_2), 1 / len(tau_2))
    for _ in range(n_rounds):
        share = pi * (likelihood.T @ (1 / (likelihood @ pi)))
        share[0] += _NULL_PENALTY
        share /= share.sum()
        moved = np.abs(share - pi).max()
        pi = share
        if moved < 1e-5:
            break
    posterior = likelihood * pi
    posterior /= posterior.sum(axis=1, keepdims=True)
    return d * (posterior * (tau_2 / total)).sum(axis=1)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the cells of every group: x, x², s / total, number of cells."""

    first: np.ndarray
    second: np.ndarray
    per_umi: np.ndarray
    n_cells: np.ndarray
    target_sum: float


class GroupSums:
    """Sums over the cells of groups, taken in piece by piece; cells without counts say nothing of relative expression
    and are left out.

    Parameters
    ----------
    n_groups, n_genes
        Size of the sums.
    """

    def __init__(self, n_groups: int, n_genes: int) -> None:
        self._first, self._second = np.zeros((n_groups, n_genes)), np.zeros((n_groups, n_genes))
        self._per_umi, self._n_cells = np.zeros(n_groups), np.zeros(n_groups)
        self._totals = Tally()

    def add(self, counts: sparse.csr_matrix, group: np.ndarray) -> None:
        """Take in cells and the group of each."""
        totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        used = np.flatnonzero(totals > 0)
        if not len(used):
            return
        totals, group, n_groups = totals[used], group[used], len(self._n_cells)
        self._totals.add(totals)
        there, place = np.unique(group, return_inverse=True)
        shares = sparse.csr_matrix(sparse.diags_array(1 / totals) @ counts[used].astype(np.float64))
        to_group = sparse.csr_matrix((np.ones(len(used)), (place, np.arange(len(used)))))
        self._first[there] += (to_group @ shares).toarray()
        self._second[there] += (to_group @ shares.power(2)).toarray()
        self._per_umi += np.bincount(group, 1 / totals, n_groups)
        self._n_cells += np.bincount(group, minlength=n_groups)

    def normalised(self) -> _Sums:
        """Give the sums as of cells normalised to the median total; this may be asked once."""
        if not self._n_cells.any():
            raise LingshuError("Effects need cells with counts", "all counts are 0", "Check the data")
        target_sum = self._totals.median()
        self._first *= target_sum
        self._second *= target_sum**2
        return _Sums(self._first, self._second, self._per_umi * target_sum, self._n_cells, target_sum)
