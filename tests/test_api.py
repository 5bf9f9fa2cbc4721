"""The Python API in a scverse user's habits, on real cells; the Python of the README; documented names."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import TINY_SET, real_cells
from scipy import sparse

import lingshu_cell
from lingshu_cell import LingshuCell, LingshuError
from lingshu_cell.run_config import automatic_condition_keys, run_config

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "network": TINY_SET,
    "training.steps": 6,
    "training.minibatch_size": 16,
    "training.validate_every": 3,
    "training.device": "cpu",
}

pytestmark = pytest.mark.filterwarnings("ignore:Cells without any counts")


@pytest.fixture(scope="module")
def model(trained_run) -> LingshuCell:
    return LingshuCell.load(trained_run, device="cpu")


def python(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_import_is_light_and_functions_stay_functions():
    code = (
        "import sys, lingshu_cell as l; heavy = {'torch', 'anndata', 'numpy', 'rich'} & set(sys.modules);"
        "import lingshu_cell.evaluate, lingshu_cell.report; from lingshu_cell.evaluate import evaluate_files;"
        "print(heavy, callable(l.evaluate), callable(l.report), l.__version__, sorted(l.__all__) == dir(l))"
    )
    assert python(code) == f"set() True True {lingshu_cell.__version__} True\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lingshu_cell.nothing


def test_model_knows_itself(model, pbmc, trained_run):
    assert model.run == trained_run and model.var_names == tuple(pbmc.var_names)
    assert model.conditions == {"cell_type": tuple(sorted(pbmc.obs["cell_type"].unique()))}
    facts = model.info()
    assert json.loads(json.dumps(facts)) == facts and facts["n_genes"] == pbmc.n_vars
    assert facts["validation_nelbo_bits_per_gene"] == pytest.approx(
        facts["validation_nelbo_nats_per_cell"] / facts["n_modelled_genes"] / math.log(2)
    )


def test_generated_cells_are_counts_with_labels(model, tmp_path):
    made = model.generate(30, condition={"cell_type": "B cells"}, steps=8, seed=5)
    assert made.shape == (30, len(model.var_names)) and np.issubdtype(made.X.dtype, np.integer)
    assert (made.obs["cell_type"] == "B cells").all() and made.obs_names.is_unique
    again = model.generate(10, condition={"cell_type": "B cells"}, steps=8, seed=5, minibatch_size=1)
    assert (made.X[:10] != again.X).nnz == 0
    file = model.generate_file(30, tmp_path / "g.h5ad", condition={"cell_type": "B cells"}, steps=8, seed=5)
    assert (ad.read_h5ad(file).X != made.X).nnz == 0
    with pytest.raises(LingshuError, match=r"cell_type has no 'Neuron' \(1\)"):
        model.generate(3, condition={"cell_type": "Neuron"})


def test_nelbo_of_validation_cells_is_that_of_training(model, pbmc):
    from lingshu_cell.data.splits import split_cells

    _, held_out = split_cells(pbmc.n_obs, 0.2, 0)
    measured = model.nelbo(pbmc[held_out].copy(), n_masks=64)
    known = model.info()["validation_nelbo_nats_per_cell"]
    assert measured["nats_per_cell"] == pytest.approx(known, rel=0.05)  # known comes from 4 masks a cell
    assert measured["bits_per_gene"] == pytest.approx(
        measured["nats_per_cell"] / model.info()["n_modelled_genes"] / math.log(2)
    )


def test_nelbo_finds_genes_by_name_in_any_order(model, pbmc):
    shuffled = pbmc[:, np.random.default_rng(0).permutation(pbmc.n_vars)].copy()
    assert model.nelbo(shuffled) == model.nelbo(pbmc)


def test_genes_the_data_lack_are_unknown_not_zero(model, pbmc):
    n_lost = 40
    by_count = np.argsort(-np.asarray(pbmc.X.sum(0)).ravel())
    lacking = pbmc[:, np.sort(by_count[n_lost:])].copy()
    zeroed = pbmc.copy()
    kept = ~np.isin(np.arange(pbmc.n_vars), by_count[:n_lost])
    zeroed.X = sparse.csr_matrix(zeroed.X.multiply(kept))
    unknown, zero = model.nelbo(lacking, n_masks=32), model.nelbo(zeroed, n_masks=32)
    scored = unknown["nats_per_cell"] / unknown["bits_per_gene"] / math.log(2)
    assert round(scored) == model.info()["n_modelled_genes"] - n_lost
    # Zeros where the most expressed genes should be cost nats of their own; unknown genes cost none.
    assert unknown["nats_per_cell"] < zero["nats_per_cell"] - 5


def test_nelbo_and_conditions(model, pbmc):
    unlabelled = pbmc.copy()
    del unlabelled.obs["cell_type"]
    assert model.nelbo(unlabelled) == model.nelbo(pbmc, use_conditions=False) != model.nelbo(pbmc)
    strange = pbmc.copy()
    strange.obs["cell_type"] = "Neuron"
    with pytest.raises(LingshuError, match=r"cell_type has no 'Neuron'"):
        model.nelbo(strange)
    foreign = pbmc.copy()
    foreign.var_names = [f"gene{i}" for i in range(foreign.n_vars)]
    del foreign.var["gene_ids"]
    with pytest.raises(LingshuError, match="At least 50% of the model's genes must be in the data"):
        model.nelbo(foreign)


def test_train_from_memory_and_resume(pbmc, tmp_path):
    notes: list[str] = []
    steps: list[int] = []
    trained = LingshuCell.train(
        pbmc,
        out=tmp_path / "run",
        settings=SETTINGS,
        device="cpu",
        on_note=notes.append,
        on_progress=lambda p: steps.append(p.step),
    )
    assert steps == list(range(1, 7)) and any("conditioned on cell_type" in note for note in notes)
    assert list(trained.conditions) == ["cell_type"] and trained.config.training.steps == 6
    again = LingshuCell.train(pbmc, out=tmp_path / "run", resume=True, device="cpu")
    assert again.config == trained.config and again.info() == trained.info()
    with pytest.raises(LingshuError, match="A new run needs a new folder"):
        LingshuCell.train(pbmc, out=tmp_path / "run", settings=SETTINGS)


def test_settings_may_be_dotted_or_nested_but_must_exist(pbmc, tmp_path):
    with pytest.raises(LingshuError, match=r"Every setting must be known: 'training\.stepz'"):
        LingshuCell.train(pbmc, out=tmp_path / "a", settings={"training": {"stepz": 3}})
    with pytest.raises(LingshuError, match=r"Every setting must be known: 'steps'"):
        LingshuCell.train(pbmc, out=tmp_path / "b", settings={"steps": 3})
    assert not list(tmp_path.iterdir())


def test_automatic_conditions_need_a_label_in_every_cell(pbmc, tmp_path):
    assert automatic_condition_keys([pbmc]) == ("cell_type",)
    incomplete = pbmc.copy()
    incomplete.obs.iloc[3, incomplete.obs.columns.get_loc("cell_type")] = None
    assert automatic_condition_keys([pbmc, incomplete]) == ()
    without = pbmc.copy()
    del without.obs["cell_type"]
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    assert automatic_condition_keys([without]) == ()
    assert automatic_condition_keys([tmp_path / "cells.h5ad", str(tmp_path / "cells.h5ad")]) == ("cell_type",)

    def keys(**given) -> tuple[str, ...]:
        return run_config([pbmc], tmp_path / "new", **given).data.condition_keys

    assert keys() == ("cell_type",)
    assert keys(condition_keys=None) == keys(condition_keys=[]) == keys(settings=["data.condition_keys=[]"]) == ()
    assert keys(condition_keys="donor") == keys(settings=['data.condition_keys=["donor"]']) == ("donor",)


def readme_python() -> list[str]:
    """How to hold cells out, and the example."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def readme_example() -> str:
    """The Python example of the README with numbers that take seconds."""
    example = readme_python()[1]
    shorter = {"2000}": '12, "network.width": 32}', "generate(1000": "generate(80", "steps=64": "steps=8"}
    for long, short in shorter.items():
        assert long in example
        example = example.replace(long, short)
    return example


@pytest.fixture
def readers_folder(tmp_path) -> Path:
    cells = real_cells(360, 1000)
    rows = np.random.default_rng(0).permutation(cells.n_obs)
    cells[rows[:240]].copy().write_h5ad(tmp_path / "cells.h5ad")
    cells[rows[240:]].copy().write_h5ad(tmp_path / "heldout.h5ad")
    return tmp_path


def test_readme_holds_a_tenth_of_the_cells_out(tmp_path):
    cells = real_cells(360, 1000)
    cells.write_h5ad(tmp_path / "all.h5ad")
    python(readme_python()[0], cwd=tmp_path)
    parts = [ad.read_h5ad(tmp_path / f"{name}.h5ad").obs_names for name in ("cells", "heldout")]
    assert sorted([*parts[0], *parts[1]]) == sorted(cells.obs_names)
    assert 15 < len(parts[1]) < 60


def test_readme_example_trains_generates_and_scores(readers_folder):
    generating, judging = readme_example().split("\ngenerated = ")
    assert "evaluate" not in generating and "evaluate" in judging
    printed = python(generating, cwd=readers_folder)
    assert "generated-0-0" in printed and "B cells" in printed and "nats_per_cell" in printed


@pytest.mark.slow
def test_readme_example_runs_to_its_end(readers_folder):
    python(readme_example(), cwd=readers_folder)
    metrics = json.loads((readers_folder / "evaluation" / "metrics.json").read_text())
    table = pd.DataFrame(metrics).T
    assert table.loc["gene_mean_pearson", "value"] > 0.5 and table.loc["nelbo_nats_per_cell", "value"] > 0
    assert (readers_folder / "evaluation" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_demo_runs_through_and_is_refused_twice(tmp_path):
    from lingshu_cell.demo import run_demo

    settings = ["training.steps=30", "network.width=64", "generation.steps=8"]
    result = run_demo(tmp_path / "demo", settings=settings)
    assert result.report.is_file()
    assert list(result.seconds) == ["split", "train", "generate", "evaluate", "report", "total"]
    generated = ad.read_h5ad(tmp_path / "demo" / "generated.h5ad")
    assert generated.shape == ad.read_h5ad(tmp_path / "demo" / "heldout.h5ad").shape == (270, 32738)
    with pytest.raises(LingshuError, match="Pass --overwrite to replace it"):
        run_demo(tmp_path / "demo", settings=settings)


def test_demo_replaces_only_a_demo(tmp_path):
    from lingshu_cell.demo import MARKER, _make_room

    own = tmp_path / "own"
    (own / "run").mkdir(parents=True)
    with pytest.raises(LingshuError, match="The demo needs a new folder"):
        _make_room(own, overwrite=True)
    assert (own / "run").is_dir()
    (own / MARKER).write_text("{}")
    (own / "notes.txt").write_text("mine")
    with pytest.raises(LingshuError, match="Pass --overwrite to replace it"):
        _make_room(own, overwrite=False)
    _make_room(own, overwrite=True)
    assert sorted(path.name for path in own.iterdir()) == [MARKER, "notes.txt"]


def public_names() -> list[tuple[str, ast.AST]]:
    found = []
    for file in sorted((ROOT / "src" / "lingshu_cell").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        place = file.relative_to(ROOT / "src").as_posix()
        if file.stat().st_size:
            found.append((place, tree))
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            found.append((f"{place}: {node.name}", node))
            members = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m for m in members if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
            # A network's forward is told by its class.
            found += [(f"{place}: {node.name}.{m.name}", m) for m in methods if m.name != "forward"]
    return found


def test_public_names_are_documented():
    without = [name for name, node in public_names() if not ast.get_docstring(node)]
    assert not without


def test_public_names_number_as_many_as_there_are():
    assert len(public_names()) > 150  # the search above finds what it should
