"""Predict cells of pairs never trained with scVI; run with the Python of ``make_venv.sh``.

Two ways to go from the control cells of an identity to its perturbed cells, each with a model of its own:

* ``counterfactual``: the perturbation is scVI's batch covariate; control cells are encoded as control and decoded under
  the perturbation (what ``transform_batch`` does in scvi-tools).
* ``arithmetic``: scVI without covariates; the latent shift from control to perturbed cells, averaged over the other
  identities, is added to the latents of the control cells before they are decoded (scGen's rule, Lotfollahi et al.
  2019, doi:10.1038/s41592-019-0494-8, on the latent space of a model of counts).

Counts are drawn from the negative binomial of each gene with the library sizes of the control cells. Control cells are
"predicted" in the same ways, with no shift. Prints one line of JSON about the run.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from scvi_prior import DRAWN_AT_ONCE, LATENT_DIMENSIONS, MIN_CELLS_PER_GENE, MINIBATCH, MOST_EPOCHS, peak_memory_gib

TRIAL_STEPS = 8
METHODS = ("counterfactual", "arithmetic")


class CpuLimit(Callback):
    """Stops training when this process has spent so many CPU seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.process_time() + seconds

    def on_train_batch_end(self, trainer: object, *arguments: object) -> None:
        """Look at the clock."""
        trainer.should_stop = trainer.should_stop or time.process_time() >= self.end


def train(cells: ad.AnnData, method: str, perturbation_key: str, cpu_seconds: float) -> tuple[scvi.model.SCVI, int]:
    """Train for at most so many CPU seconds, with a KL warm-up that ends at half of the epochs that fit into them.

    Parameters
    ----------
    cells
        Counts of the modelled genes.
    method
        One of ``METHODS``.
    perturbation_key
        obs column of perturbations.
    cpu_seconds
        For everything, the few steps of a throw-away model that tell how long one takes included.

    Returns
    -------
    tuple
        The model, and the number of epochs it was trained.
    """
    start = time.process_time()
    told = method == "counterfactual"
    scvi.model.SCVI.setup_anndata(cells, batch_key=perturbation_key if told else None)
    sizes = {"n_latent": LATENT_DIMENSIONS, "gene_likelihood": "nb", "encode_covariates": told}
    fixed = {"train_size": 1.0, "batch_size": MINIBATCH, "enable_progress_bar": False, "logger": False}
    trial = scvi.model.SCVI(cells, **sizes)
    trial.train(max_epochs=1, limit_train_batches=1, **fixed)  # the first step is slower
    trial_start = time.process_time()
    trial.train(max_epochs=1, limit_train_batches=TRIAL_STEPS, **fixed)
    per_step = (time.process_time() - trial_start) / TRIAL_STEPS
    left = cpu_seconds - (time.process_time() - start)
    epochs = int(np.clip(left / per_step / -(-cells.n_obs // MINIBATCH), 1, MOST_EPOCHS))
    model = scvi.model.SCVI(cells, **sizes)
    warm_up = {"n_epochs_kl_warmup": max(epochs // 2, 1)}
    model.train(max_epochs=epochs, plan_kwargs=warm_up, callbacks=[CpuLimit(max(left, 1.0))], **fixed)
    return model, model.trainer.current_epoch


def latents(model: scvi.model.SCVI, cells: ad.AnnData) -> np.ndarray:
    """Encode cells: a draw from each cell's posterior, cells × latent dimensions."""
    return model.get_latent_representation(cells, give_mean=False)


@torch.no_grad()
def decode(model: scvi.model.SCVI, z: np.ndarray, library: np.ndarray, perturbation: str | None) -> sparse.csr_matrix:
    """Draw counts for latents and library sizes, under a perturbation where the model knows them.

    Returns
    -------
    scipy.sparse.csr_matrix
        Counts, int32, cells × modelled genes.
    """
    module, pieces = model.module.eval(), []
    registry = model.adata_manager.get_state_registry(scvi.REGISTRY_KEYS.BATCH_KEY)
    place = 0 if perturbation is None else list(registry.categorical_mapping).index(perturbation)
    for rows in np.array_split(np.arange(len(z)), -(-len(z) // DRAWN_AT_ONCE)):
        counts = module.generative(
            z=torch.from_numpy(z[rows]).float(),
            library=torch.from_numpy(np.log(library[rows]).astype(np.float32))[:, None],
            batch_index=torch.full((len(rows), 1), place),
        )["px"].sample()
        pieces.append(sparse.csr_matrix(counts.numpy().astype(np.int32)))
    return sparse.vstack(pieces, format="csr")


def latent_shift(
    z: np.ndarray, obs: pd.DataFrame, perturbation: str, control: str, keys: tuple[str, str]
) -> np.ndarray:
    """Average the shift of mean latents from control to perturbed cells over all identities that have both."""
    identity, label = (obs[key].astype(str).to_numpy() for key in keys)
    shifts = [
        z[(identity == one) & (label == perturbation)].mean(0) - z[(identity == one) & (label == control)].mean(0)
        for one in sorted(set(identity[label == perturbation]) & set(identity[label == control]))
    ]
    return np.mean(shifts, axis=0)


def main() -> None:
    """Train, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, metavar="TRAIN.h5ad")
    parser.add_argument("wanted", type=Path, metavar="WANTED.json", help="list of conditions, each with n cells")
    parser.add_argument("out", type=Path, metavar="OUT.h5ad")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--perturbation-key", required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--identity-key", required=True)
    parser.add_argument("--cpu-seconds", type=float, required=True, help="for training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|scvi")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = args.seed
    keys = (args.identity_key, args.perturbation_key)
    cells = ad.read_h5ad(args.train)
    counts = sparse.csr_matrix(cells.X)
    modelled = np.flatnonzero(np.bincount(counts.nonzero()[1], minlength=cells.n_vars) >= MIN_CELLS_PER_GENE)
    kept = ad.AnnData(counts[:, modelled].astype(np.float32), obs=cells.obs[list(keys)], var=cells.var.iloc[modelled])
    library = np.asarray(kept.X.sum(1), dtype=np.float64).ravel()
    kept, library = kept[library > 0].copy(), library[library > 0]
    start = time.process_time()
    model, epochs = train(kept, args.method, args.perturbation_key, args.cpu_seconds)
    trained = time.process_time()
    rng, parts, labels = np.random.default_rng(args.seed), [], []
    everywhere = latents(model, kept) if args.method == "arithmetic" else None
    identity, label = (kept.obs[key].astype(str).to_numpy() for key in keys)
    for condition in json.loads(args.wanted.read_text(encoding="utf-8")):
        wanted = condition[args.perturbation_key]
        controls = np.flatnonzero((identity == condition[args.identity_key]) & (label == args.control))
        chosen = rng.choice(controls, condition["n"], replace=condition["n"] > len(controls))
        z, told = latents(model, kept[chosen]), wanted if args.method == "counterfactual" else None
        if args.method == "arithmetic" and wanted != args.control:
            z = z + latent_shift(everywhere, kept.obs, wanted, args.control, keys)
        parts.append(decode(model, z, library[chosen], told))
        labels += [{key: condition[key] for key in keys}] * condition["n"]
    drawn = sparse.vstack(parts).tocoo()
    drawn = sparse.csr_matrix((drawn.data, (drawn.row, modelled[drawn.col])), shape=(drawn.shape[0], cells.n_vars))
    names = [f"scvi-{args.method}-{args.seed}-{i}" for i in range(len(labels))]
    predicted = ad.AnnData(drawn, obs=pd.DataFrame(labels, index=names).astype("category"), var=cells.var[[]].copy())
    predicted.write_h5ad(args.out)
    facts = {
        "train_cpu_seconds": trained - start,
        "generate_cpu_seconds": time.process_time() - trained,
        "generated_cells": predicted.n_obs,
        "epochs": epochs,
        "n_modelled_genes": len(modelled),
        "n_parameters": sum(p.numel() for p in model.module.parameters()),
        "peak_memory_gib": peak_memory_gib(),
        "versions": {name: version(name) for name in ("scvi-tools", "torch", "lightning", "anndata", "numpy")},
    }
    json.dump(facts, sys.stdout)
    print()


if __name__ == "__main__":
    main()
