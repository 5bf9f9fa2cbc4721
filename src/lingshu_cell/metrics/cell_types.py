"""Cell types: a classifier trained on real reference cells, proportions, and marker genes."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

_MIN_CELLS_TO_LEARN = 5
_MIN_CELLS_TO_RANK = 10
_MULTINOMIAL_DRAWS = 2000


@dataclass(frozen=True)
class TypeClassifier:
    """A fitted scikit-learn pipeline and the cell types it knows."""

    pipeline: object
    types: tuple[str, ...]

    def predict(self, components: np.ndarray) -> np.ndarray:
        """Name the most probable cell type of every cell, shape (cells,)."""
        return np.asarray(self.pipeline.predict(components), dtype=object)


def fit_type_classifier(components: np.ndarray, labels: np.ndarray) -> TypeClassifier | None:
    """Fit a multinomial logistic regression on standardised principal components of labelled real cells.

    Parameters
    ----------
    components
        Principal components of reference cells, (cells, components).
    labels
        Cell type of each, "" where unknown; types with fewer than five cells are left out.

    Returns
    -------
    TypeClassifier, or None when fewer than two types remain.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, sizes = np.unique(labels[labels != ""].astype(str), return_counts=True)
    types = names[sizes >= _MIN_CELLS_TO_LEARN]
    if len(types) < 2:
        return None
    known = np.isin(labels.astype(str), types)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    return TypeClassifier(pipeline.fit(components[known], labels[known].astype(str)), tuple(types))


def proportions(labels: np.ndarray, types: tuple[str, ...]) -> np.ndarray:
    """Share of each type among ``labels``, in the order of ``types``; sums to 1 when every label is one of them."""
    counted = pd.Series(labels.astype(str)).value_counts()
    return np.array([counted.get(name, 0) for name in types]) / max(len(labels), 1)


def proportion_error(real: np.ndarray, other: np.ndarray, min_share: float = 0.05) -> float | None:
    """Largest absolute difference of proportions over the types that hold at least ``min_share`` of the real cells."""
    frequent = real >= min_share
    return float(np.abs(real - other)[frequent].max()) if frequent.any() else None


def expected_proportion_error(real: np.ndarray, n_real: int, n_other: int, rng: np.random.Generator) -> float | None:
    """Average proportion error of two samples that both come from the real proportions.

    Parameters
    ----------
    real
        Proportions, sum 1.
    n_real, n_other
        Numbers of cells of the two samples.
    rng
        Source of 2,000 multinomial draws.

    Returns
    -------
    Mean of :func:`proportion_error` over the draws: what sampling alone costs at these sizes.
    """
    pairs = zip(
        rng.multinomial(n_real, real / real.sum(), _MULTINOMIAL_DRAWS) / n_real,
        rng.multinomial(n_other, real / real.sum(), _MULTINOMIAL_DRAWS) / n_other,
        strict=True,
    )
    errors = [proportion_error(x, y) for x, y in pairs]
    errors = [error for error in errors if error is not None]
    return float(np.mean(errors)) if errors else None


def label_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    """Share of labelled cells whose label the classifier confirms; None without labels."""
    labelled = labels != ""
    return float((labels[labelled] == predicted[labelled]).mean()) if labelled.any() else None


def rank_markers(
    expression: sp.csr_matrix, types: np.ndarray, names: list[str], n_markers: int, shares: bool = False
) -> pd.DataFrame:
    """Rank genes of each named type against all other cells with scanpy's t-test.

    Parameters
    ----------
    expression
        Log-normalised cells, (cells, genes).
    types
        Type of every cell.
    names
        Types to rank, each with at least two cells and not all cells.
    n_markers
        Number of top-scoring genes per type.
    shares
        Whether to give the shares of expressing cells too.

    Returns
    -------
    Columns group, names (column number of the gene as int), scores, logfoldchanges, and with ``shares`` pct_nz_group
    and pct_nz_reference; best genes of each group first.
    """
    import anndata as ad
    import scanpy as sc

    adata = ad.AnnData(
        expression,
        obs=pd.DataFrame({"type": pd.Categorical(types.astype(str))}, index=np.arange(expression.shape[0]).astype(str)),
        var=pd.DataFrame(index=np.arange(expression.shape[1]).astype(str)),
    )
    sc.tl.rank_genes_groups(adata, "type", groups=list(names), method="t-test", pts=shares, n_genes=n_markers)
    table = pd.concat([sc.get.rank_genes_groups_df(adata, name).assign(group=name) for name in names])
    return table.assign(names=table["names"].astype(int)).reset_index(drop=True)


def top_markers(expression: sp.csr_matrix, types: np.ndarray, n_markers: int = 20) -> dict[str, frozenset[int]]:
    """Find the best marker genes of every type with at least ten cells.

    Parameters
    ----------
    expression
        Log-normalised cells, (cells, genes).
    types
        Predicted type of every cell.
    n_markers
        Number of genes per type, best t-test score against all other cells.

    Returns
    -------
    Type → column numbers; empty when fewer than two types are left.
    """
    sizes = pd.Series(types.astype(str)).value_counts()
    names = sorted(sizes.index[sizes >= _MIN_CELLS_TO_RANK])
    if len(sizes) < 2 or not names:
        return {}
    table = rank_markers(expression, types, names, n_markers)
    return {name: frozenset(table.loc[table["group"] == name, "names"]) for name in names}


def marker_overlap(real: dict[str, frozenset[int]], other: dict[str, frozenset[int]]) -> float | None:
    """Average, over the types in both, the share of marker genes in common; None with fewer than two such types."""
    names = sorted(real.keys() & other.keys())
    return (
        float(np.mean([len(real[name] & other[name]) / len(real[name]) for name in names])) if len(names) > 1 else None
    )


def marker_genes(expression: sp.csr_matrix, types: np.ndarray, most: int) -> list[int]:
    """Choose one telling gene for each of the most frequent types of real cells.

    Among the 50 best genes of a type by t-test, the one whose share of expressing cells differs most from the others.

    Parameters
    ----------
    expression
        Log-normalised real cells, (cells, genes).
    types
        Type of every cell, "" where unknown.
    most
        Largest number of genes.

    Returns
    -------
    Column numbers, most frequent type first, without repeats; empty when there are fewer than two types.
    """
    known = types != ""
    sizes = pd.Series(types[known].astype(str)).value_counts()
    names = list(sizes.index[sizes >= _MIN_CELLS_TO_RANK][:most])
    if len(names) < 2:
        return []
    table = rank_markers(expression[known], types[known], names, n_markers=50, shares=True)
    table = table.assign(contrast=table["pct_nz_group"] - table["pct_nz_reference"])
    chosen: list[int] = []
    for name in names:
        ranked = table[table["group"] == name].sort_values("contrast", ascending=False, kind="stable")["names"]
        chosen.extend([int(gene) for gene in ranked if gene not in chosen][:1])
    return chosen
