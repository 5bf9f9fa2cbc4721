"""What each metric means: its unit, its good direction, how to read it, and what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lingshu_cell.errors import LingshuError, offenders


@dataclass(frozen=True)
class MetricInfo:
    """One row of the metric table.

    Parameters
    ----------
    better
        ``"higher"``, ``"lower"`` or ``"closer_to_real"`` (best when equal to the real-vs-real value).
    unit
        Unit of the value.
    description
        One sentence on how to read it.
    needs
        Why the value may be missing.
    """

    better: str
    unit: str
    description: str
    needs: str = "Needs at least 40 held-out real cells (60 without training cells) and 20 generated cells."


_LIKELIHOOD = "A likelihood has no real-vs-real value: compare it with that of other models on the same cells."
_TYPES = "Needs cell types: an obs column with at least two types of five or more reference cells (--cell-type-key)."
_TRAINING = "Needs the cells the model was trained on (--training)."
_CORRELATION = "Needs 30 cells of one type in the real and the generated cells, 60 in the reference, and varying genes."

CATALOGUE: dict[str, MetricInfo] = {
    "gene_mean_pearson": MetricInfo(
        "higher",
        "correlation",
        "Pearson correlation of mean log-normalised expression over genes; nearly every model reaches .99, so it only "
        "catches coarse failures.",
    ),
    "gene_mean_spearman": MetricInfo(
        "higher",
        "correlation",
        "Spearman correlation of mean log-normalised expression over detected genes; rarely expressed genes count as "
        "much as common ones.",
    ),
    "wasserstein": MetricInfo(
        "lower",
        "log1p expression",
        "1-Wasserstein distance of each gene's log-normalised expression, mean over detected genes: how far the values "
        "of a gene must be moved.",
    ),
    "wasserstein_expressed": MetricInfo(
        "lower",
        "log1p expression",
        "The same over genes found in at least 5 % of the reference cells, which silent genes cannot dilute.",
    ),
    "mmd2": MetricInfo(
        "lower",
        "sum of 5 kernels",
        "Squared maximum mean discrepancy in principal components (unbiased, so real against real is 0 on average and "
        "may be below): distance between the two clouds of cells.",
    ),
    "ilisi": MetricInfo(
        "higher",
        "0…1",
        "Whether each cell's neighbours are a mix of real and generated cells: 1 = well mixed, 0 = apart.",
    ),
    "classifier_auc_random_forest": MetricInfo(
        "lower",
        "AUC",
        "How well a random forest on principal components, library size and genes detected tells generated from real "
        "cells: .5 = cannot, 1 = always.",
    ),
    "classifier_auc_random_forest_all_cells": MetricInfo(
        "lower",
        "AUC",
        "The same with all cells instead of halves and more trees, which makes the forest sharper; for "
        "indistinguishable cells it is .5 at any number of cells, hence the same real-vs-real value.",
        "Needs 20 real and 20 generated cells, and 40 held-out real cells for the real-vs-real value.",
    ),
    "classifier_auc_logistic": MetricInfo(
        "lower",
        "AUC",
        "The same with a linear rule on principal components: above .5 means a shift of the whole cloud.",
    ),
    "classifier_auc_library_size": MetricInfo(
        "lower", "AUC", "The same from the total count of a cell alone (its log and the square of it)."
    ),
    "sd_log_umi_ratio": MetricInfo(
        "closer_to_real",
        "ratio",
        "Spread (SD) of log total counts, generated / real: below 1 means cells too alike in depth, as few-step "
        "sampling makes them.",
        "Needs at least two cells with different total counts on each side.",
    ),
    "mean_log_umi": MetricInfo(
        "closer_to_real",
        "ln counts",
        "Mean log total count of the generated cells; the real-vs-real value is that of the real cells.",
        "Needs cells.",
    ),
    "genes_detected_ratio": MetricInfo(
        "closer_to_real", "ratio", "Mean number of genes detected per cell, generated / real.", "Needs genes."
    ),
    "genes_detected_sd_ratio": MetricInfo(
        "closer_to_real",
        "ratio",
        "Spread (SD) of the number of genes detected per cell, generated / real.",
        "Needs at least two cells with different numbers of genes on each side.",
    ),
    "zero_fraction": MetricInfo(
        "closer_to_real",
        "fraction",
        "Share of zeros among all counts of the generated cells; the real-vs-real value is that of the real cells.",
        "Needs cells.",
    ),
    "zero_fraction_difference": MetricInfo(
        "lower",
        "fraction",
        "Absolute difference between the shares of zeros of generated and real cells.",
        "Needs cells.",
    ),
    "counts_far_above": MetricInfo(
        "closer_to_real",
        "fraction of cells",
        "Share of cells with a count above five times the largest that training cells show of the gene (and above 15). "
        "Some protocols make a few (PBMC 3k); a count of 10,000 is most of a cell, and no average shows it.",
        _TRAINING,
    ),
    "zeros_of_abundant_genes": MetricInfo(
        "closer_to_real",
        "fraction",
        "Share of zeros among genes of which a cell should have 20 counts or more, by its total and the training cells "
        "of its predicted type.",
        "Needs the cells the model was trained on (--training), and cells with so many counts of a gene.",
    ),
    "mean_variance_error": MetricInfo(
        "lower",
        "nats",
        "Difference of genes' log variance at a given mean count, mean over ten groups of genes with similar mean: "
        "whether the mean-variance relation is the real one.",
    ),
    "mean_variance_bias": MetricInfo(
        "closer_to_real", "nats", "The same with its sign: below 0 means genes vary too little, above 0 too much."
    ),
    "gene_correlation_error": MetricInfo(
        "lower",
        "correlation",
        "Root-mean-square error of gene-gene correlations within the most frequent cell type, against many reference "
        "cells; its floor comes from the number of cells, so read it between real-vs-real and shuffled. Real-vs-real: "
        "as many cells, drawn again and again from all real ones.",
        _CORRELATION,
    ),
    "gene_correlation_slope": MetricInfo(
        "closer_to_real",
        "slope",
        "Strength of gene-gene correlations within the most frequent cell type: 1 = as in real cells, 0 = genes "
        "independent of each other.",
        _CORRELATION,
    ),
    "proportion_max_error": MetricInfo(
        "lower",
        "fraction of cells",
        "Largest error of a cell type's share (types above 5 %), by a classifier trained on real cells and applied to "
        "both sides; real-vs-real is what sampling this many cells costs.",
        _TYPES,
    ),
    "label_accuracy": MetricInfo(
        "higher",
        "fraction of cells",
        "Share of generated cells whose requested cell type the classifier confirms; real-vs-real is its share on "
        "held-out real labels.",
        "Needs the cell-type column in the generated file too, and cell types among the reference cells.",
    ),
    "marker_overlap": MetricInfo(
        "higher",
        "fraction of genes",
        "Share of the 20 best marker genes of each predicted type (t-test) that real and generated cells share.",
        "Needs at least two predicted cell types with ten cells on both sides of a comparison.",
    ),
    "doublet_rate": MetricInfo(
        "closer_to_real",
        "fraction of cells",
        "Share of generated cells with a Scrublet score that at most 5 % of reference cells exceed: above real-vs-real "
        "means cells mixed of two types.",
        "Needs enough cells and variable genes for Scrublet.",
    ),
    "memorisation_distance_ratio": MetricInfo(
        "closer_to_real",
        "ratio",
        "Median distance to the nearest training cell, generated / held-out real: well below 1 means copying or "
        "cells too average, above 1 means cells away from the data.",
        _TRAINING,
    ),
    "memorisation_near_fraction": MetricInfo(
        "closer_to_real",
        "fraction of cells",
        "Share of generated cells nearer to a training cell than 99 % of held-out real cells are: .01 expected, "
        "far more means copying.",
        _TRAINING,
    ),
    "training_duplicates": MetricInfo(
        "lower",
        "cells",
        "Generated cells that equal a training cell in every gene; the real-vs-real value counts held-out real cells.",
        _TRAINING,
    ),
    "generated_duplicates": MetricInfo(
        "lower",
        "cells",
        "Generated cells that repeat another generated cell in every gene; the real-vs-real value counts real cells.",
        "Needs cells.",
    ),
    "nelbo_nats_per_cell": MetricInfo(
        "lower",
        "nats per cell",
        "Upper bound on the negative log-likelihood of held-out cells under the model.",
        _LIKELIHOOD,
    ),
    "nelbo_bits_per_gene": MetricInfo("lower", "bits per gene", "The same per gene, in bits.", _LIKELIHOOD),
}


def entry(name: str, sides: Mapping[str, object]) -> dict:
    """Make one entry of metrics.json from the values of each side.

    Parameters
    ----------
    name
        A name of the catalogue.
    sides
        ``"value"``, ``"real_vs_real"``, ``"shuffled"`` → a number, None, or a list with one of these per split;
        a list becomes its mean, and ``<side>_sd`` its standard deviation (ddof 1).

    Returns
    -------
    value, real_vs_real, better, unit, description; shuffled where there is one, why where one of the first two is None.
    """
    info = CATALOGUE[name]
    result: dict[str, object] = {"value": None, "real_vs_real": None}
    for side, values in sides.items():
        usable = [v for v in (values if isinstance(values, list) else [values]) if v is not None and np.isfinite(v)]
        if usable and isinstance(values, list):
            result[side] = float(np.mean(usable))
            if len(usable) > 1:
                result[f"{side}_sd"] = float(np.std(usable, ddof=1))
        elif usable:
            result[side] = usable[0]
    result |= {"better": info.better, "unit": info.unit, "description": info.description}
    if result["value"] is None or result["real_vs_real"] is None:
        result["why"] = info.needs
    return result


def likelihood_entries(nelbo: Mapping[str, float]) -> dict[str, dict]:
    """Make entries of the likelihood that the model's side computed; it has no real-vs-real value.

    Parameters
    ----------
    nelbo
        ``nats_per_cell`` and/or ``bits_per_gene``, finite numbers.

    Returns
    -------
    ``nelbo_nats_per_cell`` and/or ``nelbo_bits_per_gene`` → entry.

    Raises
    ------
    LingshuError
        If there is another key.
    """
    unknown = [name for name in nelbo if f"nelbo_{name}" not in CATALOGUE]
    if unknown:
        raise LingshuError(
            "nelbo holds nats_per_cell and bits_per_gene", f"found {offenders(unknown)}", "Leave the others out"
        )
    return {f"nelbo_{name}": entry(f"nelbo_{name}", {"value": value}) for name, value in nelbo.items()}
