"""DE tables: the same numbers as scipy, honest about controls and corrections, safe file names."""

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import typer
from conftest import SHARED_DATA, real_cells
from scipy.stats import false_discovery_control, mannwhitneyu
from typer.testing import CliRunner

from lingshu_cell.commands import de as command
from lingshu_cell.errors import LingshuError
from lingshu_cell.metrics.differential import (
    COLUMNS,
    PSEUDOCOUNT,
    differential_tables,
    read_differential,
    write_differential,
)

pytest.importorskip("pdex")
KEYS = {"perturbation_key": "perturbation", "control": "control"}
PAPALEXI = SHARED_DATA / "papalexi_eccite_299g.h5ad"


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """Real cells: B cells and monocytes stand in for two perturbations of T cells, in two donors."""
    adata = real_cells(600, 120)
    adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
    names = {"B cells": "A/B", "CD14+ Monocytes": "mono"}
    adata.obs["perturbation"] = [names.get(name, "control") for name in adata.obs["cell_type"].astype(str)]
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 2, "d 1", "d 2")
    return adata


def normalised(adata: ad.AnnData) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    return 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)


def test_numbers_are_those_of_scipy(cells):
    groups = cells.obs["perturbation"].to_numpy(str)
    table = differential_tables(cells.X, groups, "control", cells.var_names)["mono"].set_index("gene")
    table = table.loc[cells.var_names]
    values = normalised(cells)
    here, there = values[groups == "mono"], values[groups == "control"]
    expected = np.array([mannwhitneyu(here[:, g], there[:, g]).pvalue for g in range(cells.n_vars)])
    np.testing.assert_allclose(table["p_value"], np.nan_to_num(expected, nan=1.0), rtol=1e-6)
    np.testing.assert_allclose(table["fdr"], false_discovery_control(table["p_value"]), rtol=1e-6)
    np.testing.assert_allclose(table["mean_perturbed"], here.mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["mean_control"], there.mean(0), rtol=1e-6)
    change = np.log2((here.mean(0) + PSEUDOCOUNT) / (there.mean(0) + PSEUDOCOUNT))
    np.testing.assert_allclose(table["log2_fold_change"], change, atol=1e-6)
    np.testing.assert_allclose(table["fraction_perturbed"], (here > 0).mean(0))
    np.testing.assert_allclose(table["fraction_control"], (there > 0).mean(0))


def test_controls_against_controls_change_nothing(cells):
    """Random halves of real controls: hardly a gene is significant; a real difference gives many."""
    controls = cells[cells.obs["perturbation"] == "control"]
    found = []
    for seed in range(5):
        groups = np.where(np.random.default_rng(seed).random(controls.n_obs) < 0.5, "control", "other")
        table = differential_tables(controls.X, groups, "control", controls.var_names)["other"]
        found.append((table["fdr"] < 0.05).sum())
    real = differential_tables(cells.X, cells.obs["perturbation"].to_numpy(str), "control", cells.var_names)["mono"]
    assert sum(found) <= 2 < 15 < (real["fdr"] < 0.05).sum()


def test_a_folder_says_everything_and_reads_back(cells, tmp_path):
    index = write_differential(cells, tmp_path / "de", **KEYS, identity_keys=["donor"])
    assert index["condition"].tolist() == ["d 1 / A/B", "d 1 / mono", "d 2 / A/B", "d 2 / mono"]
    assert index["file"].tolist() == ["d_1_A_B.csv", "d_1_mono.csv", "d_2_A_B.csv", "d_2_mono.csv"]
    readme = (tmp_path / "de" / "README.txt").read_text(encoding="utf-8")
    for words in ("perturbation = control", "same donor", "Mann-Whitney", "pdex", "Benjamini-Hochberg over all 120"):
        assert words in readme
    assert "another file" not in readme
    found = read_differential(tmp_path / "de")
    assert list(found.tables) == index["condition"].tolist()
    table = found.tables["d 1 / mono"]
    assert tuple(table.columns) == COLUMNS and len(table) == 120 and table["p_value"].is_monotonic_increasing
    row = index.set_index("condition").loc["d 1 / mono"]
    here = (cells.obs["donor"] == "d 1").to_numpy()
    assert row["n_perturbed"] == (here & (cells.obs["perturbation"] == "mono").to_numpy()).sum()
    assert row["n_control"] == (here & (cells.obs["perturbation"] == "control").to_numpy()).sum()
    assert row["n_up"] + row["n_down"] == row["n_significant"] == (table["fdr"] < 0.05).sum()
    facts = json.loads((tmp_path / "de" / "de.json").read_text(encoding="utf-8"))
    assert facts["versions"]["pdex"] and facts["control"] == "control" and facts["identity_keys"] == ["donor"]


def test_controls_of_another_file_are_aligned_by_name_and_said(cells, tmp_path):
    whole = write_differential(cells, tmp_path / "whole", **KEYS)
    perturbed = cells[cells.obs["perturbation"] != "control"]
    shuffled = cells[cells.obs["perturbation"] == "control", np.random.default_rng(0).permutation(cells.n_vars)]
    split = write_differential(perturbed, tmp_path / "split", **KEYS, controls=shuffled.copy())
    pd.testing.assert_frame_equal(whole, split)
    one, two = (read_differential(tmp_path / name).tables["mono"] for name in ("whole", "split"))
    pd.testing.assert_frame_equal(
        one.sort_values("gene", ignore_index=True), two.sort_values("gene", ignore_index=True), rtol=1e-5
    )
    assert "controls come from another file" in (tmp_path / "split" / "README.txt").read_text(encoding="utf-8")


def test_cells_without_controls_are_refused(cells, tmp_path):
    perturbed = cells[cells.obs["perturbation"] != "control"].copy()
    with pytest.raises(LingshuError, match=r"compared with control cells.*no cell has.*'control'.*--controls"):
        write_differential(perturbed, tmp_path / "de", **KEYS)
    with pytest.raises(LingshuError, match="no cell of the file of controls has"):
        write_differential(perturbed, tmp_path / "de", **KEYS, controls=perturbed)
    lonely = cells[(cells.obs["perturbation"] != "control") | (cells.obs["donor"] == "d 1")].copy()
    with pytest.raises(LingshuError, match=r"Every identity needs control cells of its own: none for 'd 2' \(1\)"):
        write_differential(lonely, tmp_path / "de", **KEYS, identity_keys=["donor"])
    with pytest.raises(LingshuError, match=r"must have every gene.*lacks"):
        write_differential(
            perturbed, tmp_path / "de", **KEYS, controls=cells[:, cells.var_names != cells.var_names[7]].copy()
        )
    with pytest.raises(LingshuError, match="There must be perturbed cells"):
        write_differential(cells[cells.obs["perturbation"] == "control"].copy(), tmp_path / "de", **KEYS)
    assert not (tmp_path / "de").exists()


def test_few_cells_are_not_tested_and_names_never_collide(cells, tmp_path):
    adata = cells.copy()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    rows = np.flatnonzero((adata.obs["perturbation"] == "mono").to_numpy())
    labels = adata.obs["perturbation"].to_numpy(object).copy()
    labels[rows[:20]], labels[rows[20:40]], labels[rows[40:42]], labels[rows[42:60]] = "a b", "A_B", "few", "index"
    adata.obs["perturbation"] = labels
    with pytest.warns(UserWarning, match=r"Fewer than 3 cells on a side, not tested: 'few' \(1\)"):
        index = write_differential(adata, tmp_path / "de", **KEYS).set_index("condition")
    files = index["file"][index["file"] != ""]
    assert files.str.lower().is_unique and "index.csv" not in set(files) and index.loc["few", "file"] == ""
    found = read_differential(tmp_path / "de")
    assert "few" not in found.tables and {"A/B", "A_B", "a b", "index"} <= set(found.tables)
    assert found.tables["A/B"]["p_value"].min() < 1e-10


def test_equal_power_by_drawing_cells(cells, tmp_path):
    index = write_differential(cells, tmp_path / "de", **KEYS, max_cells=25, seed=3)
    assert set(index["n_perturbed"]) == {25} and set(index["n_control"]) == {25}
    assert "At most 25 cells" in (tmp_path / "de" / "README.txt").read_text(encoding="utf-8")
    again = write_differential(cells, tmp_path / "again", **KEYS, max_cells=25, seed=3)
    pd.testing.assert_frame_equal(index, again)
    with pytest.raises(LingshuError, match="At least 3 cells are compared"):
        write_differential(cells, tmp_path / "de", **KEYS, max_cells=2)


def test_a_damaged_folder_is_refused(cells, tmp_path):
    with pytest.raises(LingshuError, match="A folder of DE tables must be whole"):
        read_differential(tmp_path)
    write_differential(cells, tmp_path / "de", **KEYS)
    table = pd.read_csv(tmp_path / "de" / "mono.csv").drop(columns="fdr")
    table.to_csv(tmp_path / "de" / "mono.csv", index=False)
    with pytest.raises(LingshuError, match="must have all its columns: not so: 'mono'"):
        read_differential(tmp_path / "de")


def test_the_library_is_quiet_but_its_warnings_pass(cells, capsys):
    differential_tables(cells.X, cells.obs["perturbation"].to_numpy(str), "control", cells.var_names)
    assert capsys.readouterr().err == ""


def test_the_command_prints_conditions_and_draws(cells, tmp_path):
    pytest.importorskip("matplotlib")
    adata = cells.copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    app = typer.Typer()
    app.command()(command.de)
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--out", str(tmp_path / "de")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, [str(tmp_path / "cells.h5ad"), *keys, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [row["condition"] for row in said["conditions"]] == ["A/B", "mono"] and len(said["figures"]) == 3
    text = CliRunner().invoke(app, [str(tmp_path / "cells.h5ad"), *keys, "--no-figures"])
    assert text.exit_code == 0 and "2 tables, 0 pictures" in text.output.replace("\n", "")


@pytest.mark.skipif(not PAPALEXI.exists(), reason="needs the shared data")
def test_knock_outs_lower_their_own_transcripts_and_the_pathway(tmp_path):
    index = write_differential(PAPALEXI, tmp_path / "de", **KEYS).set_index("condition")
    tables = read_differential(tmp_path / "de").tables
    for target in ("JAK2", "STAT1", "NFKBIA", "CMTM6"):
        own = tables[target].set_index("gene").loc[target]
        assert own["fdr"] < 0.05 and own["log2_fold_change"] < 0
    assert index.loc["IFNGR1", "n_significant"] > 50 > 5 > index.loc["CD86", "n_significant"]
