"""Train scVI on counts for a given CPU time and draw cells from its prior; run with the Python of ``make_venv.sh``.

Lopez et al. 2018, doi:10.1038/s41592-018-0229-2, as in scvi-tools. Prints one line of JSON about the run.
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
import scvi
import torch
from scipy import sparse
from scipy.stats import gaussian_kde

LATENT_DIMENSIONS = 20
MIN_CELLS_PER_GENE = 3  # as lingshu-cell does; the rest is written as zero
TRAINED_SHARE = 0.9  # scVI's own choice, and lingshu-cell's: the rest is for validation
MOST_EPOCHS = 400  # scVI's own choice for data sets below 20,000 cells
MINIBATCH = 128
DRAWN_AT_ONCE = 256


def train(modelled: ad.AnnData, seconds: float) -> tuple[scvi.model.SCVI, int, float]:
    """Train for about so many CPU seconds, with a KL warm-up that ends at half of the epochs.

    scVI's schedules count epochs. Three epochs of a throw-away model tell how many fit into the time; without this, the
    usual warm-up over 400 epochs would leave the prior unfitted when the time ends.

    Parameters
    ----------
    modelled
        Counts of the modelled genes.
    seconds
        CPU time for everything, the throw-away epochs included.

    Returns
    -------
    tuple
        The model, the number of epochs it was trained, and the CPU seconds these took.
    """
    start = time.process_time()
    scvi.model.SCVI.setup_anndata(modelled)
    fixed = {"train_size": TRAINED_SHARE, "batch_size": MINIBATCH, "enable_progress_bar": False, "logger": False}
    trial = scvi.model.SCVI(modelled, n_latent=LATENT_DIMENSIONS, gene_likelihood="nb")
    trial.train(max_epochs=1, **fixed)  # the first epoch is slower
    trial_start = time.process_time()
    trial.train(max_epochs=2, **fixed)
    left = seconds - (time.process_time() - start)
    epochs = int(np.clip(left / ((time.process_time() - trial_start) / 2), 1, MOST_EPOCHS))
    model = scvi.model.SCVI(modelled, n_latent=LATENT_DIMENSIONS, gene_likelihood="nb")
    fit_start = time.process_time()
    model.train(
        max_epochs=epochs,
        plan_kwargs={"n_epochs_kl_warmup": max(epochs // 2, 1)},
        **fixed,
    )
    return model, model.trainer.current_epoch, time.process_time() - fit_start


@torch.no_grad()
def draw(model: scvi.model.SCVI, library: np.ndarray) -> sparse.csr_matrix:
    """Draw one cell per library size: z ~ N(0, I), then the negative binomial of each gene.

    Parameters
    ----------
    model
        Trained model.
    library
        Total counts of the cells to draw, above 0.

    Returns
    -------
    scipy.sparse.csr_matrix
        Counts, int32, cells × modelled genes.
    """
    module, pieces = model.module.eval(), []
    for total in np.array_split(library, -(-len(library) // DRAWN_AT_ONCE)):
        z = torch.randn(len(total), LATENT_DIMENSIONS, device=model.device)
        log_library = torch.log(torch.from_numpy(total.astype(np.float32)))[:, None].to(model.device)
        batch_index = torch.zeros(len(total), 1, device=model.device)
        counts = module.generative(z=z, library=log_library, batch_index=batch_index)["px"].sample()
        pieces.append(sparse.csr_matrix(counts.cpu().numpy().astype(np.int32)))
    return sparse.vstack(pieces, format="csr")


def nelbo_nats_per_cell(model: scvi.model.SCVI, held_out: ad.AnnData, library: np.ndarray) -> float:
    """Bound the negative log-likelihood of held-out cells from above, mean over the cells.

    scVI takes a cell's total count as given. As the total is a function of the counts, p(x) ≥ p(total) p(x | total);
    p(total) is a kernel density of the training cells' log totals, which costs about eight nats.

    Parameters
    ----------
    model
        Trained model.
    held_out
        Held-out counts of the modelled genes.
    library
        Total counts of the training cells.

    Returns
    -------
    float
        Nats per cell.
    """
    log_total = np.log(np.asarray(held_out.X.sum(1), dtype=np.float64).ravel())
    density = gaussian_kde(np.log(library[library > 0]))(log_total)
    log_p_total = np.log(density) - log_total  # d log(total) = d total / total
    return -float(model.get_elbo(held_out)) - float(log_p_total.mean())


def main() -> None:
    """Train, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, metavar="TRAIN.h5ad")
    parser.add_argument("held_out", type=Path, metavar="HELDOUT.h5ad", help="cells for the bound on the likelihood")
    parser.add_argument("out", type=Path, metavar="OUT.h5ad")
    parser.add_argument("--n", type=int, required=True, help="cells to draw")
    parser.add_argument("--cpu-seconds", type=float, required=True, help="CPU time for training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|scvi")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = args.seed
    cells = ad.read_h5ad(args.train)
    counts = sparse.csr_matrix(cells.X)
    modelled = np.flatnonzero(np.bincount(counts.nonzero()[1], minlength=cells.n_vars) >= MIN_CELLS_PER_GENE)
    kept = counts[:, modelled]
    start = time.process_time()
    trained_on = ad.AnnData(kept.astype(np.float32), var=cells.var.iloc[modelled])
    model, epochs, fit_seconds = train(trained_on, args.cpu_seconds)
    trained = time.process_time()
    rng = np.random.default_rng(args.seed)
    library = np.asarray(kept.sum(1), dtype=np.float64).ravel()
    drawn = draw(model, rng.choice(library[library > 0], args.n)).tocoo()
    drawn = sparse.csr_matrix((drawn.data, (drawn.row, modelled[drawn.col])), shape=(args.n, cells.n_vars))
    generated = ad.AnnData(drawn, var=cells.var[[]].copy())
    generated.obs_names = [f"scvi-{args.seed}-{i}" for i in range(args.n)]
    drawn_after = time.process_time()
    generated.write_h5ad(args.out)
    held_out = sparse.csr_matrix(ad.read_h5ad(args.held_out).X)[:, modelled].astype(np.float32)
    nelbo = nelbo_nats_per_cell(model, ad.AnnData(held_out, var=cells.var.iloc[modelled]), library)
    facts = {
        "training_cpu_seconds": trained - start,
        "training_cells_per_cpu_second": epochs * TRAINED_SHARE * cells.n_obs / fit_seconds,
        "training_steps": epochs * -(-round(TRAINED_SHARE * cells.n_obs) // MINIBATCH),
        "epochs": epochs,
        "minibatch_size": MINIBATCH,
        "generation_cpu_seconds": drawn_after - trained,
        "generation_steps": 1,
        "n_modelled_genes": len(modelled),
        "n_parameters": sum(p.numel() for p in model.module.parameters()),
        "nelbo": {"nats_per_cell": nelbo, "bits_per_gene": nelbo / len(modelled) / np.log(2)},
        "peak_memory_gib": peak_memory_gib(),
        "versions": {name: version(name) for name in ("scvi-tools", "torch", "lightning", "anndata", "numpy")},
    }
    json.dump(facts, sys.stdout)
    print()


def peak_memory_gib() -> float:
    """Give the largest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main()
