"""Judge generated cells against real cells, from files, whatever model made them."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.metrics import (
    catalogue,
    cell_types,
    correlation,
    depth,
    doublets,
    embedding,
    folder,
    genes,
    inputs,
    memorisation,
    outliers,
    two_sample,
)
from lingshu_cell.metrics.clock import Clock

_COMPONENTS = 50
_CHEAP_SPLITS = 50  # for numbers that cost nothing to split: depth, distances
_LEAST_CELLS = 20  # in each sample of a comparison
_MOST_CELLS_PCA = 10_000
_MOST_CELLS_SPLIT = 1_000  # per side; eleven forests of five folds take a minute at this size
_MOST_CELLS_PAIR = 2_500
_MOST_CELLS_MAP = 5_000
_MOST_CELLS_SCRUBLET = 1_000
_MOST_MARKERS = 12
_CORRELATED_GENES = 100
_LEAST_CELLS_OF_TYPE = 30
_LEAST_MEAN = 0.1  # counts per cell: below, the variance of a gene is Poisson noise
_TREES = 50  # per fold; eleven comparisons
_TREES_ALL_CELLS = 200
_ALL_CELLS_AUC = "classifier_auc_random_forest_all_cells"

Part = tuple[sp.csr_matrix, np.ndarray]  # raw counts and labels of some cells

logger = logging.getLogger("lingshu_cell")


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of one part: raw counts (cells, genes), components, obs labels, predicted types ("" = none), depth."""

    counts: sp.csr_matrix
    components: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    depth: depth.Depth

    @property
    def n(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    def take(self, rows: np.ndarray) -> "Cells":
        """Return some of the cells."""
        return Cells(
            self.counts[rows],
            self.components[rows],
            self.labels[rows],
            self.predicted[rows],
            self.depth.take(rows),
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """One side of a comparison: cells, log-normalised expression of detected genes, marker genes of its types."""

    cells: Cells
    expression: sp.csr_matrix
    markers: dict[str, frozenset[int]]


@dataclass(frozen=True, eq=False)
class Space:
    """All that is fitted on reference cells and then held fixed for every comparison."""

    pca: embedding.PcaSpace
    classifier: cell_types.TypeClassifier | None
    bandwidths: np.ndarray
    trend: genes.MeanVarianceTrend | None
    detected: np.ndarray
    expressed: np.ndarray
    target_sum: float
    seed: int

    def place(self, counts: sp.csr_matrix, labels: np.ndarray) -> Cells:
        """Project cells on the reference's principal components, predict their types and measure their depth."""
        components = self.pca.project(counts)
        predicted = self.classifier.predict(components) if self.classifier else np.full(len(labels), "", dtype=object)
        return Cells(counts, components, labels, predicted, depth.measure_depth(counts))


@folder.holding_output
def evaluate_files(
    real: Path,
    generated: Path,
    out: Path,
    *,
    training: Path | None = None,
    cell_type_key: str | None = inputs.DEFAULT_CELL_TYPE_KEY,
    layer: str | None = None,
    generated_layer: str | None = None,
    target_sum: float = 1e4,
    seed: int = 0,
    max_cells: int | None = None,
    nelbo: dict | None = None,
    n_splits: int = 5,
) -> dict:
    """Compare generated cells with real cells and write metrics, tables and facts into a folder.

    Which cells go where. *Reference* cells fit the PCA, the cell-type classifier, kernel bandwidths, the mean-
    variance trend and the correlations to be met; they are the ``training`` cells or, without them, a random third of
    ``real``. The *compared* real cells are all of ``real`` or, without training cells, the other two thirds; so no
    PCA is fitted on cells it compares (that alone makes two halves of one data set separable). For each of five
    random splits the compared real cells give two disjoint halves A and B of m cells, m = min(half of them,
    generated, 1,000), and m random generated cells are G: the value is metric(A, G), real_vs_real is metric(A, B),
    both averaged over the splits (``_sd`` is their spread), and shuffled is metric(A, B with each gene's counts
    permuted over its cells).

    Depth, zeros, proportions, correlations, doublets and memorisation use all compared cells, as each description
    says. Correlations are compared with those of the reference; their real_vs_real is the mean over fifty draws of
    cells out of reference and compared cells together. Copies of training cells are not held-out cells: they lie where
    the PCA was fitted and are told apart, as they should be.

    Parameters
    ----------
    real
        Held-out real cells, raw counts (h5ad).
    generated
        Generated cells, raw counts; at least half of the real genes must be among its genes.
    out
        Folder to write into; created when absent.
    training
        Cells the model was trained on; recommended, and needed to see copying.
    cell_type_key
        obs column of cell types; None to do without.
    layer, generated_layer
        Layer of the counts in the real and training files and in the generated file; None = ``X``.
    target_sum
        Counts per cell after normalisation, before log1p; above 0.
    seed
        Random state of every split, fold, tree and map.
    max_cells
        Use at most this many random cells of each file; None = all.
    nelbo
        ``{"nats_per_cell": …, "bits_per_gene": …}`` of the model on held-out cells, when the model is at hand.
    n_splits
        Number of random halvings of the real cells, at least 1.

    Returns
    -------
    The content of metrics.json: name → value, real_vs_real, better, unit, description, and shuffled or why.

    Raises
    ------
    LingshuError
        If a file is refused, genes do not match, ``out`` is a file, or the real cells are training cells.
    """
    _check_arguments(out, target_sum, max_cells, n_splits)
    likelihood = catalogue.likelihood_entries(nelbo or {})
    clock, rng = Clock(), np.random.default_rng(seed)
    with clock.time("read"):
        files = {"real": read_counts(real, layer), "generated": read_counts(generated, generated_layer)}
        if training is not None:
            files["training"] = read_counts(training, layer)
        names = inputs.common_genes(files)
        key = inputs.resolve_cell_type_key(files, cell_type_key)
        parts = {name: _some(inputs.counts_and_labels(x, names, key), max_cells, rng) for name, x in files.items()}
        n_copied = _refuse_training_cells(parts)
    if training is None:
        order = rng.permutation(parts["real"][0].shape[0])
        third = len(order) // 3
        reference, compared = (_rows(parts["real"], rows) for rows in (order[:third], order[third:]))
    else:
        reference, compared = parts["training"], parts["real"]
    with clock.time("fit on reference"):
        space = _fit_space(reference, [compared[0], parts["generated"][0]], target_sum, seed, rng)
        cells = {
            "reference": space.place(*reference),
            "real": space.place(*compared),
            "generated": space.place(*parts["generated"]),
        }
    metrics, m = _all_metrics(cells, space, training is not None, n_splits, clock, rng)
    metrics |= likelihood
    tables = _tables(cells, space, names, clock, rng)
    facts = {
        "versions": folder.package_versions(),
        "files": {name: _file_facts(matrix) for name, matrix in files.items()},
        "n_cells": {**{name: c.n for name, c in cells.items()}, "each_sample_of_a_comparison": m, "splits": n_splits},
        "reference": "training cells" if training is not None else "a random third of the real cells",
        "n_genes": {"common": len(names), **{name: matrix.n_genes for name, matrix in files.items()}},
        "real_cells_also_in_training": n_copied,
        "cell_type_key": key,
        "target_sum": target_sum,
        "seed": seed,
        "max_cells": max_cells,
        "provenance": folder.provenance(generated),
        "seconds": clock.seconds,
    }
    folder.write_folder(out, tables, {"facts.json": facts, "metrics.json": metrics})
    return metrics


def _check_arguments(out: Path, target_sum: float, max_cells: int | None, n_splits: int) -> None:
    if not 0 < target_sum < float("inf"):
        raise LingshuError("target_sum must be above 0", f"it is {target_sum}", "Use e.g. 10000 counts per cell")
    if n_splits < 1:
        raise LingshuError("n_splits must be at least 1", f"it is {n_splits}", "Use e.g. 5 halvings of the real cells")
    if max_cells is not None and max_cells < 3 * _LEAST_CELLS:
        raise LingshuError(
            f"max_cells must be at least {3 * _LEAST_CELLS}", f"it is {max_cells}", "Leave it out to use all cells"
        )
    absent = [name for name in ("scanpy", "scib_metrics", "umap") if find_spec(name) is None]
    if absent:
        raise LingshuError(
            "Evaluation needs its extra packages",
            f"not installed: {offenders(absent)}",
            "Install them with: pip install 'lingshu-cell[evaluate]'",
        )


def _some(part: Part, most: int | None, rng: np.random.Generator) -> Part:
    """All cells of a part, or ``most`` random ones."""
    n = part[0].shape[0]
    return part if most is None or n <= most else _rows(part, np.sort(rng.choice(n, most, replace=False)))


def _rows(part: Part, rows: np.ndarray) -> Part:
    return part[0][rows], part[1][rows]


def _refuse_training_cells(parts: dict[str, Part]) -> int | None:
    """Count real cells that equal a training cell; refuse when they are half of the real cells or more."""
    if "training" not in parts:
        return None
    real, training = (memorisation.cell_fingerprints(parts[name][0]) for name in ("real", "training"))
    copies = memorisation.n_copies(real, training)
    if 2 * copies >= len(real):
        raise LingshuError(
            "Real cells must be held out from training",
            f"{copies} of {len(real)} equal a training cell in every gene",
            "Pass the cells that were kept back as real, or leave the training file out",
        )
    return copies


def _fit_space(
    reference: Part,
    others: list[sp.csr_matrix],
    target_sum: float,
    seed: int,
    rng: np.random.Generator,
) -> Space:
    counts, labels = reference
    n_detected = np.bincount(counts.indices, minlength=counts.shape[1])
    pca_genes = np.flatnonzero(n_detected >= 3)
    if counts.shape[0] < _LEAST_CELLS or len(pca_genes) < 3:
        raise LingshuError(
            f"There must be at least {_LEAST_CELLS} reference cells with at least 3 genes found in 3 of them",
            f"{counts.shape[0]} cells, {len(pca_genes)} such genes",
            "Pass more real cells, or the training cells",
        )
    fitted = np.sort(rng.permutation(counts.shape[0])[:_MOST_CELLS_PCA])
    pca = embedding.fit_pca(counts[fitted], pca_genes, target_sum, _COMPONENTS, seed)
    components = pca.project(counts)
    # A gene that only the generator switches on must count as well, hence the sum over all parts.
    anywhere = n_detected + sum(np.bincount(x.indices, minlength=x.shape[1]) for x in others)
    return Space(
        pca=pca,
        classifier=cell_types.fit_type_classifier(components, labels),
        bandwidths=two_sample.kernel_bandwidths(components),
        trend=genes.fit_mean_variance_trend(counts, _LEAST_MEAN),
        detected=np.flatnonzero(anywhere >= 3),
        expressed=np.flatnonzero(n_detected >= 0.05 * counts.shape[0]),
        target_sum=target_sum,
        seed=seed,
    )


def _all_metrics(
    cells: dict[str, Cells], space: Space, has_training: bool, n_splits: int, clock: Clock, rng: np.random.Generator
) -> tuple[dict[str, dict], int]:
    """Compute every metric; also give the number of cells in each sample of a split."""
    real, generated = cells["real"], cells["generated"]
    m = min(real.n // 2, generated.n, _MOST_CELLS_SPLIT)
    found: dict[str, dict[str, list]] = {name: {} for name in catalogue.CATALOGUE}
    for split in range(n_splits if m >= _LEAST_CELLS else 0):
        logger.info("evaluate: split %d of %d", split + 1, n_splits)
        order = rng.permutation(real.n)
        half, other_half = real.take(order[:m]), real.take(order[m : 2 * m])
        judged = {"value": generated.take(rng.permutation(generated.n)[:m]), "real_vs_real": other_half}
        if split == 0:
            judged["shuffled"] = space.place(genes.shuffle_genes(other_half.counts, rng), other_half.labels)
        sample = _prepare(half, space, clock)
        for side, cells_of_side in judged.items():
            for name, value in _pair_metrics(sample, _prepare(cells_of_side, space, clock), space, clock).items():
                found[name].setdefault(side, []).append(value)
    with clock.time("classifiers"):
        n = min(real.n, generated.n, _MOST_CELLS_PAIR)
        found[_ALL_CELLS_AUC] = {"real_vs_real": found["classifier_auc_random_forest"].get("real_vs_real")}
        if n >= _LEAST_CELLS:
            samples = (_features(c.take(rng.permutation(c.n)[:n])) for c in (real, generated))
            found[_ALL_CELLS_AUC]["value"] = two_sample.forest_auc(*samples, space.seed, _TREES_ALL_CELLS)
    with clock.time("depth"):
        depths, shuffled = _depth_metrics(real, generated, rng)
        found.update(depths)
    found.update(_type_metrics(cells, space, clock, rng))
    if has_training:
        with clock.time("outliers"):
            found.update(_outlier_metrics(cells, shuffled))
    found.update(_memorisation_metrics(cells, has_training, clock, rng))
    return {name: catalogue.entry(name, sides) for name, sides in found.items() if not name.startswith("nelbo")}, m


def _prepare(cells: Cells, space: Space, clock: Clock) -> Sample:
    with clock.time("markers"):
        expression = embedding.log_normalise(cells.counts, space.target_sum)[:, space.detected]
        return Sample(cells, expression, cell_types.top_markers(expression, cells.predicted))


def _pair_metrics(real: Sample, judged: Sample, space: Space, clock: Clock) -> dict[str, float | None]:
    """Metrics of two samples of equally many cells: real cells and cells to be judged."""
    a, x = real.cells, judged.cells
    result: dict[str, float | None] = {"marker_overlap": cell_types.marker_overlap(real.markers, judged.markers)}
    with clock.time("gene means and variances"):
        pearson, spearman = genes.gene_mean_correlations(real.expression, judged.expression)
        result |= {"gene_mean_pearson": pearson, "gene_mean_spearman": spearman}
        if space.trend is not None:
            error, bias = genes.mean_variance_error(a.counts, x.counts, space.trend)
            result |= {"mean_variance_error": error, "mean_variance_bias": bias}
    with clock.time("wasserstein"):
        distance = genes.wasserstein_per_gene(real.expression, judged.expression)
        expressed = np.isin(space.detected, space.expressed)
        result["wasserstein"] = float(distance.mean())
        result["wasserstein_expressed"] = float(distance[expressed].mean()) if expressed.any() else None
    with clock.time("mmd2"):
        result["mmd2"] = two_sample.mmd2(a.components, x.components, space.bandwidths)
    with clock.time("ilisi"):
        result["ilisi"] = two_sample.ilisi(a.components, x.components)
    with clock.time("classifiers"):
        result["classifier_auc_random_forest"] = two_sample.forest_auc(_features(a), _features(x), space.seed, _TREES)
        result["classifier_auc_logistic"] = two_sample.logistic_auc(a.components, x.components, space.seed)
        umi = two_sample.depth_features(a.depth.log_umi, x.depth.log_umi)
        result["classifier_auc_library_size"] = two_sample.logistic_auc(*umi, space.seed)
    return result


def _features(cells: Cells) -> np.ndarray:
    """Principal components, log total and log genes detected: what the random forest sees."""
    return np.column_stack([cells.components, cells.depth.log_umi, np.log1p(cells.depth.detected)])


def _depth_metrics(
    real: Cells, generated: Cells, rng: np.random.Generator
) -> tuple[dict[str, dict], tuple[sp.csr_matrix, np.ndarray]]:
    """Library size, genes detected and zeros over all cells; real-vs-real from many halves of the real cells. Also give
    the counts of the shuffled cells, and the types of the cells they were shuffled from.
    """
    found: dict[str, dict] = {
        name: {"value": value} for name, value in depth.compare_depth(real.depth, generated.depth).items()
    }
    if real.n >= 2 * _LEAST_CELLS:
        for name, values in depth.depth_between_halves(real.depth, rng, _CHEAP_SPLITS).items():
            found[name]["real_vs_real"] = values
    some = real.take(rng.permutation(real.n)[:_MOST_CELLS_PAIR])
    shuffled = genes.shuffle_genes(some.counts, rng)
    for name, value in depth.compare_depth(real.depth, depth.measure_depth(shuffled)).items():
        found[name]["shuffled"] = value
    return found, (shuffled, some.predicted)


def _type_metrics(cells: dict[str, Cells], space: Space, clock: Clock, rng: np.random.Generator) -> dict[str, dict]:
    """Proportions and labels by the classifier, correlations within the most frequent type, and doublets."""
    real, generated = cells["real"], cells["generated"]
    found: dict[str, dict] = {"proportion_max_error": {}, "label_accuracy": {}}
    if space.classifier is not None:
        shares = [cell_types.proportions(c.predicted, space.classifier.types) for c in (real, generated)]
        expected = cell_types.expected_proportion_error(shares[0], real.n, generated.n, rng)
        found["proportion_max_error"] = {"value": cell_types.proportion_error(*shares), "real_vs_real": expected}
        confirmed = [cell_types.label_accuracy(c.labels, c.predicted) for c in (generated, real)]
        found["label_accuracy"] = dict(zip(("value", "real_vs_real"), confirmed, strict=True))
    with clock.time("gene correlation"):
        found |= _correlation_metrics(cells, space, rng)
    with clock.time("doublets"):
        n = min(real.n, generated.n, _MOST_CELLS_SCRUBLET)
        sizes = {"reference": _MOST_CELLS_SCRUBLET, "real": n, "generated": n}
        samples = [cells[side].counts[rng.permutation(cells[side].n)[:size]] for side, size in sizes.items()]
        rates = doublets.doublet_rates(*samples, space.seed)
        found["doublet_rate"] = dict(zip(("value", "real_vs_real"), rates or (None, None), strict=True))
    return found


def _correlation_metrics(cells: dict[str, Cells], space: Space, rng: np.random.Generator) -> dict[str, dict]:
    """Gene-gene correlations in the type most frequent in the reference, or over all cells when there are no types.

    Real-vs-real draws as many cells again and again out of reference and real cells together and compares them with the
    others: the real cells alone are one draw, whose error can by luck be a third off with a few hundred cells.
    """
    found: dict[str, dict] = {"gene_correlation_error": {}, "gene_correlation_slope": {}}
    types, sizes = np.unique(cells["reference"].predicted.astype(str), return_counts=True)
    of_type = {side: np.flatnonzero(c.predicted == types[sizes.argmax()]) for side, c in cells.items()}
    n = min(len(of_type["real"]), len(of_type["generated"]), _MOST_CELLS_PAIR)
    if n < _LEAST_CELLS_OF_TYPE or len(of_type["reference"]) < 2 * _LEAST_CELLS_OF_TYPE:
        return found
    counts = {
        side: cells[side].counts[rng.permutation(rows)[:n]] for side, rows in of_type.items() if side != "reference"
    }
    counts["shuffled"] = genes.shuffle_genes(counts["real"], rng)
    reference = cells["reference"].counts[rng.permutation(of_type["reference"])[:_MOST_CELLS_PCA]]
    used = correlation.expressed_genes(reference, _CORRELATED_GENES)
    expression = {
        side: embedding.log_normalise(x, space.target_sum)[:, used].toarray()
        for side, x in {"reference": reference, **counts}.items()
    }
    halves = rng.permutation(reference.shape[0])
    for name, side in (("generated", "value"), ("shuffled", "shuffled")):
        compared = correlation.compare_correlations(expression["reference"], expression[name], halves)
        if compared is not None:
            found["gene_correlation_error"][side] = compared.error
            found["gene_correlation_slope"][side] = compared.slope
            found["gene_correlation_slope"][f"{side}_sd"] = compared.slope_error
    together = np.concatenate([expression["reference"], expression["real"]])
    drawn = []
    for _ in range(_CHEAP_SPLITS):
        cells_of_draw, others = np.split(together[rng.permutation(len(together))], [n])
        drawn.append(correlation.compare_correlations(others, cells_of_draw, rng.permutation(len(others))))
    for name, attribute in (("gene_correlation_error", "error"), ("gene_correlation_slope", "slope")):
        found[name]["real_vs_real"] = [getattr(compared, attribute) for compared in drawn if compared is not None]
    return found


def _outlier_metrics(cells: dict[str, Cells], shuffled: tuple[sp.csr_matrix, np.ndarray]) -> dict[str, dict]:
    """Counts that training cells come nowhere near, in generated, held-out and shuffled cells: counts and types."""
    real, generated, training = cells["real"], cells["generated"], cells["reference"]
    sides = {
        "value": (generated.counts, generated.predicted),
        "real_vs_real": (real.counts, real.predicted),
        "shuffled": shuffled,
    }
    largest_G = training.counts.max(axis=0).toarray().ravel().astype(np.float64)
    shares = outliers.type_shares(training.counts, training.predicted)
    return {
        "counts_far_above": {side: outliers.counts_far_above(of[0], largest_G) for side, of in sides.items()},
        "zeros_of_abundant_genes": {side: outliers.zeros_of_abundant_genes(*of, shares) for side, of in sides.items()},
    }


def _memorisation_metrics(
    cells: dict[str, Cells], has_training: bool, clock: Clock, rng: np.random.Generator
) -> dict[str, dict]:
    """Distances to the nearest training cell and exact duplicates; real-vs-real from halves."""
    real, generated, training = cells["real"], cells["generated"], cells["reference"]
    found: dict[str, dict] = {
        "memorisation_distance_ratio": {},
        "memorisation_near_fraction": {},
        "training_duplicates": {},
    }
    with clock.time("duplicates"):
        prints = {side: memorisation.cell_fingerprints(c.counts) for side, c in cells.items()}
        repeats = {side: memorisation.n_repeats(prints[side]) for side in ("real", "generated")}
        found["generated_duplicates"] = {"value": repeats["generated"], "real_vs_real": repeats["real"]}
    if not has_training:
        return found
    with clock.time("memorisation"):
        near = memorisation.nearest_distances(generated.components, training.components)
        held_out = memorisation.nearest_distances(real.components, training.components)
        ratios, shares = [], []
        for _ in range(_CHEAP_SPLITS):
            a, b = np.array_split(rng.permutation(held_out), 2)
            ratios.append(depth.ratio(np.median(b), np.median(a)))
            shares.append(float((b < np.quantile(a, 0.01)).mean()))
        found["memorisation_distance_ratio"] = {
            "value": depth.ratio(np.median(near), np.median(held_out)),
            "real_vs_real": ratios,
        }
        found["memorisation_near_fraction"] = {
            "value": float((near < np.quantile(held_out, 0.01)).mean()),
            "real_vs_real": shares,
        }
        found["training_duplicates"] = {
            "value": memorisation.n_copies(prints["generated"], prints["reference"]),
            "real_vs_real": memorisation.n_copies(prints["real"], prints["reference"]),
        }
    return found


def _tables(
    cells: dict[str, Cells], space: Space, names: pd.Index, clock: Clock, rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """Tables for pictures: cells, genes, proportions."""
    real, generated = cells["real"], cells["generated"]
    with clock.time("tables"):
        columns: dict[str, object] = {"gene": names}
        for side, c in (("real", real), ("generated", generated)):
            moments = genes.gene_moments(c.counts)
            columns |= {f"mean_{side}": moments.mean, f"variance_{side}": moments.variance}
            columns[f"zero_fraction_{side}"] = moments.zero_fraction
            columns[f"mean_lognorm_{side}"] = embedding.mean_log_expression(c.counts, space.target_sum)
        shown = [c.take(np.sort(rng.permutation(c.n)[:_MOST_CELLS_MAP])) for c in (real, generated)]
        markers = _markers(cells["reference"], space)
    with clock.time("umap"):
        xy = embedding.umap_coordinates(np.concatenate([c.components for c in shown]), space.seed)
    expression = np.concatenate(
        [embedding.log_normalise(c.counts, space.target_sum)[:, markers].toarray() for c in shown]
    )
    cell_table = pd.DataFrame(
        {
            "source": np.repeat(["real", "generated"], [c.n for c in shown]),
            "cell_type": np.concatenate([c.labels for c in shown]),
            "predicted_cell_type": np.concatenate([c.predicted for c in shown]),
            "total_counts": np.concatenate([depth.total_counts(c.counts) for c in shown]),
            "n_genes": np.concatenate([c.depth.detected for c in shown]),
            "umap1": xy[:, 0],
            "umap2": xy[:, 1],
            **{f"gene:{names[gene]}": expression[:, i] for i, gene in enumerate(markers)},
        }
    )
    shares = pd.DataFrame({"cell_type": space.classifier.types if space.classifier else []})
    for side, c in (("real", real), ("generated", generated)):
        shares[side] = cell_types.proportions(c.predicted, tuple(shares["cell_type"]))
        if (c.labels != "").any():
            shares[f"labelled_{side}"] = cell_types.proportions(c.labels[c.labels != ""], tuple(shares["cell_type"]))
    shares = shares.sort_values("real", ascending=False, kind="stable")
    return {"cells.csv.gz": cell_table, "genes.csv.gz": pd.DataFrame(columns), "proportions.csv": shares}


def _markers(reference: Cells, space: Space) -> list[int]:
    """Columns of up to twelve telling genes: one per frequent type, or the most variable ones without types."""
    rows = slice(0, _MOST_CELLS_PCA)
    expression = embedding.log_normalise(reference.counts[rows], space.target_sum)[:, space.pca.genes]
    chosen = cell_types.marker_genes(expression, reference.labels[rows], _MOST_MARKERS)
    if not chosen:
        chosen = np.argsort(-genes.gene_moments(expression).variance, kind="stable")[:_MOST_MARKERS].tolist()
    return [int(space.pca.genes[gene]) for gene in chosen]


def _file_facts(matrix) -> dict:
    return {
        "name": Path(matrix.source).name,
        "fingerprint": matrix.fingerprint,
        "cells": matrix.n_cells,
        "genes": matrix.n_genes,
    }
