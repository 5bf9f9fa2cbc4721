"""Simulate a perturbation screen of known truth with SERGIO v2; run with the Python of ``make_venv.sh``.

Five lines, 24 knock-downs and control cells, 400 genes (Dibaeinia and Sinha 2020, doi:10.1016/j.cels.2020.08.003).
Links between genes are those of the human network that comes with SERGIO. The 24 regulators with most targets are
*master regulators*: links to them are left out. The next 60 are put in a random order and links against it are left
out, so that there are no cycles; the other genes are drawn at random, and a gene keeps at most three regulators.

A line is a random profile of the masters' production rates; a knock-down is one of these rates times 0.1, and all else
follows from the network: the same rate constants everywhere, half-response constants fitted once, to the control states
of the lines. Cells are states of SERGIO's stochastic differential equations, far enough apart in time to be nearly
independent. A gene is caught with an efficiency of its own (log-normal), a cell has a log-normal library size, and
counts are Poisson.

Writes into a folder:

* ``sergio.h5ad``: raw counts (CSR); obs ``line``, ``perturbation``; ``uns["simulation"]`` has parameters and versions,
* ``sergio-truth.csv``: expected counts in 10,000 of every (line, perturbation), ``control`` included, from steady
  states without noise; the exact effect is the log ratio of a row to its control row,
* ``sergio-network.tsv``: regulator, target and sign of every link, as ``lingshu embeddings --from-network`` reads it.

The same seed gives the same bytes of counts. Prints one line of JSON about the run.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from SERGIO import sergio
from SERGIO.GRN import grn_from_file
from SERGIO.GRN._components import Gene
from SERGIO.GRN._grn import GRN
from SERGIO.MR import mrProfile

CONTROL = "control"
LINES = ("line A", "line B", "line C", "line D", "line E")
MASTERS, REGULATED, TARGETS = 24, 60, 316  # regulators without and with regulators, other genes
MOST_REGULATORS = 3  # of a gene; more would leave little of each
KNOCK_DOWNS, LEFT = 24, 0.1  # how many, and the share of the rate that is left
CELLS, CONTROL_CELLS = 60, 250  # of each line and knock-down, of each line
ACTIVATING, STRENGTH, HILL, DECAY = 0.75, (1.0, 5.0), 4, 0.8  # SERGIO's own but for Hill's exponent, which is 2 there
LOW, HIGH = (1.2, 3.0), (3.0, 6.0)  # production rates of a master regulator in a line, either equally often
NOISE, TIME_STEP, STEPS_BETWEEN, STEPS_BEFORE = 0.5, 0.2, 10, 50  # cells are 1.6 relaxation times apart
EFFICIENCY_SD, MOST_SD = 1.5, 2.0  # of log efficiency, and where it is cut
LIBRARY_MEDIAN, LIBRARY_SD = 2500, 0.4  # UMI, and of their logarithm


def choose_network(rng: np.random.Generator) -> pd.DataFrame:
    """Choose genes and links, and draw their strengths.

    Parameters
    ----------
    rng
        Source of all draws.

    Returns
    -------
    pandas.DataFrame
        One row per link: ``reg``, ``tar`` (symbols) and ``k`` (maximal production, negative for repression).
    """
    source = files("SERGIO") / "GRN" / "ref" / "human.source"
    with source.open(encoding="utf-8") as stream:
        links = pd.read_csv(stream, sep="\t", header=None, usecols=[0, 2], names=["reg", "_", "tar", "__"], dtype=str)
    symbols = "[A-Z][A-Z0-9-]*$"  # neither microRNAs nor bare numbers
    links = links[links["reg"].str.match(symbols, na=False) & links["tar"].str.match(symbols, na=False)]
    links = links.drop_duplicates().sort_values(["reg", "tar"])
    most = links["reg"].value_counts().sort_index().sort_values(ascending=False, kind="stable").index
    order = [*most[:MASTERS], *rng.permutation(most[MASTERS : MASTERS + REGULATED])]
    place = {name: i for i, name in enumerate(order)}
    links = links[links["reg"].isin(place)]
    rank = links["tar"].map(place)
    among = rank.notna() & (rank >= MASTERS) & (links["reg"].map(place) < rank)
    others = rng.choice(np.unique(links["tar"][rank.isna()]), TARGETS, replace=False)
    net = links[among | links["tar"].isin(set(others))].sample(frac=1, random_state=rng)
    net = net.groupby("tar").head(MOST_REGULATORS).sort_values(["reg", "tar"]).reset_index(drop=True)
    sign = np.where(rng.random(len(net)) < ACTIVATING, 1.0, -1.0)
    return net.assign(k=sign * rng.uniform(*STRENGTH, len(net)))


def read_grn(net: pd.DataFrame) -> GRN:
    """Hand a network to SERGIO, with half-response constants where there is a column ``h``."""
    table = net.assign(coop=0, n=HILL, reg_decay=DECAY, tar_decay=DECAY).reindex(
        columns=["reg", "coop", "tar", "k", "n", "h", "reg_decay", "tar_decay"]
    )
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "network.csv")
        return grn_from_file(Path(folder) / "network.csv")


def start(grn: GRN, rates: pd.DataFrame, fit_half_response: bool) -> None:
    """Set the production rates of master regulators (rows; columns are states) and find all steady states."""
    profile = mrProfile(list(rates.index), rates.shape[1])
    for name, values in rates.iterrows():
        profile.profile[name] = values.to_numpy()
    grn.init(profile, update_half_resp=fit_half_response)


def line_rates(masters: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """Draw production rates of master regulators (rows) in the control state of each line (columns)."""
    shape = (len(masters), len(LINES))
    drawn = np.where(rng.random(shape) < 0.5, rng.uniform(*LOW, shape), rng.uniform(*HIGH, shape))
    return pd.DataFrame(drawn, index=masters, columns=list(LINES))


def all_rates(control: pd.DataFrame, targets: list[str]) -> pd.DataFrame:
    """Give the rates of every state: the columns are (line, perturbation)."""
    states = {}
    for line in control.columns:
        for target in (CONTROL, *targets):
            states[line, target] = control[line].where(control.index != target, LEFT * control[line])
    return pd.DataFrame(states)


def shares(expression: np.ndarray, efficiency: np.ndarray) -> np.ndarray:
    """Turn concentrations (rows × genes) into the expected share of each gene in a row's counts."""
    caught = expression * efficiency
    return caught / caught.sum(1, keepdims=True)


def run_simulator(grn: GRN, n_cells: list[int]) -> pd.DataFrame:
    """Run SERGIO from the steady states; gives concentrations, genes × cells, state after state.

    It keeps trajectories in arrays and copies them at every step, which takes most of its time; here they are lists
    until the end.

    Parameters
    ----------
    grn
        A network whose steady states are set.
    n_cells
        How many cells of each state.
    """

    def append(gene: Gene, conc: np.ndarray, cTypes: list[int]) -> None:
        for state, value in zip(cTypes, conc.tolist(), strict=True):
            gene.sim_conc_[state].append(max(0.0, value))

    Gene.append_sim_conc = append
    simulator = sergio(grn)
    simulator.simulate(n_cells, noise_s=NOISE, safety_iter=STEPS_BEFORE, scale_iter=STEPS_BETWEEN, dt=TIME_STEP)
    for gene in grn.attr_["genes"].values():
        gene.sim_conc_ = {state: np.array(values) for state, values in gene.sim_conc_.items()}
    return simulator.getSimExpr()


def simulate(seed: int) -> tuple[ad.AnnData, pd.DataFrame, pd.DataFrame]:
    """Draw the screen.

    Parameters
    ----------
    seed
        Of every draw.

    Returns
    -------
    tuple
        The cells; expected counts in 10,000 (line, perturbation × gene); the links.
    """
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # SERGIO draws from there
    net = choose_network(rng)
    n_targets = net["reg"].value_counts().sort_index()
    masters = sorted(set(net["reg"]) - set(net["tar"]))
    knocked = sorted(n_targets[masters].sort_values(ascending=False, kind="stable").index[:KNOCK_DOWNS])
    control = line_rates(masters, rng)
    grn = read_grn(net)
    start(grn, control, fit_half_response=True)
    half = {(link.reg_[0].name_, link.tar_.name_): link.h_ for link in grn.attr_["interactions"].values()}
    net["h"] = [half[pair] for pair in zip(net["reg"], net["tar"], strict=True)]

    rates = all_rates(control, knocked)
    grn = read_grn(net)
    start(grn, rates, fit_half_response=False)
    genes = sorted(grn.attr_["genes"])
    steady = np.stack([grn.attr_["genes"][gene].ss_conc_ for gene in genes], axis=1)
    n_cells = [CONTROL_CELLS if target == CONTROL else CELLS for _, target in rates.columns]
    expression = run_simulator(grn, n_cells).loc[genes].to_numpy().T

    efficiency = np.exp(EFFICIENCY_SD * np.clip(rng.standard_normal(len(genes)), -MOST_SD, MOST_SD))
    library = LIBRARY_MEDIAN * np.exp(LIBRARY_SD * rng.standard_normal(len(expression)))
    counts = sparse.csr_matrix(rng.poisson(shares(expression, efficiency) * library[:, None]).astype(np.int32))
    names = rates.columns.repeat(n_cells)
    obs = pd.DataFrame(list(names), columns=["line", "perturbation"]).astype("category")
    obs.index = [f"cell-{i}" for i in range(len(obs))]
    order = rng.permutation(len(obs))
    cells = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))[order].copy()
    truth = pd.DataFrame(1e4 * shares(steady, efficiency), index=rates.columns, columns=genes)
    truth.index.names = ["line", "perturbation"]
    links = net[["reg", "tar"]].assign(sign=np.sign(net["k"]).astype(int))
    return cells, truth, links


def parameters(seed: int) -> dict[str, object]:
    """Give what the simulation depends on."""
    plain = (str, int, float, tuple)
    named = {name.lower(): value for name, value in globals().items() if name.isupper() and isinstance(value, plain)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()} | {"seed": seed}


def main() -> None:
    """Simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    watch = time.process_time()
    cells, truth, links = simulate(args.seed)
    versions = {name: version(name) for name in ("sergio-scSim", "numpy", "pandas", "anndata")}
    facts = {"parameters": parameters(args.seed), "versions": versions}
    cells.uns["simulation"] = json.dumps(facts)
    args.out.mkdir(parents=True, exist_ok=True)
    truth.to_csv(args.out / "sergio-truth.csv", float_format="%.8g")
    links.to_csv(args.out / "sergio-network.tsv", sep="\t", index=False)
    cells.write_h5ad(args.out / "sergio.h5ad")
    facts |= {"cpu_seconds": time.process_time() - watch, "links": len(links)}
    json.dump(facts, sys.stdout)
    print()


if __name__ == "__main__":
    main()
