"""One model of all data sets against one model of each: NELBO and fidelity on the same held-out cells of each set.

    python benchmarks/many_data_sets.py --seconds 40 --cells 1500

Rule of the budget: each set's own model is trained for so many CPU seconds of training steps; the one model of n sets
for n times as many, and draws all sets equally often (training.balance = 1, conditioned on data_set). So both spend the
same CPU seconds per set. Genes are named and joined once, by ``lingshu prepare`` (HGNC aliases, mouse genes by their
human orthologs, other species with genes of their own); own models are trained on the same cells in the same names. The
NELBO is that of the genes which the set's own model models, under the same masks.

Cells, models and tables that are in ``build/many-data-sets`` already are not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from data_sets import HELD_OUT, SHARED, read_cells, split_files
from recording import ROOT, environment, markdown_table, run_in_child, say, show, write_result

from lingshu_cell.data.store import open_store
from lingshu_cell.evaluate import evaluate_files
from lingshu_cell.model import LingshuCell
from lingshu_cell.prepare import NameTables, prepare
from lingshu_cell.run_config import run_config
from lingshu_cell.train import train

SETS = {
    "pbmc3k": "human", "kang_ifnb_allgenes": "human", "pancreas_h2c": "human", "marrow_cd34": "human",
    "dentate_gyrus_mouse": "mouse", "mousebrain_zeisel18": "mouse", "chicken_embryo": "chicken",
}  # fmt: skip
LEFT_OUT = (
    "Left out: the panels of 299, 300 and 1,000 genes, kang_ifnb (the cells of kang_ifnb_allgenes again), and for time "
    "pbmc8k (the tissue of pbmc3k), fly_embryo and worm_embryo"
)
WORK = ROOT / "build" / "many-data-sets"
ONE = "one"
N_MASKS = 8
SHOWN = 12  # rows of each set's table on the page; the JSON has all


def make_cells(names: list[str], n_cells: int) -> None:
    """Split each set, join the genes, and write each set's cells in the joint names."""
    for part in ("train", "heldout"):
        (WORK / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        path = name if name == "pbmc3k" else str(SHARED / f"{name}.h5ad")
        cells = read_cells("pancreas_h2c" if name == "pancreas_h2c" else path, n_cells)
        for part, file in zip(("train", "heldout"), split_files(cells, WORK / "split" / name), strict=True):
            file.rename(WORK / part / f"{name}.h5ad")
    priors = SHARED / "priors"
    tables = NameTables(
        aliases=priors / "genes" / "hgnc_complete_set.tsv.gz",
        gene_tables={
            "human": priors / "genes" / "genes_homo_sapiens.csv.gz",
            "mouse": priors / "genes" / "genes_mus_musculus.csv.gz",
        },
        orthologs=[("mouse", priors / "orthologs" / "human2mouse_ensembl_best.csv.gz")],
    )
    genes = None
    for part in ("train", "heldout"):
        files = [WORK / part / f"{name}.h5ad" for name in names]
        prepare(
            files, WORK / f"store-{part}", name_tables=tables, join="union" if genes is None else genes,
            species_of=dict(zip(map(str, files), SETS.values(), strict=False)), separate_species=True,
            on_note=say if genes is None else lambda note: None,
        )  # fmt: skip
        store = open_store(WORK / f"store-{part}")
        genes = list(store.vocabulary.names) if genes is None else genes
        for i, name in enumerate(store.data_sets):
            chosen = np.flatnonzero(store.data_set[:] == i)
            counts = store.counts(chosen)[:, store.measured[i]].astype(np.int32)
            places, ids = np.flatnonzero(store.measured[i]), store.vocabulary.ensembl_ids
            var = pd.DataFrame({"gene_ids": [ids[g] for g in places]}, index=[genes[g] for g in places])
            obs = pd.DataFrame({"data_set": [name] * len(chosen)}, index=store.cell_names(chosen).astype(str))
            ad.AnnData(counts, obs=obs, var=var).write_h5ad(WORK / f"{part}-{name}.h5ad")


def train_model(source: str, run: str, seconds: float, keys: list[str]) -> dict[str, Any]:
    """Train for so many CPU seconds of training steps; the learning rate follows them."""
    settings = [f"training.max_seconds={seconds}", "training.steps=1000000", "data.min_coverage=0.0"]
    settings += ["training.validate_every=1000000", "training.checkpoint_every=1000000", "data.states=0"]
    settings += ["training.balance=1.0"] if keys else []
    config = run_config([source], Path(run), settings=settings, condition_keys=keys)
    result = train([source], run, config, on_note=say, clock=time.process_time)
    info = LingshuCell.load(run, device="cpu").info()
    visits = result.step * config.training.minibatch_size
    return {
        "steps": result.step,
        "n_training_cells": info["n_training_cells"],
        "passes": visits / info["n_training_cells"],
        "n_modelled_genes": info["n_modelled_genes"],
        "training_cells_per_cpu_second": visits / seconds,
    }


def judge(name: str, model_name: str, seed: int) -> dict[str, Any]:
    """Bound the likelihood of held-out cells, generate as many, and compare."""
    condition = {"data_set": name} if model_name == ONE else None
    model = LingshuCell.load(WORK / f"run-{model_name}", device="cpu")
    own = model if model_name == name else LingshuCell.load(WORK / f"run-{name}", device="cpu")
    held_out = ad.read_h5ad(WORK / f"heldout-{name}.h5ad")
    modelled = [own._trained.genes.names[g] for g in own._trained.modelled]
    missing = set(modelled) - {model._trained.genes.names[g] for g in model._trained.modelled}
    scored = [gene for gene in modelled if gene not in missing]
    nelbo = model.nelbo(held_out[:, scored].copy(), n_masks=N_MASKS, seed=seed)
    folder = WORK / f"judged-{name}-{model_name}"
    folder.mkdir(exist_ok=True)
    generated = model.generate(held_out.n_obs, condition=condition, seed=seed)
    generated[:, held_out.var_names].copy().write_h5ad(folder / "generated.h5ad")
    metrics = evaluate_files(
        WORK / f"heldout-{name}.h5ad", folder / "generated.h5ad", folder / "evaluation",
        training=WORK / f"train-{name}.h5ad", seed=seed,
    )  # fmt: skip
    return {"nelbo": nelbo, "n_scored_genes": len(scored), "n_not_scored": len(missing), "metrics": metrics}


def once(file: str, function: Any, *arguments: Any) -> dict[str, Any]:
    """Call in a process of its own, or take what an earlier call left."""
    path = WORK / file
    if not path.is_file():
        say(file)
        path.write_text(json.dumps(run_in_child(function, *arguments)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def tables(names: list[str], models: dict[str, Any], judged: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out the NELBO of all sets, and a table of metrics for each."""
    rows = []
    for name in names:
        own, one = (judged[name][which]["nelbo"]["nats_per_cell"] for which in ("own", ONE))
        scored = judged[name][ONE]["n_scored_genes"]
        rows.append(
            [name, SETS[name], models[name]["n_training_cells"], scored, own, one, f"{(one / own - 1):+.1%}",
             models[name]["passes"]]
        )  # fmt: skip
    header = [
        "set",
        "species",
        "training cells",
        "genes scored",
        "own model, nats per cell",
        "one model, nats per cell",
    ]
    parts = [markdown_table([*header, "difference", "passes of the own model"], rows)]
    for name in names:
        own, one = (judged[name][which]["metrics"] for which in ("own", ONE))
        lines = [
            [metric, show(own[metric]["value"]), show(one[metric]["value"]), own[metric].get("real_vs_real"),
             own[metric]["better"].replace("_", " ")]
            for metric in own if metric in one and own[metric].get("value") is not None
        ]  # fmt: skip
        parts.append(f"## {name}")
        parts.append(markdown_table(["metric", "own model", "one model", "real vs real", "better"], lines[:SHOWN]))
    return parts


def main() -> None:
    """Make what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seconds", type=float, default=40, help="CPU seconds of training per set")
    parser.add_argument("--cells", type=int, default=1500, help="most cells of a set, held-out ones included")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names, facts = list(arguments.sets), environment()
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / f"heldout-{names[-1]}.h5ad").is_file():
        make_cells(names, arguments.cells)
    models = {
        ONE: once(
            f"{ONE}.json", train_model, str(WORK / "store-train"), str(WORK / f"run-{ONE}"),
            arguments.seconds * len(names), ["data_set"],
        )
    }  # fmt: skip
    judged: dict[str, dict[str, Any]] = {}
    for name in names:
        own = (str(WORK / f"train-{name}.h5ad"), str(WORK / f"run-{name}"), arguments.seconds, [])
        models[name] = once(f"{name}.json", train_model, *own)
        judged[name] = {
            "own": once(f"judged-{name}-own.json", judge, name, name, arguments.seed),
            ONE: once(f"judged-{name}-{ONE}.json", judge, name, ONE, arguments.seed),
        }
    about = " ".join((__doc__ or "").split("\n\n")[i] for i in (0, 2)).replace("\n", " ")
    one = models[ONE]
    body = [
        f"{arguments.seconds:g} CPU seconds per set, up to {arguments.cells:,} cells of each, of which "
        f"{HELD_OUT:.0%} are held out; one seed ({arguments.seed}). {LEFT_OUT}. The one model has "
        f"{one['n_modelled_genes']:,} genes and made {one['steps']:,} steps, {one['passes']:.1f} passes over its "
        f"{one['n_training_cells']:,} cells.",
        *tables(names, models, judged),
    ]
    write_result("many-data-sets", about, facts, {"models": models, "judged": judged}, body)


if __name__ == "__main__":
    main()
