"""Which cells are fit to learn from, and how many each rule drops; nothing is dropped unless asked for."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.ndimage import uniform_filter1d

from lingshu_cell.errors import LingshuError

SCRUBLET_CELLS = 10_000  # so many consecutive cells are scored together: about what one lane of a chip gives
_LEAST_CELLS = 50  # below, Scrublet says nothing
_MOST_SMOOTHING = 10_000  # steps
_RARE = 0.05  # a gene in fewer cells than this share is rarely detected
_LEAST_VALUES = 500  # non-zero counts of rarely detected genes that a verdict needs
_LEAST_ONES = 0.7  # UMI counts of rarely detected genes are mostly 1, read counts of the same molecules are not
_READ_ASSAYS = (
    "smart-seq",
    "smartseq",
    "smarter",
    "fluidigm",
    "c1 ",
    "cel-seq",
    "celseq",
    "tang",
    "quartz-seq",
    "sugar",
)
_UMI_ASSAYS = ("smart-seq3", "smartseq3", "cel-seq2", "celseq2")


@dataclass(frozen=True)
class QualityRules:
    """What a cell must have to be kept; the values here keep every cell.

    Attributes
    ----------
    min_genes
        Genes detected.
    min_counts
        Counts in all.
    max_mito
        Largest share of counts from mitochondrial genes, 0 … 1.
    min_cells_per_gene
        Genes detected in fewer kept cells, of all data sets together, are left out of the gene list.
    scrublet
        Drop what Scrublet (scanpy) calls a doublet.
    drop_read_counts
        Drop the cells of assays that count reads and not molecules, told by ``obs["assay"]`` or the counts themselves.
    """

    min_genes: int = 0
    min_counts: int = 0
    max_mito: float = 1.0
    min_cells_per_gene: int = 0
    scrublet: bool = False
    drop_read_counts: bool = False

    def __post_init__(self) -> None:
        if min(self.min_genes, self.min_counts, self.min_cells_per_gene) < 0 or not 0 <= self.max_mito <= 1:
            raise LingshuError(
                "Quality rules must be 0 or more, and the mitochondrial share at most 1",
                f"got {self.to_json()}",
                "Correct the values",
            )

    def to_json(self) -> dict[str, Any]:
        """Give the rules as plain JSON types."""
        return asdict(self)


PAPER_RULES = QualityRules(min_genes=200, min_counts=500, max_mito=0.2, min_cells_per_gene=3, scrublet=True)
"""The preprint's own (arXiv 2603.25240, section 4.1)."""


def is_mitochondrial(names: Iterable[str]) -> np.ndarray:
    """Tell genes of the mitochondrion by their names.

    Parameters
    ----------
    names
        Symbols of human (``MT-ND1``), mouse (``mt-Nd1``) or fly (``mt:ND1``) genes.

    Returns
    -------
    np.ndarray
        Boolean, one per gene.
    """
    return np.array([name[:3].lower() in ("mt-", "mt:") for name in names], dtype=bool)


def failing(counts: sparse.csr_matrix, mitochondrial: np.ndarray, rules: QualityRules) -> dict[str, np.ndarray]:
    """Say which cells break which rule; a cell may break several.

    Parameters
    ----------
    counts
        Canonical counts, CSR, shape [n_cells, n_genes], all genes of the file.
    mitochondrial
        Boolean, shape [n_genes].
    rules
        The rules.

    Returns
    -------
    dict
        Rule → boolean, shape [n_cells]; only rules that can drop anything.
    """
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    broken: dict[str, np.ndarray] = {}
    if rules.min_genes:
        broken["min_genes"] = np.diff(counts.indptr) < rules.min_genes
    if rules.min_counts:
        broken["min_counts"] = total < rules.min_counts
    if rules.max_mito < 1:
        mito = counts @ mitochondrial.astype(np.float64)
        broken["max_mito"] = mito > rules.max_mito * total
    return broken


def doublets(counts: sparse.csr_matrix, seed: int) -> np.ndarray | None:
    """Call doublets by Scrublet, with its own kind of threshold.

    Parameters
    ----------
    counts
        Counts of cells of one experimental batch, CSR, shape [n_cells, n_genes].
    seed
        Random state of the simulated doublets.

    Returns
    -------
    np.ndarray or None
        Boolean, shape [n_cells]; None where there are too few cells or genes, or no threshold was found.

    Source
    ------
    Wolock, Lopez, Klein 2019, Cell Systems; ``scanpy.pp.scrublet``.
    """
    import anndata as ad
    import scanpy as sc

    detected = np.bincount(counts.indices, minlength=counts.shape[1])
    kept = np.flatnonzero(detected >= 3)
    fit = np.flatnonzero(np.diff(counts[:, kept].indptr) >= 3)
    if len(fit) < _LEAST_CELLS or len(kept) < _LEAST_CELLS:
        return None
    adata = ad.AnnData(counts[fit][:, kept].astype(np.float32))
    adata.obs_names = adata.obs_names.astype(str)
    n_components = min(30, min(adata.shape) // 2)
    with warnings.catch_warnings():
        # A threshold of 1 calls no doublet, which makes Scrublet's summary divide by zero; only scores are used.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="scanpy")
        sc.pp.scrublet(
            adata,
            threshold=1.0,
            n_prin_comps=n_components,
            use_approx_neighbors=False,
            random_state=seed,
            verbose=False,
        )
    threshold = valley(np.asarray(adata.uns["scrublet"]["doublet_scores_sim"]))
    if threshold is None:
        return None
    called = np.zeros(counts.shape[0], dtype=bool)
    called[fit] = adata.obs["doublet_score"].to_numpy() > threshold
    return called


def valley(values: np.ndarray) -> float | None:
    """Find the lowest point between the two peaks of a histogram that is smoothed until it has but two.

    This is Scrublet's threshold on the scores of simulated doublets; scanpy takes it from scikit-image.

    Parameters
    ----------
    values
        Any numbers.

    Returns
    -------
    float or None
        None where no smoothing leaves two peaks.

    Source
    ------
    Prewitt, Mendelsohn 1966, Ann N Y Acad Sci; ``skimage.filters.threshold_minimum``.
    """
    histogram, edges = np.histogram(values, bins=256)
    smooth, centres = histogram.astype(np.float64), (edges[1:] + edges[:-1]) / 2
    for _ in range(_MOST_SMOOTHING):
        smooth = uniform_filter1d(smooth, 3)
        peaks = _peaks(smooth)
        if len(peaks) < 3:
            break
    if len(peaks) != 2:
        return None
    return float(centres[peaks[0] + np.argmin(smooth[peaks[0] : peaks[1] + 1])])


def _peaks(heights: np.ndarray) -> list[int]:
    peaks, rising = [], True
    for i in range(len(heights) - 1):
        if rising and heights[i + 1] < heights[i]:
            rising = False
            peaks.append(i)
        elif not rising and heights[i + 1] > heights[i]:
            rising = True
    return peaks


def share_of_ones(n_cells: int, detected: np.ndarray, ones: np.ndarray) -> float | None:
    """Give the share of ones among the non-zero counts of rarely detected genes.

    A molecule counted once is 1 in UMI data; sequenced reads of it are many. Among genes in few cells nearly all counts
    stem from single molecules, so the share tells the two apart whatever the depth: 0.88 … 0.96 in twelve UMI data sets
    of six species, 0.51 in read counts (CEL-seq2 pancreas cells).

    Parameters
    ----------
    n_cells
        Number of cells behind the numbers.
    detected, ones
        In how many of them each gene has a count, and a count of 1; shape [n_genes].

    Returns
    -------
    float or None
        0 … 1; None where there are too few such counts.
    """
    rare = detected < _RARE * n_cells
    n_values = int(detected[rare].sum())
    return float(ones[rare].sum() / n_values) if n_values >= _LEAST_VALUES else None


def counts_reads(assay: str | None, ones: float | None) -> str | None:
    """Say why the cells of an assay seem to hold read counts; None where they do not.

    Parameters
    ----------
    assay
        Label of ``obs["assay"]``, or None.
    ones
        What :func:`share_of_ones` gave.
    """
    if ones is not None:
        return None if ones >= _LEAST_ONES else f"only {ones:.0%} of the counts of rarely detected genes are 1"
    plain = (assay or "").lower()
    by_name = any(name in plain for name in _READ_ASSAYS) and not any(name in plain for name in _UMI_ASSAYS)
    return "the assay has no UMIs" if by_name else None


def table(rows: Mapping[str, Mapping[str, int]]) -> str:
    """Lay out what was dropped, a row for each data set.

    Parameters
    ----------
    rows
        Data set → ``cells``, number of cells breaking each rule, ``dropped``, ``kept``.

    Returns
    -------
    str
    """
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    heading = ["data set", *columns]
    lines = [heading, *([name, *(f"{row[c]:,}" if c in row else "–" for c in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
