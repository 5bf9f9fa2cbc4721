"""Gene embeddings computed from what is at hand: co-expression, networks and gene sets."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from lingshu_cell.data.gene_embeddings import GeneEmbeddings
from lingshu_cell.errors import LingshuError

_MOST_STANDARDISED = 10.0  # a standardised count above this is cut: one cell must not make a direction of its own
_FEWEST_CELLS = 10


def from_coexpression(
    counts: sparse.csr_matrix, gene_names: Sequence[str], n_components: int = 50, seed: int = 0
) -> GeneEmbeddings:
    """Embed genes by how they vary together: principal axes of log-normalised, gene-standardised counts.

    With Z the standardised matrix of n cells, genes g and h have the inner product of about (ZᵀZ / n)_gh, their
    correlation. Genes detected in fewer than 10 cells get no vector.

    Parameters
    ----------
    counts
        UMI counts of **training** cells, shape [n_cells, n_genes].
    gene_names
        Names of the genes.
    n_components
        Dimensions, at most the rank.
    seed
        Starts the iterative decomposition.

    Returns
    -------
    GeneEmbeddings

    Raises
    ------
    LingshuError
        If there are too few genes or cells for so many components.
    """
    counts = sparse.csr_matrix(counts, dtype=np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    counts, totals = counts[totals > 0], totals[totals > 0]
    kept = np.flatnonzero(np.bincount(counts.indices, counts.data > 0, counts.shape[1]) >= _FEWEST_CELLS)
    _check_components(n_components, min(counts.shape[0], len(kept)), f"{counts.shape[0]} cells and {len(kept)} genes")
    values = sparse.csc_matrix(sparse.diags_array(np.median(totals) / totals) @ counts[:, kept]).log1p()
    mean = np.asarray(values.mean(axis=0)).ravel()
    sd = np.sqrt(np.maximum(np.asarray(values.power(2).mean(axis=0)).ravel() - mean**2, 1e-12))
    values = sparse.csc_matrix(values @ sparse.diags_array(1 / sd))
    values.data = np.minimum(values.data, _MOST_STANDARDISED)
    axes, spread = _principal_axes(sparse.csr_matrix(values), n_components, np.random.default_rng(seed))
    matrix = axes * (spread / np.sqrt(counts.shape[0]))
    return GeneEmbeddings.of([gene_names[g] for g in kept], matrix, f"co-expression in {counts.shape[0]} cells")


def from_network(
    first: Sequence[str], second: Sequence[str], sign: np.ndarray, n_components: int = 64, seed: int = 0
) -> GeneEmbeddings:
    """Embed genes by their place in a network: leading eigenvectors of the normalised signed adjacency, times |λ|.

    S = (D + τI)^-½ A (D + τI)^-½ with D the sums of |A| and τ their mean: without τ, every small separate group of
    genes would take a dimension of its own.

    Parameters
    ----------
    first, second
        Genes of every link; the direction is not used.
    sign
        Weight of every link, negative for repression; shape [number of links].
    n_components
        Dimensions, fewer than the genes.
    seed
        Starts the iterative decomposition.

    Returns
    -------
    GeneEmbeddings

    Raises
    ------
    LingshuError
        If there are too few genes for so many components.

    References
    ----------
    Qin and Rohe 2013 (regularised spectral clustering); Kunegis et al. 2010 (signed networks).
    """
    from scipy.sparse.linalg import eigsh

    names = sorted({*first, *second})
    _check_components(n_components, len(names) - 1, f"{len(names)} genes in the network")
    position = {name: row for row, name in enumerate(names)}
    rows, columns = (np.array([position[name] for name in ends], dtype=np.int64) for ends in (first, second))
    one_way = sparse.csr_matrix((np.asarray(sign, dtype=np.float64), (rows, columns)), shape=(len(names),) * 2)
    adjacency = one_way + one_way.T
    degree = np.asarray(abs(adjacency).sum(axis=1)).ravel()
    scale = sparse.diags_array(1 / np.sqrt(degree + degree.mean()))
    start = np.random.default_rng(seed).standard_normal(len(names))
    values, vectors = eigsh(sparse.csr_matrix(scale @ adjacency @ scale), k=n_components, which="LM", v0=start)
    order = np.argsort(-np.abs(values))
    matrix = vectors[:, order] * np.abs(values[order]) * np.sqrt(len(names))
    return GeneEmbeddings.of(names, matrix, f"network of {len(first):,} links")


def from_gene_sets(
    gene_sets: Mapping[str, Sequence[str]], n_components: int = 64, min_genes: int = 3, seed: int = 0
) -> GeneEmbeddings:
    """Embed genes by the sets they are in: truncated SVD of the tf-idf weighted membership matrix (genes × sets).

    Parameters
    ----------
    gene_sets
        Name → genes (see :func:`~lingshu_cell.data.gene_sets.read_gmt`).
    n_components
        Dimensions, fewer than the sets.
    min_genes
        Sets with fewer genes are left out.
    seed
        Starts the randomised decomposition.

    Returns
    -------
    GeneEmbeddings

    Raises
    ------
    LingshuError
        If there are too few sets or genes for so many components.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    sets = [genes for genes in gene_sets.values() if len(genes) >= min_genes]
    names = sorted({gene for genes in sets for gene in genes})
    _check_components(n_components, min(len(names), len(sets)) - 1, f"{len(sets)} sets of {len(names)} genes")
    position = {name: row for row, name in enumerate(names)}
    rows = [position[gene] for genes in sets for gene in genes]
    columns = np.repeat(np.arange(len(sets)), [len(genes) for genes in sets])
    membership = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(sets)))
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(membership)
    matrix = TruncatedSVD(n_components, random_state=seed).fit_transform(weighted)
    return GeneEmbeddings.of(names, matrix, f"membership in {len(sets):,} gene sets")


def _principal_axes(
    values: sparse.csr_matrix, n_components: int, generator: np.random.Generator, n_extra: int = 10, n_rounds: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors and values of the column-centred matrix, by randomised subspace iteration.

    Centred on the fly: scikit-learn centres sparse input in its iterative solver only, which takes several times as
    long. Source: Halko et al. 2011, algorithm 4.4.
    """
    mean = np.asarray(values.mean(axis=0)).ravel()
    width = min(n_components + n_extra, *values.shape)
    basis = np.linalg.qr(generator.standard_normal((values.shape[1], width)))[0]
    for _ in range(n_rounds):
        seen = np.linalg.qr(values @ basis - mean @ basis)[0]
        basis = np.linalg.qr(values.T @ seen - np.outer(mean, seen.sum(axis=0)))[0]
    _, spread, rotation = np.linalg.svd(values @ basis - mean @ basis, full_matrices=False)
    return (basis @ rotation.T)[:, :n_components], spread[:n_components]


def _check_components(n_components: int, most: int, of_what: str) -> None:
    if not 1 <= n_components <= most:
        raise LingshuError(
            "Dimensions must be fewer than what they are computed from",
            f"{n_components} dimensions of {of_what}",
            f"Ask for 1 … {most}" if most >= 1 else "Give more data",
        )
