"""Make a perturbation screen of known truth and look at its cells before anything is measured on them.

``peers/sergio_screen.py`` makes it, in an environment of its own (``peers/make_venv.sh``); ``responses.py`` has it as
``sergio-pairs`` and ``sergio-targets``. Everything lies in ``build/simulated/`` and is not made again.

    python benchmarks/simulated_screen.py
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from data_sets import SIMULATED, simulated_file
from recording import ROOT, environment, markdown_table, write_result
from scipy import sparse

PEERS = ROOT / "benchmarks" / "peers"
PEER_PYTHON = PEERS / ".venv" / "bin" / "python"
CONTROL = "control"
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
LEAST_MEAN = 1.0  # expected counts in 10,000 of a gene that counts
PSEUDOCOUNT = 0.5  # in 10,000
EFFECTS_FROM = 5  # fewest genes changed by a quarter of a condition whose correlations are looked at


def make(seed: int) -> None:
    """Run the simulation.

    Raises
    ------
    SystemExit
        If its environment is not there.
    """
    if not PEER_PYTHON.is_file():
        raise SystemExit("SERGIO needs its environment: run benchmarks/peers/make_venv.sh")
    command = [PEER_PYTHON, PEERS / "sergio_screen.py", SIMULATED, "--seed", seed]
    if subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit("The simulation failed; see above")


def look(cells: ad.AnnData, truth: pd.DataFrame) -> dict[str, Any]:
    """Measure what a screen needs to be of use.

    Parameters
    ----------
    cells
        Raw counts, with ``line`` and ``perturbation``.
    truth
        Expected counts in 10,000 of every (line, perturbation).

    Returns
    -------
    dict
        Library sizes, zeros, and quantiles over conditions of: genes called between perturbed and control cells, the
        correlation and slope of measured on exact effects (all cells, control means measured too), and over pairs of
        lines the correlation of a knock-down's exact effects; the number of conditions with an effect.
    """
    from lingshu_cell.metrics.responses import rank_sum_test

    library = np.asarray(cells.X.sum(1)).ravel()
    normalised = sparse.csr_matrix(cells.X.multiply(1e4 / np.maximum(library, 1)[:, None]))
    logged = normalised.log1p()
    rows = cells.obs.groupby(["line", "perturbation"], observed=True).indices
    means = {key: np.asarray(normalised[where].mean(0)).ravel() for key, where in rows.items()}
    called, changed, correlations, slopes, effects = [], [], [], [], {}
    for (line, target), where in rows.items():
        if target == CONTROL:
            continue
        called.append(rank_sum_test(logged[rows[line, CONTROL]], logged[where]).n_significant)
        before, after = (truth.loc[(line, name)].to_numpy() for name in (CONTROL, target))
        genes = (np.maximum(before, after) >= LEAST_MEAN) & (truth.columns != target)
        exact = np.log((after + PSEUDOCOUNT) / (before + PSEUDOCOUNT))
        measured = np.log((means[line, target] + PSEUDOCOUNT) / (means[line, CONTROL] + PSEUDOCOUNT))
        changed.append(int((np.abs(exact[genes]) >= np.log(1.25)).sum()))
        if changed[-1] >= EFFECTS_FROM:
            correlations.append(float(np.corrcoef(measured[genes], exact[genes])[0, 1]))
            slopes.append(float(np.polyfit(exact[genes], measured[genes], 1)[0]))
            effects[line, target] = np.where(genes, exact, 0.0)
    pairs = [(a, b) for a in effects for b in effects if a[1] == b[1] and a[0] < b[0]]
    between = [float(np.corrcoef(effects[a], effects[b])[0, 1]) for a, b in pairs]
    return {
        "cells": cells.n_obs,
        "genes": cells.n_vars,
        "zeros": 1 - cells.X.nnz / (cells.n_obs * cells.n_vars),
        "conditions": len(called),
        "conditions_with_an_effect": len(effects),
        "quantiles": {
            "UMI of a cell": np.quantile(library, SHARES).tolist(),
            "genes called, rank-sum test": np.quantile(called, SHARES).tolist(),
            "genes that change by a quarter": np.quantile(changed, SHARES).tolist(),
            "r of measured and exact effects": np.quantile(correlations, SHARES).tolist(),
            "slope of measured on exact effects": np.quantile(slopes, SHARES).tolist(),
            "r of exact effects in two lines": np.quantile(between, SHARES).tolist(),
        },
    }


def main() -> None:
    """Make the screen if it is not there, look at it, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the simulation, where it is not made yet")
    args = parser.parse_args()
    facts = environment()
    if not (Path(SIMULATED) / "sergio.h5ad").is_file():
        make(args.seed)
    cells = ad.read_h5ad(simulated_file("sergio.h5ad"))
    truth = pd.read_csv(simulated_file("sergio-truth.csv"), index_col=[0, 1])
    found = look(cells, truth)
    simulation = json.loads(cells.uns["simulation"])
    rows = [[name, *values] for name, values in found["quantiles"].items()]
    notes = [
        f"{found['cells']:,} cells × {found['genes']} genes, {found['zeros']:.0%} zeros. {found['conditions']} "
        f"conditions (line, knock-down); in {found['conditions_with_an_effect']} of them {EFFECTS_FROM} genes or more "
        "change by a quarter, and the last three rows are of these.",
        f"Effects: log means of counts in 10,000 with pseudocount {PSEUDOCOUNT}, over genes with {LEAST_MEAN:g} "
        "expected count or more in 10,000, the perturbed gene left out. Exact: steady states without noise.",
        f"Simulation: `{json.dumps(simulation)}`.",
    ]
    write_result(
        "simulated_screen",
        "A perturbation screen of known truth, simulated by SERGIO v2: what its cells are like.",
        facts,
        found | simulation,
        [
            markdown_table(["quantiles", *(f"{share:.0%}" for share in SHARES)], rows),
            "\n".join(f"- {note}" for note in notes),
        ],
    )


if __name__ == "__main__":
    main()
