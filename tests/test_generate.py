"""Generated cells depend on their seed alone, are whole integer cells, and carry what made them."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import real_cells, tiny_config
from scipy import sparse, stats

import lingshu_cell.generate
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.training_set import assemble
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import TrainedModel, generate, generate_chunks, generate_file, load_model
from lingshu_cell.train import train

MARKERS = {"B cells": "CD79A", "CD14+ Monocytes": "LYZ", "NK cells": "NKG7"}


@pytest.fixture(scope="module")
def model(trained_run) -> TrainedModel:
    return load_model(trained_run)


@pytest.fixture(scope="module")
def thirty(model) -> ad.AnnData:
    """30 cells of seed 0 in tiles of 8 rows, minibatches of 16."""
    return generate(model, 30)


def assert_same_cells(one: ad.AnnData, other: ad.AnnData) -> None:
    pd.testing.assert_frame_equal(one.obs.astype(str), other.obs.astype(str))  # slicing drops unused categories
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(one.X, part), getattr(other.X, part), err_msg=part)


@pytest.mark.parametrize("minibatch_size", [1, 8, 17, 1000])
def test_cells_do_not_depend_on_the_minibatch_size(model, thirty, minibatch_size):
    assert_same_cells(generate(model, 30, minibatch_size=minibatch_size), thirty)


@pytest.mark.parametrize("n", [1, 7, 8, 29])
def test_cells_do_not_depend_on_how_many_are_asked_for(model, thirty, n):
    assert_same_cells(generate(model, n), thirty[:n])


@pytest.mark.parametrize(("first", "n"), [(1, 29), (8, 8), (13, 5), (29, 1)])
def test_cells_do_not_depend_on_where_a_restart_begins(model, thirty, first, n):
    assert_same_cells(generate(model, n, first=first), thirty[first : first + n])


def test_network_sees_the_same_whole_tiles_wherever_a_restart_begins(trained_run):
    """A cell has the same row of the same tile, so that rounding, which may depend on the row, is the same too."""
    model, seen = load_model(trained_run), []
    answer = model.network.answer

    def watched(cells, conditions):
        seen.append(cells.x_t_BG.clone())
        return answer(cells, conditions)

    model.network.answer = watched
    generate(model, 24)
    whole = seen.copy()
    assert {len(x_t_BG) for x_t_BG in whole} == {8}
    seen.clear()
    generate(model, 5, first=13)
    assert [torch.equal(one, other) for one, other in zip(seen, whole[8:], strict=True)] == [True] * 16


def test_loading_again_and_global_random_state_change_nothing(trained_run, thirty):
    torch.manual_seed(123)
    np.random.seed(123)
    assert_same_cells(generate(load_model(trained_run), 30), thirty)


def test_file_holds_the_same_cells(model, thirty, tmp_path):
    progress: list[int] = []
    path = generate_file(model, 30, tmp_path / "cells.h5ad", on_progress=progress.append)
    written = ad.read_h5ad(path)
    np.testing.assert_array_equal(written.X.toarray(), thirty.X.toarray())
    assert list(written.obs_names) == list(thirty.obs_names)
    assert list(written.obs["cell_type"].astype(str)) == list(thirty.obs["cell_type"].astype(str))
    assert progress == [16, 30]
    assert written.uns["lingshu_cell"]["n_cells"] == 30
    assert len(written.uns["lingshu_cell"]["checkpoint_checksum"]) == 64


def test_what_is_asked_for_is_resolved_once(model, tmp_path, monkeypatch):
    """Cells and what is said of them come from one and the same plan."""
    called = []
    for name in ("resolve_request", "choose_schedule"):
        real = getattr(lingshu_cell.generate, name)
        count = lambda *a, name=name, real=real, **k: (called.append(name), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(lingshu_cell.generate, name, count)
    generate_file(model, 3, tmp_path / "cells.h5ad", steps=2)
    assert sorted(called) == ["choose_schedule", "resolve_request"]


def test_different_seeds_give_different_cells(model, thirty):
    other = generate(model, 30, seed=1)
    assert set(other.obs_names).isdisjoint(thirty.obs_names)
    assert set(other.obs["seed"]).isdisjoint(thirty.obs["seed"])
    assert len({row.tobytes() for row in np.concatenate([thirty.X.toarray(), other.X.toarray()])}) > 55


def test_cells_are_whole_integer_counts_of_every_gene(model, thirty, pbmc):
    assert sparse.isspmatrix_csr(thirty.X) or isinstance(thirty.X, sparse.csr_matrix)
    assert thirty.X.dtype == np.int32
    assert thirty.X.has_canonical_format
    assert thirty.X.data.min() > 0
    assert list(thirty.var_names) == list(pbmc.var_names)
    assert list(thirty.var["gene_ids"]) == list(pbmc.var["gene_ids"])
    assert thirty.var["modelled"].sum() == len(model.modelled)
    assert thirty.obs_names.is_unique


def test_wanted_condition_is_in_every_cell_and_brings_its_markers(tmp_path):
    others = real_cells(900, 30, least_detected=200).var_names.difference(MARKERS.values())
    adata = ad.read_h5ad(pbmc3k_path())[::3, [*MARKERS.values(), *others]].copy()
    config = tiny_config(
        network={"gene_width": 16, "width": 32, "dropout": 0.0},
        training={"steps": 300, "minibatch_size": 64, "peak_learning_rate": 2e-2, "final_learning_rate": 5e-3,
                  "condition_dropout": 0.0, "checkpoint_every": 1000, "validate_every": 1000},
    )  # fmt: skip
    train([adata], tmp_path / "run", config)
    model = load_model(tmp_path / "run")
    cells = {kind: generate(model, 80, condition={"cell_type": kind}) for kind in MARKERS}
    for kind, marker in MARKERS.items():
        assert (cells[kind].obs["cell_type"] == kind).all()
        shown = {other: (cells[other][:, marker].X > 0).mean() for other in MARKERS}
        print(marker, shown)
        assert all(shown[kind] > shown[other] + 0.2 for other in MARKERS if other != kind), (marker, shown)


def test_open_conditions_are_drawn_as_often_as_in_training(model, pbmc):
    drawn = pd.concat([chunk.obs for chunk in generate_chunks(model, 400, steps=1)])["cell_type"].value_counts()
    cells = assemble([read_counts(pbmc)], condition_keys=["cell_type"], validation_fraction=0.2)
    rows, counts = cells.condition_frequencies()
    labels = list(cells.conditions.decode(rows)["cell_type"])
    expected = counts / counts.sum() * 400
    assert stats.chisquare(drawn.reindex(labels, fill_value=0), expected).pvalue > 1e-3


def test_rare_genes_come_with_their_frequency(pbmc, tmp_path):
    config = tiny_config(data={"min_cells_per_gene": 40, "condition_keys": []}, training={"steps": 1})
    train([pbmc], tmp_path / "run", config)
    model = load_model(tmp_path / "run")
    assert 50 < pbmc.n_vars - len(model.modelled) < pbmc.n_vars
    rare = ~np.isin(np.arange(pbmc.n_vars), model.modelled)
    expected = model.rare.count.sum() / model.rare.n_cells_S.sum()
    per_cell = np.asarray(generate(model, 600, steps=1)[:, rare].X.sum(1)).ravel()
    assert abs(per_cell.mean() - expected) < 4 * per_cell.std() / 600**0.5
    assert set(np.flatnonzero(per_cell)), "some cells have rare counts"


def test_untrained_model_generates_the_marginals_of_real_cells(pbmc, tmp_path):
    """At step 1 the network still knows only each gene's token frequencies: generated means are the real ones."""
    train([pbmc], tmp_path / "run", tiny_config(training={"steps": 1, "peak_learning_rate": 1e-9}))
    cells = generate(load_model(tmp_path / "run"), 600, steps=4)
    detected, real = (np.asarray((adata.X > 0).mean(0)).ravel() for adata in (cells, pbmc))
    assert np.abs(detected - real).max() < 0.12
    assert np.corrcoef(detected, real)[0, 1] > 0.99


def test_papers_network_generates_reproducibly(pbmc, tmp_path):
    train([pbmc], tmp_path / "run", tiny_config("paper"))
    model = load_model(tmp_path / "run")
    whole = generate(model, 20, schedule="cosine")
    assert_same_cells(generate(model, 20, schedule="cosine", minibatch_size=8), whole)
    assert_same_cells(generate(model, 9, schedule="cosine", first=11), whole[11:])


def test_averages_and_last_weights_can_be_chosen(trained_run, model):
    names = ["weights", "ema_0.05", "ema_0.10"]
    gates = {name: load_model(trained_run, weights=name).network.head.gate_bias_G.detach() for name in names}
    assert torch.equal(gates["ema_0.05"], model.network.head.gate_bias_G)
    assert not torch.equal(gates["weights"], gates["ema_0.05"])
    assert not torch.equal(gates["ema_0.10"], gates["ema_0.05"])


@pytest.mark.parametrize("weights", ["ema_0.5", "data", "optimizer", "../weights"])
def test_weights_that_are_none_are_refused(trained_run, weights):
    with pytest.raises(
        LingshuError, match=f"The weights must exist: '{weights}'. Choose one of weights, ema_0.05, ema_0.10"
    ):
        load_model(trained_run, weights=weights)


@pytest.mark.parametrize(
    ("n_cells", "settings", "message"),
    [
        (0, {}, "number of cells must be 1 or more: 0"),
        (5, {"steps": 0}, "between 1 and the number of genes: 0 steps"),
        (5, {"steps": 10_000}, "between 1 and the number of genes: 10000 steps"),
        (5, {"schedule": "linear"}, "The schedule must exist: 'linear'. Choose one of uniform, cosine, geometric"),
        (5, {"schedule": ""}, "The schedule must exist: ''"),
        (5, {"seed": -1}, "The seed must lie between 0 and 2147483647: -1"),
        (5, {"seed": 2**31}, "The seed must lie between"),
        (5, {"minibatch_size": 0}, "minibatch size must be 1 or more: 0"),
        (5, {"minibatch_size": -8}, "minibatch size must be 1 or more: -8"),
        (5, {"first": -1}, "first cell must be 0 or more: -1"),
        (5, {"condition": {"cell_type": "Neurons"}}, "cell_type has no 'Neurons'"),
        (5, {"condition": {"donor": "A"}}, "'donor' .* is not one of its fields"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused_with_their_wording(model, n_cells, settings, message):
    with pytest.raises(LingshuError, match=message):
        generate(model, n_cells, **settings)


def test_tiles_are_larger_where_a_gpu_would_wait_for_its_host(trained_run, monkeypatch):
    config = tiny_config(generation={"tile_size": "auto"})
    model = replace(load_model(trained_run), config=config)
    paper = replace(model, config=tiny_config("paper", generation={"tile_size": "auto"}))
    asked = replace(model, config=tiny_config(generation={"tile_size": 32}))
    assert [one.tile_size for one in (model, paper, asked)] == [64, 64, 32]
    monkeypatch.setattr(TrainedModel, "device", torch.device("cuda"))
    assert [one.tile_size for one in (model, paper, asked)] == [1024, 64, 32]
