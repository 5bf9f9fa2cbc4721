"""Whole inputs of every kind, small, from which the malformed ones are made."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

N_CELLS, N_GENES = 120, 40
TINY = {
    "network.width": 8, "network.gene_width": 4, "network.n_blocks": 1, "network.feedforward_width": 8,
    "training.steps": 2, "training.minibatch_size": 16, "training.warmup_steps": 1, "training.device": "cpu",
    "training.validate_every": 2, "generation.tile_size": 8, "generation.steps": 2, "generation.minibatch_size": 8,
}  # fmt: skip


def tiny() -> list[str]:
    """Settings under which training takes a fraction of a second."""
    return [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


def cells(n_cells: int = N_CELLS, n_genes: int = N_GENES, seed: int = 0) -> ad.AnnData:
    """Counts like those of a screen: two cell types, two targets, their combination, doses."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.6, 2.0, n_genes)
    types, targets = np.array(["B", "T"]), np.array(["control", "GENE1", "GENE2", "GENE1+GENE2"])
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(types[np.arange(n_cells) % 2]),
            "perturbation": pd.Categorical(targets[np.arange(n_cells) // 2 % 4]),
            "dose": np.where(np.arange(n_cells) // 2 % 4 == 0, 1.0, 10.0),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    counts = rng.poisson(rng.gamma(3.0, 1 / 3.0, (n_cells, 1)) * mean)
    counts[:, :4] += 1
    var = pd.DataFrame(index=[f"GENE{g}" for g in range(n_genes)])
    return ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def write_examples(folder: Path) -> Path:
    """Write ``cells.h5ad``, a run, a store, an evaluation of cells and one of responses, embeddings and a split."""
    from evaluation_example import write_example

    from lingshu_cell.run_config import run_config
    from lingshu_cell.train import train

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "cells.h5ad"
    cells().write_h5ad(source)
    cells().write_zarr(folder / "cells.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = [f"{key}={value}" for key, value in TINY.items()]
        for run, keys in (("run", ["cell_type"]), ("plain", [])):
            data = {"perturbation_key": "perturbation", "control": "control"} if keys else {}
            config = run_config(
                [source], folder / run, settings=settings, condition_keys=keys, overrides={"data": data}
            )
            train([source], folder / run, config)
        from lingshu_cell.prepare import prepare

        prepare([source], folder / "store", cells_per_shard=50)
        write_example(folder / "evaluation", shuffle=False)
    rng = np.random.default_rng(1)
    np.savez(folder / "genes.npz", genes=[f"GENE{g}" for g in range(N_GENES)], embeddings=rng.normal(size=(N_GENES, 3)))
    return folder
