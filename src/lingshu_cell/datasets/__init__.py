"""Real cells that come with the package."""

from pathlib import Path


def pbmc3k_path() -> Path:
    """Give the path of the bundled PBMC 3k set: 2,700 cells, 32,738 genes, raw counts, ``obs["cell_type"]``.

    Returns
    -------
    Path
        An ``.h5ad`` file inside the installed package; where it comes from is told in ``ATTRIBUTION.md`` beside it.

    References
    ----------
    10x Genomics, CC BY 4.0; Zheng et al. 2017, doi:10.1038/ncomms14049.
    """
    return Path(__file__).with_name("pbmc3k.h5ad")
