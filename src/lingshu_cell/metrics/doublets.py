"""Cells that look like two: Scrublet scores of real and generated cells among the same reference cells."""

import warnings

import numpy as np
import scipy.sparse as sp


def doublet_rates(
    reference: sp.csr_matrix, real: sp.csr_matrix, generated: sp.csr_matrix, seed: int, expected_rate: float = 0.05
) -> tuple[float, float] | None:
    """Share of generated and of held-out real cells that look more like doublets than most reference cells.

    One run of Scrublet (scanpy) scores all cells together; the threshold is the score that at most ``expected_rate`` of
    the reference cells exceed, since the automatic threshold is unstable for a few hundred cells.

    Parameters
    ----------
    reference, real, generated
        Raw counts, (cells, genes) with the same genes.
    seed
        Random state of the simulated doublets.
    expected_rate
        Share of reference cells above the threshold, 0…1.

    Returns
    -------
    Rate of generated cells and rate of real cells, each 0…1; None where Scrublet has too few cells or variable genes.

    Source
    ------
    Wolock, Lopez, Klein 2019, Cell Systems; ``scanpy.pp.scrublet``.
    """
    import anndata as ad
    import scanpy as sc

    stacked = sp.vstack([reference, real, generated], format="csr").astype(np.float32)
    part = np.repeat([0, 1, 2], [reference.shape[0], real.shape[0], generated.shape[0]])
    adata = ad.AnnData(stacked)
    adata.obs["part"] = part
    sc.pp.filter_cells(adata, min_genes=3)
    sc.pp.filter_genes(adata, min_cells=3)
    if adata.n_obs < 50 or adata.n_vars < 50:
        return None
    with warnings.catch_warnings():
        # A threshold of 1 calls no doublet, which makes Scrublet's summary divide by zero; only scores are used.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="scanpy")
        n_components = min(30, min(adata.shape) // 2)
        sc.pp.scrublet(
            adata,
            threshold=1.0,
            n_prin_comps=n_components,
            use_approx_neighbors=False,
            random_state=seed,
            verbose=False,
        )
    scores, part = adata.obs["doublet_score"].to_numpy(), adata.obs["part"].to_numpy()
    if not all((part == side).any() for side in range(3)):
        return None
    threshold = np.quantile(scores[part == 0], 1.0 - expected_rate)
    return float((scores[part == 2] > threshold).mean()), float((scores[part == 1] > threshold).mean())
