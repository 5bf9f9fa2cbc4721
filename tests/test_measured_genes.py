"""Genes that a data set lacks are hidden in training and never generated for its cells."""

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import tiny_config

from lingshu_cell.data.measured_genes import MeasuredGenes
from lingshu_cell.generate import generate, load_model, plan_cells, provenance
from lingshu_cell.prepare import prepare
from lingshu_cell.train import train


@pytest.fixture(scope="module")
def two_sets(pbmc) -> tuple[ad.AnnData, ad.AnnData]:
    """The same cells as two halves, of which each lacks some of the genes of the other."""
    parts = pbmc[::2, :110].copy(), pbmc[1::2, 40:].copy()
    for part, name in zip(parts, ("left", "right"), strict=True):
        part.obs["set"] = name
    return parts


@pytest.fixture(scope="module", params=["files", "store"])
def model(request, two_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    sources = []
    for part in two_sets:
        sources.append(folder / f"{part.obs['set'].iloc[0]}.h5ad")
        part.write_h5ad(sources[-1])
    if request.param == "store":
        prepare(sources, folder / "store")
        sources = [folder / "store"]
    train(sources, folder / "run", tiny_config(data={"condition_keys": ["set"], "min_cells_per_gene": 6}))
    return load_model(folder / "run")


def test_cells_show_the_genes_that_their_data_set_measured_and_no_others(model, two_sets):
    for part in two_sets:
        name = part.obs["set"].iloc[0]
        made = generate(model, 40, condition={"set": name}, seed=3)
        lacked = ~made.var_names.isin(part.var_names)
        assert (lacked & made.var["modelled"]).sum() > 10 and (lacked & ~made.var["modelled"]).sum() > 5
        assert made.X[:, lacked].nnz == 0
        rare = model.rare.data_set == (name == "right")
        expected = rare.sum() / part.n_obs / 0.8  # a fifth of the cells validates
        shown = made.X[:, (~made.var["modelled"]).to_numpy()].nnz / made.n_obs
        assert shown == pytest.approx(expected, abs=4 * (expected / made.n_obs) ** 0.5)
        measured = (made.var_names.isin(part.var_names) & made.var["modelled"]).to_numpy()
        shown = np.asarray((made.X[:, measured] > 0).mean(0)).ravel()
        real = np.asarray((part[:, made.var_names[measured]].X > 0).mean(0)).ravel()
        assert np.corrcoef(shown, real)[0, 1] > 0.8
        assert "modelled genes are 0" in " ".join(plan_cells(model, 4, condition={"set": name}).notes)


def test_cells_drawn_from_all_conditions_each_keep_to_their_own(model, two_sets):
    made = generate(model, 60, seed=1)
    for part in two_sets:
        mine = (made.obs["set"] == part.obs["set"].iloc[0]).to_numpy()
        lacked = (~made.var_names.isin(part.var_names) & made.var["modelled"]).to_numpy()
        assert mine.sum() > 10 and made.X[mine][:, lacked].nnz == 0
        assert made.X[~mine][:, lacked].nnz > 0


def test_note_is_kept_with_the_cells(model):
    notes = provenance(model, plan_cells(model, 4))["steering"]["notes"]
    assert "modelled genes are 0" in " ".join(notes)


def test_one_data_set_has_nothing_to_hide(trained_run):
    assert load_model(trained_run).measured is None


def test_rows_that_no_training_cell_has_get_the_genes_of_those_like_them():
    table = MeasuredGenes(
        np.array([[1, 1], [1, 2], [2, 2]]),
        np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool),
        np.eye(3, dtype=bool),
    )
    wanted = np.array([[1, 1], [1, 0], [0, 2], [2, 1], [0, 0], [3, 1]])
    expected = [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert table.genes(wanted, None).astype(int).tolist() == expected
    expected[3] = [0, 0, 1]  # as its identity's
    assert table.genes(wanted, 1).astype(int).tolist() == expected
    saved = {"condition_rows": torch.from_numpy(table.row_RC), **table.to_tensors()}
    again = MeasuredGenes.from_tensors(saved, 3)
    assert (again.genes(wanted, 1) == table.genes(wanted, 1)).all()
    for name in ("measured", "condition_row_data_sets"):
        with pytest.raises(ValueError, match="measured genes of other types or shapes"):
            MeasuredGenes.from_tensors({**saved, name: saved[name][:2]}, 3)
    with pytest.raises(ValueError, match="measured genes of other types or shapes"):
        MeasuredGenes.from_tensors(saved, 4)
