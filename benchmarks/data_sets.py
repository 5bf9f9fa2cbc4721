"""The data sets of the benchmarks by name, and the one way in which their cells are held out."""

from pathlib import Path

import anndata as ad
import numpy as np

from lingshu_cell.data.splits import split_cells
from lingshu_cell.datasets import pbmc3k_path

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SIMULATED = Path(__file__).resolve().parents[1] / "build" / "simulated"
NAMES = ("pbmc3k", "marrow_cd34", "dentate_gyrus_mouse", "pancreas_h2c", "pbmc8k", "fly_embryo")
HELD_OUT = 0.1
_NOT_UMI = ("CEL-seq2",)  # assays of pancreas_h2c whose counts are reads
_SEED = 0


def read_cells(name_or_path: str, max_cells: int | None = None) -> ad.AnnData:
    """Read a data set.

    Parameters
    ----------
    name_or_path
        One of ``NAMES`` (``pbmc3k`` comes with the package, the others lie in ``../shared/data``) or an h5ad file.
    max_cells
        Keep so many random cells; None keeps all.

    Raises
    ------
    SystemExit
        If there is no such file.
    """
    path = pbmc3k_path() if name_or_path == "pbmc3k" else Path(name_or_path)
    if name_or_path in NAMES[1:]:
        path = SHARED / f"{name_or_path}.h5ad"
    if not path.is_file():
        raise SystemExit(f"--data: {name_or_path} is none of {', '.join(NAMES)} whose file is here, and no h5ad file")
    cells = ad.read_h5ad(path)
    if name_or_path == "pancreas_h2c":
        cells = cells[~cells.obs["assay"].isin(_NOT_UMI)]
    if max_cells is not None and cells.n_obs > max_cells:
        cells = cells[np.sort(np.random.default_rng(_SEED).permutation(cells.n_obs)[:max_cells])]
    return cells.copy()


def split_files(cells: ad.AnnData, folder: Path) -> tuple[Path, Path]:
    """Write nine tenths of the cells to ``train.h5ad`` and one tenth to ``heldout.h5ad``, split by seed 0.

    Parameters
    ----------
    cells
        All cells.
    folder
        Where to; made if absent.

    Returns
    -------
    tuple of Path
        The training and the held-out file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.h5ad", folder / "heldout.h5ad"
    for path, rows in zip((train, held_out), split_cells(cells.n_obs, HELD_OUT, _SEED), strict=True):
        cells[rows].copy().write_h5ad(path)
    return train, held_out


def shared_file(name: str) -> Path:
    """Give a file that lies in ``../shared/data``.

    Raises
    ------
    SystemExit
        If it is not there.
    """
    path = SHARED / name
    if not path.is_file():
        raise SystemExit(f"{name} is not in ../shared/data")
    return path


def simulated_file(name: str) -> Path:
    """Give a file that ``simulated_screen.py`` makes.

    Raises
    ------
    SystemExit
        If it is not made yet.
    """
    path = SIMULATED / name
    if not path.is_file():
        raise SystemExit(f"{name} is not in build/simulated: run benchmarks/simulated_screen.py first")
    return path
