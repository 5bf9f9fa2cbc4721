"""Fixtures shared by the tests: a small real data set, tiny configurations, and one run trained on it."""

import os
import signal
import sys

# Before torch: the same sums in the same order on every machine, and no pool of threads that a fork would wait for.
# So whatever the caller says: `make test` exports the number of cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"  # what scanpy does with numba sets the number of torch's threads, for good

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from lingshu_cell.config import Config, load_config
from lingshu_cell.datasets import pbmc3k_path

# A shell starts what it runs in the background without Ctrl-C, and the commands that are tested would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FORKING = ("test_faults.py", "test_prepare.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: a fork of a process in which jax or torch have threads may wait for ever."""
    items.sort(key=lambda item: item.path.name not in FORKING)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that leaves torch with more threads makes all that follow several times slower on a busy machine."""
    yield
    if torch := sys.modules.get("torch"):
        assert torch.get_num_threads() == 1, "torch has more than one thread from here on"


SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

SCREEN_SPLIT = """
perturbation_key = "drug"
control = "none"
identity_key = "line"
allow_in_combinations = true
[held_out]
pairs = [{ line = "L2", drug = "P" }]
identities = ["L3"]
controls = "held out"
"""

TINY_SET = {"gene_width": 8, "width": 16, "n_blocks": 1, "feedforward_width": 32, "dropout": 0.1}
TINY_TRANSFORMER = {
    "kind": "transformer", "width": 32, "n_blocks": 2, "n_heads": 2, "feedforward_width": 64, "genes_per_group": 8,
}  # fmt: skip


def real_cells(n_cells: int, n_genes: int, least_detected: int = 3) -> ad.AnnData:
    """Take every k-th cell of PBMC 3k, and genes spread evenly from the most to the least detected."""
    adata = ad.read_h5ad(pbmc3k_path())
    adata = adata[:: adata.n_obs // n_cells][:n_cells]
    n_detected = np.asarray((adata.X > 0).sum(0)).ravel()
    by_detection = np.argsort(-n_detected, kind="stable")[: int((n_detected >= least_detected).sum())]
    chosen = by_detection[np.linspace(0, len(by_detection) - 1, n_genes).astype(int)]
    assert len(np.unique(chosen)) == n_genes
    return adata[:, np.sort(chosen)].copy()


def tiny_config(preset: str = "small", **sections: dict[str, Any]) -> Config:
    """Shrink a preset until 20 steps take about a second; ``sections`` have the last word."""
    base = {
        "data": {"condition_keys": ["cell_type"], "validation_fraction": 0.2},
        "network": TINY_SET if preset == "small" else TINY_TRANSFORMER,
        "training": {
            "steps": 20, "minibatch_size": 32, "warmup_steps": 5, "validate_every": 5, "checkpoint_every": 10,
            "condition_dropout": 0.1, "device": "cpu",
        },
        "generation": {"steps": 8, "minibatch_size": 16, "tile_size": 8},
    }  # fmt: skip
    overrides = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base}
    return load_config(preset, overrides=overrides)


@pytest.fixture(scope="session")
def pbmc() -> ad.AnnData:
    """240 real cells × 150 genes."""
    return real_cells(240, 150)


@pytest.fixture(scope="session")
def trained_run(pbmc: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, conditioned on the cell type; tests must not change it."""
    from lingshu_cell.train import train

    run = tmp_path_factory.mktemp("trained") / "run"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cells without any counts")
        train([pbmc], run, tiny_config())
    return run
