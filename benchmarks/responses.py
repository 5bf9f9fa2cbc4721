"""Responses to perturbations, foretold for conditions that were never trained, beside baselines and real cells.

Each fold holds out conditions, trains ``small`` on the rest, generates the held-out conditions and controls, lets the
package's baselines predict the same conditions from the same training cells, and judges all of them with
``evaluate_responses``. Stages whose output is there are not repeated, so an interrupted benchmark goes on.

    python benchmarks/responses.py kang --seeds 0 1 2
    python benchmarks/responses.py papalexi
    python benchmarks/responses.py gbm
    python benchmarks/responses.py sergio-pairs    # and sergio-targets, after simulated_screen.py
    python benchmarks/responses.py kang --variants scvi_counterfactual scvi_arithmetic   # after peers/make_venv.sh
    python benchmarks/responses.py gbm --variants ours-calibrated --set calibrate=true
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from data_sets import SHARED, SIMULATED, shared_file, simulated_file
from recording import ROOT, Stopwatch, environment, markdown_table, run_in_child, say, write_result

PEERS = ("scvi_counterfactual", "scvi_arithmetic")  # see peers/scvi_responses.py
PEER_PYTHON = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
PEER_SECONDS, PEER_GENES = 50, 3000  # CPU time of training, and its most variable genes
BASELINES = ("control_bootstrap", "perturbation_mean", "context_mean", "additive", "ridge", "nearest_neighbour")
CONTROLS = 300  # generated controls of each identity, for the rate of falsely called genes
MOST_CELLS = 500  # of each condition
STEPS = 32
CLEAR_GENES = 50  # real DE genes of a condition whose single-gene metrics are more than chance
CLEAR = "average score, clear conditions"
VALIDATED = "split-validated.toml"  # the split of a fold with validation conditions
PRIORS = SHARED / "priors"
TRUTH = "truth.json"
TRUE_EFFECT, TRUE_GENES = np.log(1.25), 5  # an exact effect is judged where so many genes change by a quarter
LEAST_TRUE_MEAN = 1.0  # expected counts in 10,000, before or after, of a gene that counts there


@dataclass(frozen=True)
class Screen:
    """A data set with perturbations and how its conditions are held out.

    Attributes
    ----------
    file
        Name of the data set.
    perturbation_key, control, identity_key
        Its labels.
    folds
        ``"pairs"``: each identity's perturbed cells in turn; ``"scattered"``: one fold, each perturbation in one
        identity; a number: so many folds of perturbations.
    settings
        What the training changes from the preset.
    embeddings
        Sources of the gene embeddings that tell of perturbations never trained: options of ``lingshu embeddings`` and
        their files. None where all perturbations are trained.
    simulated
        Whether the cells come from ``simulated_screen.py`` and their exact effects are known.
    """

    file: str
    perturbation_key: str
    control: str
    identity_key: str | None
    folds: str | int
    settings: dict[str, Any] = field(default_factory=dict)
    embeddings: tuple[tuple[str, Path], ...] = ()
    simulated: bool = False

    @property
    def path(self) -> Path:
        """The file of the cells."""
        return (simulated_file if self.simulated else shared_file)(f"{self.file}.h5ad")

    @property
    def mean_baseline(self) -> str:
        """What the average score is measured from: the mean over the training cells of the perturbation, or, where
        no training cell has it, over all perturbed ones.
        """
        return "context_mean" if isinstance(self.folds, int) else "perturbation_mean"

    @property
    def held_out(self) -> str:
        """What is held out, in words."""
        if self.folds == "pairs":
            return "each identity's perturbed cells in turn"
        return "each perturbation in one identity" if self.folds == "scattered" else f"{self.folds} folds of targets"


SETTINGS = {"training.steps": 400, "training.balance": 0.5, "training.depth_dropout": 0.5}
GENE_EMBEDDINGS = (
    ("--from-gene-sets", PRIORS / "genesets" / "msigdb_c2.reactome.v2025.1.Hs.symbols.gmt.gz"),
    ("--from-network", PRIORS / "networks" / "string_interactome_human_symbols.tsv.gz"),
)
SCREENS = {
    "kang": Screen(
        "kang_ifnb",
        "perturbation",
        "control",
        "cell_type",
        "pairs",
        {**SETTINGS, "training.steps": 200},
    ),
    "gbm": Screen(
        "gbm_panobinostat_300g",
        "condition",
        "ctrl",
        "donor",
        "pairs",
        SETTINGS,
    ),
    "papalexi": Screen(
        "papalexi_eccite_299g",
        "perturbation",
        "control",
        None,
        5,
        SETTINGS,
        embeddings=GENE_EMBEDDINGS,
    ),
    "vcc-h1": Screen(
        "vcc_h1_sub",
        "perturbation",
        "non-targeting",
        None,
        5,
        SETTINGS,
        embeddings=GENE_EMBEDDINGS,
    ),
    "sergio-pairs": Screen(
        "sergio",
        "perturbation",
        "control",
        "line",
        "scattered",
        SETTINGS,
        simulated=True,
    ),
    "sergio-targets": Screen(
        "sergio",
        "perturbation",
        "control",
        "line",
        4,
        SETTINGS,
        embeddings=(("--from-network", SIMULATED / "sergio-network.tsv"),),
        simulated=True,
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a variant changes: settings of training, and of generation (guidance_scale, steps, depth …); and whether the
    strength of guidance is fitted, on what the next fold holds out, which is then not trained.
    """

    training: dict[str, Any]
    generation: dict[str, Any]
    calibrate: bool = False


def keys_of(screen: Screen) -> list[str]:
    """List the columns of a condition."""
    return [key for key in (screen.identity_key, screen.perturbation_key) if key]


def folds_of(screen: Screen, obs: pd.DataFrame) -> dict[str, dict[str, list]]:
    """Name the folds and what each holds out: the ``held_out`` section of a split. A perturbation that has no embedding
    where it needs one (MARCH8, which is MARCHF8 by now) is always trained.
    """
    labels = obs[screen.perturbation_key].astype(str)
    if screen.folds == "pairs":
        pairs = obs.assign(**{screen.perturbation_key: labels})[labels != screen.control]
        pairs = pairs[[screen.identity_key, screen.perturbation_key]].astype(str).drop_duplicates()
        return {identity: {"pairs": rows.to_dict("records")} for identity, rows in pairs.groupby(screen.identity_key)}
    names = np.random.default_rng(0).permutation(sorted(set(labels) - {screen.control}))
    if screen.folds == "scattered":
        identities = sorted(set(obs[screen.identity_key].astype(str)))
        pairs = zip(itertools.cycle(identities), names.tolist(), strict=False)
        return {"pairs": {"pairs": [dict(zip(keys_of(screen), pair, strict=True)) for pair in pairs]}}
    told = set(embedding_table(screen).index) if screen.embeddings else set(names)
    return {
        f"fold {k + 1}": {"perturbations": sorted(set(part.tolist()) & told)}
        for k, part in enumerate(np.array_split(names, int(screen.folds)))
    }


def split_toml(screen: Screen, held_out: dict[str, list], validation: dict[str, list] | None = None) -> str:
    """Write a split as TOML."""
    lines = [f'perturbation_key = "{screen.perturbation_key}"', f'control = "{screen.control}"']
    if screen.identity_key:
        lines.append(f'identity_key = "{screen.identity_key}"')
    for section, kinds in (("held_out", held_out), ("validation", validation or {})):
        lines += [f"\n[{section}]"] if kinds else []
        for kind, entries in kinds.items():
            items = [
                json.dumps(entry) if isinstance(entry, str) else
                "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in entry.items()) + "}"
                for entry in entries
            ]  # fmt: skip
            lines.append(f"{kind} = [{', '.join(items)}]")
    lines.append(
        "\n[control_shares]  # responses are measured against control cells that no model has seen\ntest = 0.5"
    )
    return "\n".join(lines) + "\n"


def train_fold(screen: Screen, split: Path, run: Path, seed: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Train on what the split leaves; seconds and the validation NELBO."""
    from lingshu_cell.model import LingshuCell

    watch = Stopwatch()
    settings = {
        "data.perturbation_key": screen.perturbation_key,
        "data.control": screen.control,
        "data.split": str(split),
        "training.seed": seed,
        **screen.settings,
        **extra,
    }
    keys = [screen.identity_key] if screen.identity_key else None
    model = LingshuCell.train(screen.path, out=run, settings=settings, condition_keys=keys, on_note=say, device="cpu")
    info = model.info()
    return {"train_seconds": watch.seconds(), "validation_nelbo": info["validation_nelbo_nats_per_cell"]}


def calibrate_fold(screen: Screen, split: Path, run: Path, seed: int) -> dict[str, Any]:
    """Fit the strength of guidance on the validation conditions of a split, against control cells never trained."""
    from lingshu_cell.calibrate import calibrate
    from lingshu_cell.data.split_files import read_split

    watch, cells = Stopwatch(), ad.read_h5ad(screen.path)
    part = read_split(split).assign(cells.obs)
    held_back = (part == "test") & (cells.obs[screen.perturbation_key].astype(str) == screen.control)
    if screen.identity_key:
        identity = cells.obs[screen.identity_key].astype(str)
        held_back &= identity.isin(set(identity[part == "validation"]))
    chosen = cells[(part == "validation") | held_back].copy()
    unseen = "embedding" if screen.embeddings else "error"
    found = calibrate(run, chosen, steps=STEPS, seed=seed, unseen=unseen, on_progress=say)
    return {"calibrate_seconds": watch.seconds(), "guidance_scale": found.scale, "slopes": list(found.slopes)}


def generate_fold(
    screen: Screen, run: Path, wanted: list[dict[str, Any]], out: Path, seed: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """Generate the held-out conditions and the controls of their identities into one file."""
    from lingshu_cell.generate import generate, load_model, steering_of

    model, watch, parts = load_model(run), Stopwatch(), []
    guidance = {key: value for key, value in extra.items() if key.startswith("guidance")}
    steps = extra.get("steps", STEPS)
    for i, condition in enumerate(wanted):
        asked = {key: value for key, value in condition.items() if key != "n"}
        is_control = asked[screen.perturbation_key] == screen.control
        parts.append(
            generate(
                model,
                condition["n"],
                condition=asked,
                steps=steps,
                seed=1000 * seed + i,
                depth=extra.get("depth"),
                unseen="error" if is_control or not screen.embeddings else "embedding",
                steering=steering_of(model, **({} if is_control else guidance)),
            )
        )
    adata = ad.concat(parts, merge="same")
    for key in keys_of(screen):
        adata.obs[key] = adata.obs[key].astype(str).astype("category")
    adata.uns["lingshu_cell"] = parts[0].uns["lingshu_cell"]
    adata.write_h5ad(out)
    return {"generate_seconds": watch.seconds(), "generated_cells": adata.n_obs}


def wanted_of(screen: Screen, test: pd.DataFrame) -> list[dict[str, Any]]:
    """List the held-out conditions with the number of cells, and controls for their identities."""
    keys = keys_of(screen)
    counts = test[test[screen.perturbation_key] != screen.control][keys].astype(str).value_counts().sort_index()
    rows = [
        dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True)) | {"n": min(int(n), MOST_CELLS)}
        for key, n in counts.items()
    ]
    controls = {row.get(screen.identity_key): row for row in rows}
    return rows + [{**row, screen.perturbation_key: screen.control, "n": CONTROLS} for row in controls.values()]


def write_parts(screen: Screen, fold: Path) -> pd.DataFrame:
    """Write training and test cells of a fold; the test has the held-out conditions and unseen control cells of their
    identities. Gives the labels of the test cells.
    """
    from lingshu_cell.data.split_files import read_split

    cells = ad.read_h5ad(screen.path)
    part = read_split(fold / "split.toml").assign(cells.obs)
    test = cells[part == "test"]
    if screen.identity_key:
        perturbed = test.obs[screen.perturbation_key].astype(str) != screen.control
        asked = set(test.obs[screen.identity_key].astype(str)[perturbed])
        test = test[test.obs[screen.identity_key].astype(str).isin(asked)]
    if not (fold / "test.h5ad").is_file():
        cells[part == "train"].write_h5ad(fold / "train.h5ad")
        test.write_h5ad(fold / "test.h5ad")
    return test.obs


def baseline_fold(screen: Screen, name: str, fold: Path, wanted: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Let a baseline of the package predict the held-out conditions from the training cells of the fold."""
    from lingshu_cell.baselines import predict_baseline

    watch = Stopwatch()
    asked = [row for row in wanted if row[screen.perturbation_key] != screen.control]
    adata = predict_baseline(
        name,
        fold / "train.h5ad",
        asked,
        perturbation_key=screen.perturbation_key,
        control=screen.control,
        identity_keys=[screen.identity_key] if screen.identity_key else [],
        embeddings=embedding_table(screen) if screen.embeddings else None,
        seed=seed,
    )
    adata.write_h5ad(fold / name / f"seed-{seed}" / "predicted.h5ad")
    return {"generate_seconds": watch.seconds(), "generated_cells": adata.n_obs}


def peer_fold(screen: Screen, name: str, fold: Path, wanted: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Let a model of others, in an environment of its own, predict the held-out conditions from the training cells."""
    program, method = name.split("_", 1)
    place = fold / name / f"seed-{seed}"
    (place / "wanted.json").write_text(json.dumps(wanted), encoding="utf-8")
    command = [PEER_PYTHON, Path(__file__).parent / "peers" / f"{program}_responses.py", fold / "train.h5ad"]
    command += [place / "wanted.json", place / "predicted.h5ad", "--method", method, "--seed", seed]
    command += ["--perturbation-key", screen.perturbation_key, "--control", screen.control]
    command += ["--identity-key", screen.identity_key, "--cpu-seconds", PEER_SECONDS]
    command += ["--genes", PEER_GENES]
    watch = Stopwatch()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return {"generate_seconds": watch.seconds(), "peer": json.loads(done.stdout.splitlines()[-1])}


def embedding_table(screen: Screen) -> pd.DataFrame:
    """Give the embeddings that the model has too, of every perturbation that has one."""
    from lingshu_cell.data.gene_embeddings import read_embeddings

    labels = sorted(set(ad.read_h5ad(screen.path, backed="r").obs[screen.perturbation_key].astype(str)))
    vectors, found = read_embeddings(embedding_file(screen)).rows(labels)
    return pd.DataFrame(vectors[found], index=[label for label, there in zip(labels, found, strict=True) if there])


def embedding_file(screen: Screen) -> Path:
    """Where the embeddings of a screen are: made from gene sets and networks by ``lingshu embeddings``."""
    return ROOT / "build" / "responses" / f"embeddings-{screen.file}.npz"


def make_embeddings(screen: Screen) -> None:
    """Make the gene embeddings of a screen."""
    file = embedding_file(screen)
    if file.is_file():
        return
    if missing := [path.name for _, path in screen.embeddings if not path.is_file()]:
        raise SystemExit(f"Embeddings are made from {', '.join(missing)}, not found")
    file.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(word) for source in screen.embeddings for word in source]
    subprocess.run([sys.executable, "-m", "lingshu_cell", "embeddings", *sources, "--out", str(file)], check=True)


def truth_scores(screen: Screen, cells: ad.AnnData) -> dict[str, float]:
    """Compare the effects that cells show with the exact ones of the simulation.

    An effect is a difference of log means (counts in 10,000, pseudocount 0.5), measured from the exact mean of the
    line's control cells on either side, over genes with an expected count in 10,000, the perturbed gene left out.

    Parameters
    ----------
    screen
        A simulated screen.
    cells
        Predicted or real cells of any conditions; controls are left aside.

    Returns
    -------
    dict
        ``correlation``: Pearson, mean over conditions in which at least five genes change by a quarter; ``slope`` of
        the cells' effects on the exact ones, over the genes of all of these; ``n``: how many these are.
    """
    from lingshu_cell.perturbation_effects import PSEUDOCOUNT, TARGET_SUM

    exact = pd.read_csv(simulated_file(f"{screen.file}-truth.csv"), index_col=[0, 1])[list(cells.var_names)]
    totals = np.maximum(np.asarray(cells.X.sum(1)).ravel(), 1)
    correlations, pieces = [], []
    for (line, target), rows in cells.obs.groupby(keys_of(screen), observed=True).indices.items():
        if target == screen.control:
            continue
        before, after = (exact.loc[(line, name)].to_numpy() for name in (screen.control, target))
        mean = TARGET_SUM * np.asarray((cells.X[rows].multiply(1 / totals[rows, None])).mean(0)).ravel()
        genes = (np.maximum(before, after) >= LEAST_TRUE_MEAN) & (cells.var_names != target)
        shown, true = (np.log((x + PSEUDOCOUNT) / (before + PSEUDOCOUNT))[genes] for x in (mean, after))
        if (np.abs(true) >= TRUE_EFFECT).sum() >= TRUE_GENES:
            correlations.append(np.corrcoef(shown, true)[0, 1])
            pieces.append((shown, true))
    shown, true = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    slope = np.polyfit(true, shown, 1)[0]
    return {"correlation": float(np.mean(correlations)), "slope": float(slope), "n": len(pieces)}


def judge(screen: Screen, root: Path, variant: str, seed: int, baseline: Path | None) -> dict[str, Any]:
    """Judge the predictions of all folds together against all held-out conditions."""
    from lingshu_cell.evaluate_responses import evaluate_responses

    folds = sorted(path.parent for path in root.glob("*/split.toml"))
    predicted = ad.concat(
        [ad.read_h5ad(fold / variant / f"seed-{seed}" / "predicted.h5ad") for fold in folds], index_unique="-"
    )
    place = root / "judged" / f"{variant}-seed-{seed}"
    place.parent.mkdir(exist_ok=True)
    keys = keys_of(screen)
    tests = [ad.read_h5ad(fold / "test.h5ad") for fold in folds]
    real = ad.concat(tests)
    real = real[~real.obs_names.duplicated()].copy()
    reference = ad.read_h5ad(folds[0] / "train.h5ad")  # its control cells are in the training part of every fold
    reference = reference[reference.obs[screen.perturbation_key] == screen.control]
    for cells in (real, predicted):
        cells.obs = cells.obs[keys].astype(str)
    watch = Stopwatch()
    evaluate_responses(
        real,
        predicted,
        place,
        perturbation_key=screen.perturbation_key,
        control=screen.control,
        identity_key=screen.identity_key,
        training=reference,
        use_cell_eval2=screen.identity_key is None,
        baseline=baseline,
    )
    if screen.simulated:
        scores = truth_scores(screen, predicted)
        scores |= {f"ceiling_{name}": value for name, value in truth_scores(screen, real).items()}
        (place / TRUTH).write_text(json.dumps(scores), encoding="utf-8")
    return {"evaluate_seconds": watch.seconds()}


def stages(screen: Screen, fold: Path, variant: str, seed: int, asked: Asked, until: str) -> None:
    """Do what is not done yet for one variant of one fold."""
    place = fold / variant / f"seed-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    split = fold / (VALIDATED if asked.calibrate else "split.toml")
    record = place / "cost.json"
    cost = json.loads(record.read_text()) if record.is_file() else {}
    wanted = wanted_of(screen, write_parts(screen, fold))
    is_baseline = variant in BASELINES

    def stage(name: str, function: Any, *arguments: Any) -> None:
        if name not in cost:
            say(f"{fold.name}, {variant}, seed {seed}: {name}")
            cost.update(run_in_child(function, *arguments))
            record.write_text(json.dumps(cost))

    if is_baseline:
        stage("generate_seconds", baseline_fold, screen, variant, fold, wanted, seed)
    elif variant in PEERS:
        stage("generate_seconds", peer_fold, screen, variant, fold, wanted, seed)
    else:
        if "train_seconds" not in cost:
            shutil.rmtree(place / "run", ignore_errors=True)  # of a training that was stopped
        stage("train_seconds", train_fold, screen, split, place / "run", seed, asked.training)
        if until == "train":
            return
        if asked.calibrate:
            stage("calibrate_seconds", calibrate_fold, screen, split, place / "run", seed)
        stage(
            "generate_seconds",
            generate_fold,
            screen,
            place / "run",
            wanted,
            place / "predicted.h5ad",
            seed,
            asked.generation,
        )


COLUMNS = {
    "average score": ("cell_eval", "average_score", "average"),
    "Pearson-Δ": ("cell_eval", "mean", "pearson_delta"),
    "DES": ("cell_eval", "mean", "des"),
    "PDS": ("cell_eval", "mean", "pds"),
    "MAE": ("cell_eval", "mean", "mae"),
    "Spearman LFC": ("cell_eval", "mean", "spearman_lfc"),
    "Spearman #DEG": ("cell_eval", "mean", "spearman_n_de"),
    "AUPRC": ("cell_eval", "mean", "auprc"),
    "LFC slope": ("summary", "lfc_slope", "pooled"),
    "energy distance ÷ effect": ("summary", "e_distance", "share_of_effect"),
    "SD(log UMI) ratio": ("summary", "sd_log_umi_ratio", "mean"),
    "false DE": ("summary", "false_de_rate", "mean"),
}
TRUTH_COLUMNS = {"r with exact effect": ("truth", "correlation"), "slope on exact effect": ("truth", "slope")}


def cell_of(record: dict[str, Any], path: tuple[str, ...], ceiling: bool = False) -> float | None:
    """Read a number of responses.json, or what real cells give in its place."""
    *outer, last = path
    if ceiling:
        outer, last = (
            ([outer[0], f"ceiling_{outer[1]}"], last) if outer[0] == "cell_eval" else (outer, f"ceiling_{last}")
        )
    value: Any = record
    for key in (*outer, last):
        value = (value or {}).get(key)
    return value


def clear_score(place: Path, baseline: Path) -> float | None:
    """Average score over the conditions with 50 real DE genes or more, against the same conditions of the baseline."""
    from lingshu_cell.metrics.cell_eval import SEVEN, average_score

    means = []
    for folder in (place, baseline):
        table = pd.read_csv(folder / "conditions.csv")
        kept = table[table["n_de_real"] >= CLEAR_GENES]
        means.append({name: float(kept[f"cell_eval_{name}"].mean()) for name in SEVEN})
    return average_score(*means)["average"]


def write_table(name: str, screen: Screen, root: Path) -> None:
    """Write the table of all variants that are judged: mean and standard deviation over seeds, and the ceiling."""
    records: dict[str, list[dict[str, Any]]] = {}
    clear: dict[str, list[float]] = {}
    against = root / "judged" / f"{screen.mean_baseline}-seed-0"
    for folder in sorted((root / "judged").glob("*-seed-*")):
        variant = folder.name.rsplit("-seed-", 1)[0]
        record = json.loads((folder / "responses.json").read_text())
        if screen.simulated:
            record["truth"] = json.loads((folder / TRUTH).read_text())
        records.setdefault(variant, []).append(record)
        score = None if variant == screen.mean_baseline else clear_score(folder, against)
        clear.setdefault(variant, []).extend([] if score is None else [score])
    columns = COLUMNS | (TRUTH_COLUMNS if screen.simulated else {})
    others = (*PEERS, *BASELINES)
    order = [v for v in records if v not in others] + [v for v in others if v in records]
    rows, body = [], {}
    for variant in order:
        cells = [variant, len(records[variant])]
        body[variant] = {CLEAR: clear[variant]} | {
            column: [v for v in (cell_of(record, path) for record in records[variant]) if v is not None]
            for column, path in columns.items()
        }
        for values in body[variant].values():
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "–")
        rows.append(cells)
    first = records[order[0]][0]
    real = [cell_of(first, path, ceiling=True) for path in columns.values()]
    rows.append(["real cells (ceiling)", "", "–", *("–" if value is None else f"{value:.3f}" for value in real)])
    costs = [json.loads(path.read_text()) for path in root.glob("*/*/seed-*/cost.json")]
    found = pd.read_csv(against / "conditions.csv")
    n_clear = int((found["n_de_real"] >= CLEAR_GENES).sum())
    made = len(list(root.glob("*/split.toml")))
    only = f", of which {made} are here" if isinstance(screen.folds, int) and made < screen.folds else ""
    notes = [
        f"Data: {screen.file}. Held out: {screen.held_out}{only}; and half of all control cells, which no model or "
        "baseline has seen and which responses are measured against. Truth and prediction have different halves.",
        f"Average score: mean over cell-eval's seven metrics of the gain over `{screen.mean_baseline}`, which has 0. "
        "Spread: standard deviation over seeds of training and generation.",
        f"{CLEAR[0].upper()}{CLEAR[1:]}: over the {n_clear} of {len(found)} with {CLEAR_GENES} DE genes or more "
        "between real cells, as with a handful of genes DES and Spearman LFC are chance.",
    ]
    if screen.simulated:
        n = first["truth"]["n"]
        notes.append(
            f"Exact effect: steady states of the simulation without noise. r: Pearson, mean over the {n} conditions in "
            f"which {TRUE_GENES} genes or more change by a quarter; slope: of the cells' effects on the exact ones, "
            f"over all genes of these. Genes with {LEAST_TRUE_MEAN:g} expected count in 10,000 or more, the perturbed "
            "gene left out; the ceiling here is all real held-out cells of each condition."
        )
    if set(order) & set(PEERS):
        notes.append(
            f"scVI: {PEER_SECONDS} CPU seconds of training a fold and method, on the same training cells and their "
            f"{PEER_GENES:,} most variable genes (all others keep the counts of control cells); "
            "`counterfactual` decodes control cells under the perturbation, `arithmetic` shifts their latents."
        )
    if set(order) - set(BASELINES) - set(PEERS):
        settings = json.dumps(screen.settings).replace(f"{ROOT}/", "")
        notes.append(
            f"Training: `{settings}`; generation: {STEPS} steps, at most {MOST_CELLS} cells a "
            f"condition, {CONTROLS} generated controls of each identity for the false-DE rate."
        )
    else:
        notes.append("Baselines only: our own model is not in this table yet.")
    write_result(
        f"responses-{name}",
        "Responses of held-out conditions, foretold.",
        environment(),
        {"variants": body, "costs": costs, "evaluators": first["versions"]},
        [markdown_table(["", "seeds", CLEAR, *columns], rows), "\n".join(f"- {note}" for note in notes)],
    )


def main() -> None:
    """Run the folds of one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screen", choices=SCREENS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", nargs="+", help="names of folds; all when not given")
    parser.add_argument(
        "--variants", nargs="+", default=["ours"], help="ours, a name of your own with --set, baselines, peers"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the variant")
    parser.add_argument("--until", choices=["train", "generate", "evaluate"], default="evaluate")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    arguments = parser.parse_args()
    screen = SCREENS[arguments.screen]
    if set(arguments.variants) & set(PEERS):
        if not PEER_PYTHON.is_file():
            parser.error("scVI needs its environment: run benchmarks/peers/make_venv.sh")
        if screen.identity_key is None:
            parser.error("scVI foretells a perturbation from other identities; this screen has one")
    if screen.embeddings:
        make_embeddings(screen)
        screen = replace(screen, settings={**screen.settings, "data.embeddings": [str(embedding_file(screen))]})
    extra = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.set)}
    calibrate = bool(extra.pop("calibrate", False))
    if calibrate and screen.folds == "scattered":
        parser.error("calibrate needs several folds: what the next one holds out is its validation")
    asked = Asked(
        training={key: value for key, value in extra.items() if "." in key},
        generation={key: value for key, value in extra.items() if "." not in key},
        calibrate=calibrate,
    )
    root = ROOT / "build" / "responses" / arguments.screen
    folds = folds_of(screen, ad.read_h5ad(screen.path, backed="r").obs)
    if unknown := set(arguments.folds or []) - set(folds):
        parser.error(f"--folds: no {', '.join(sorted(unknown))}; there are {', '.join(folds)}")
    jobs = [] if arguments.table else list(itertools.product(arguments.seeds, arguments.variants))
    against, first = root / "judged" / f"{screen.mean_baseline}-seed-0", (0, screen.mean_baseline)
    if jobs and arguments.until == "evaluate" and first not in jobs and not against.is_dir():
        jobs.insert(0, first)  # what average scores are measured from
    for name, after in zip(folds, [*list(folds)[1:], *list(folds)[:1]], strict=True):
        if not jobs or (arguments.folds and name not in arguments.folds):
            continue
        fold = root / name.replace(" ", "_").replace("+", "")
        fold.mkdir(parents=True, exist_ok=True)
        (fold / "split.toml").write_text(split_toml(screen, folds[name]), encoding="utf-8")
        if calibrate:
            (fold / VALIDATED).write_text(split_toml(screen, folds[name], folds[after]), encoding="utf-8")
        for seed, variant in jobs:
            stages(screen, fold, variant, seed, asked, arguments.until)
    if arguments.until != "evaluate":
        return
    for seed, variant in sorted(jobs, key=lambda job: job != first):
        if not (root / "judged" / f"{variant}-seed-{seed}").is_dir():
            say(f"{arguments.screen}, {variant}, seed {seed}: judge")
            compared = None if variant == screen.mean_baseline else against
            run_in_child(judge, screen, root, variant, seed, compared)
    write_table(arguments.screen, screen, root)


if __name__ == "__main__":
    main()
