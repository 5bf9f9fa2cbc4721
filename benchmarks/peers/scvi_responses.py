"""Predict cells of pairs never trained with scVI; run with the Python of ``make_venv.sh``.

Two ways to go from the control cells of an identity to its perturbed cells, each with a model of its own:

* ``counterfactual``: the perturbation is scVI's batch covariate; control cells are encoded as control and decoded under
  the perturbation (what ``transform_batch`` does in scvi-tools).
* ``arithmetic``: scVI without covariates; the latent shift from control to perturbed cells, averaged over the other
  identities, is added to the latents of the control cells before they are decoded (scGen's rule, Lotfollahi et al.
  2019, doi:10.1038/s41592-019-0494-8, on the latent space of a model of counts).

scVI is trained on the most variable genes, as its authors advise; all others keep the counts of the control cell.
Counts are drawn from the negative binomial of each gene with the control cells' library sizes in these genes. Control
cells are "predicted" in the same ways, with no shift. Prints one line of JSON about the run.
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
from scvi_prior import DRAWN_AT_ONCE, LATENT_DIMENSIONS, MINIBATCH, MOST_EPOCHS, peak_memory_gib

TRIAL_STEPS = 12
METHODS = ("counterfactual", "arithmetic")


class CpuClock(Callback):
    """Notes the CPU time of this process at every step, and stops training after so many seconds of it."""

    def __init__(self, seconds: float) -> None:
        self.end, self.times = time.process_time() + seconds, []

    def on_train_batch_end(self, trainer: object, *arguments: object) -> None:
        """Look at the clock."""
        self.times.append(time.process_time())
        trainer.should_stop = trainer.should_stop or self.times[-1] >= self.end


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
    clock = CpuClock(cpu_seconds)
    trial.train(max_epochs=1, limit_train_batches=TRIAL_STEPS, callbacks=[clock], **fixed)
    per_step = (clock.times[-1] - clock.times[1]) / (TRIAL_STEPS - 2)  # the first steps are slower
    left = cpu_seconds - (time.process_time() - start)
    epochs = int(np.clip(left / per_step / -(-cells.n_obs // MINIBATCH), 1, MOST_EPOCHS))
    model = scvi.model.SCVI(cells, **sizes)
    warm_up = {"n_epochs_kl_warmup": max(epochs // 2, 1)}
    model.train(max_epochs=epochs, plan_kwargs=warm_up, callbacks=[CpuClock(max(left, 1.0))], **fixed)
    return model, model.trainer.current_epoch


def most_variable(counts: sparse.csr_matrix, n_genes: int) -> np.ndarray:
    """Choose the genes whose log normalised counts vary most, rising."""
    totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    log_counts = sparse.diags(1e4 / totals) @ counts
    log_counts.data = np.log1p(log_counts.data)
    mean = np.asarray(log_counts.mean(0)).ravel()
    variance = np.asarray(log_counts.power(2).mean(0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:n_genes])


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
    parser.add_argument("--genes", type=int, required=True, help="how many of the most variable genes are modelled")
    parser.add_argument("--cpu-seconds", type=float, required=True, help="for training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|scvi")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = args.seed
    keys = (args.identity_key, args.perturbation_key)
    cells = ad.read_h5ad(args.train)
    counts = sparse.csr_matrix(cells.X)
    modelled = most_variable(counts, args.genes)
    kept = ad.AnnData(counts[:, modelled].astype(np.float32), obs=cells.obs[list(keys)], var=cells.var.iloc[modelled])
    library = np.asarray(kept.X.sum(1), dtype=np.float64).ravel()
    kept, counts, library = kept[library > 0].copy(), counts[library > 0], library[library > 0]
    start = time.process_time()
    model, epochs = train(kept, args.method, args.perturbation_key, args.cpu_seconds)
    trained = time.process_time()
    rng, parts, labels = np.random.default_rng(args.seed), [], []
    others = sparse.diags(~np.isin(np.arange(cells.n_vars), modelled), dtype=np.int32, format="csr")
    place = sparse.csr_matrix(
        (np.ones(len(modelled), np.int32), (np.arange(len(modelled)), modelled)), (len(modelled), cells.n_vars)
    )
    everywhere = latents(model, kept) if args.method == "arithmetic" else None
    identity, label = (kept.obs[key].astype(str).to_numpy() for key in keys)
    for condition in json.loads(args.wanted.read_text(encoding="utf-8")):
        wanted = condition[args.perturbation_key]
        controls = np.flatnonzero((identity == condition[args.identity_key]) & (label == args.control))
        chosen = rng.choice(controls, condition["n"], replace=condition["n"] > len(controls))
        z, told = latents(model, kept[chosen]), wanted if args.method == "counterfactual" else None
        if args.method == "arithmetic" and wanted != args.control:
            z = z + latent_shift(everywhere, kept.obs, wanted, args.control, keys)
        parts.append(decode(model, z, library[chosen], told) @ place + counts[chosen].astype(np.int32) @ others)
        labels += [{key: condition[key] for key in keys}] * condition["n"]
    drawn = sparse.vstack(parts, format="csr")
    drawn.eliminate_zeros()
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
