"""Minibatches: every cell once per epoch, the same for any number of processes, resumed exactly, balanced on demand."""

import json
import tracemalloc
from itertools import islice

import anndata as ad
import numpy as np
import pytest
from conftest import real_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from lingshu_cell.data.loader import Groups, StoreLoader, balanced_groups
from lingshu_cell.data.store import Store, open_store
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.errors import LingshuError
from lingshu_cell.prepare import prepare
from lingshu_cell.tokens import MASK_TOKEN


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """230 real cells × 80 genes of two data sets in shards of 50."""
    folder = tmp_path_factory.mktemp("loader")
    adata = real_cells(230, 80)
    adata[:200].copy().write_h5ad(folder / "large.h5ad")
    adata[200:, :60].copy().write_h5ad(folder / "small.h5ad")
    prepare([folder / "large.h5ad", folder / "small.h5ad"], folder / "store", cells_per_shard=50)
    return open_store(folder / "store")


def first(loader: StoreLoader, n: int) -> np.ndarray:
    return np.concatenate([minibatch.cells for minibatch in islice(loader, n)])


def test_a_minibatch_holds_the_cells_it_names(store):
    loader = StoreLoader(store, 16, 3, window_cells=48, block_cells=4, condition_keys=["cell_type", "data_set"])
    for step, minibatch in enumerate(islice(loader, 40)):
        counts = store.counts(minibatch.cells)
        counts.data = encode(counts.data)
        assert minibatch.step == step and len(minibatch.cells) == 16
        assert minibatch.tokens.dtype == np.int16 and (minibatch.tokens != counts).nnz == 0
        assert (minibatch.conditions == store.condition_rows(["cell_type", "data_set"], minibatch.cells)).all()
        dense = minibatch.dense(store.measured)
        masked = ~store.measured[minibatch.data_set]
        assert (dense[masked] == MASK_TOKEN).all() and (dense[~masked] == counts.toarray()[~masked]).all()


def test_genes_may_be_chosen(store):
    genes = np.array([0, 3, 40, 79])
    minibatch = StoreLoader(store, 32, 0, genes=genes).minibatch(0)
    expected = StoreLoader(store, 32, 0).minibatch(0).tokens[:, genes]
    assert (minibatch.tokens != expected).nnz == 0 and expected.nnz
    with pytest.raises(LingshuError, match="rising indices"):
        StoreLoader(store, 32, 0, genes=np.array([3, 1]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 100), st.integers(1, 40), st.integers(0, 2**40), st.booleans(), st.integers(1, 3)
)
def test_every_epoch_has_every_cell_once(minibatch_size, window, block, seed, some, n_epochs):
    store = test_every_epoch_has_every_cell_once.store
    cells = np.arange(3, 230, 5) if some else range(7, 120)
    loader = StoreLoader(store, minibatch_size, seed, cells=cells, window_cells=window, block_cells=block)
    n = len(cells)
    drawn = first(loader, -(-n_epochs * n // minibatch_size))[: n_epochs * n].reshape(n_epochs, n)
    assert loader.cells_per_epoch == n
    for epoch in drawn:
        assert sorted(epoch) == list(cells)


@pytest.fixture(autouse=True)
def _store_for_hypothesis(store):
    test_every_epoch_has_every_cell_once.store = store


def test_epochs_and_seeds_differ_and_order_is_random(store):
    epochs = first(StoreLoader(store, 230, 0, block_cells=8), 2).reshape(2, 230)
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (first(StoreLoader(store, 230, 1, block_cells=8), 1) != epochs[0]).mean() > 0.9
    assert abs(np.corrcoef(epochs[0], np.arange(230))[0, 1]) < 0.25
    assert (first(StoreLoader(store, 230, 0, block_cells=8), 2) == epochs.ravel()).all()


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_share_the_steps_of_one(store, balanced):
    groups = balanced_groups(store, ["cell_type"]) if balanced else None
    kwargs = {"groups": groups, "window_cells": 50, "block_cells": 4}
    alone = StoreLoader(store, 24, 5, **kwargs)
    for world_size in (2, 3, 7):
        ranks = [StoreLoader(store, 24, 5, rank=r, world_size=world_size, **kwargs) for r in range(world_size)]
        for step in (0, 1, 2, 9, 10, 30):
            parts = [loader.minibatch(step) for loader in ranks]
            whole = alone.minibatch(step)
            assert (np.concatenate([part.cells for part in parts]) == whole.cells).all()
            assert (parts[1].tokens != whole.tokens[24 // world_size : 2 * 24 // world_size]).nnz == 0
            assert sorted({len(part.cells) for part in parts}) in ([24 // world_size], [3, 4])


@pytest.mark.parametrize("prefetch", [False, True])
def test_resumed_minibatches_are_those_of_an_undisturbed_run(store, prefetch):
    kwargs = {"window_cells": 40, "block_cells": 8, "cells": range(200)}
    undisturbed = [m.cells for m in islice(StoreLoader(store, 12, 9, **kwargs), 60)]
    for stop in (0, 1, 16, 17, 41):
        loader = StoreLoader(store, 12, 9, prefetch=prefetch, **kwargs)
        first(loader, stop) if stop else None
        state = json.loads(json.dumps(loader.state))
        loader.close()
        again = StoreLoader(store, 12, 9, prefetch=prefetch, rank=1, world_size=2, **kwargs)
        again.restore(state)
        for expected, minibatch in zip(undisturbed[stop:], again, strict=False):
            assert (minibatch.cells == expected[6:]).all()
        again.close()


def test_a_state_of_something_else_is_refused(store):
    state = StoreLoader(store, 12, 9).state
    for other in (StoreLoader(store, 12, 8), StoreLoader(store, 13, 9), StoreLoader(store, 12, 9, cells=range(9))):
        with pytest.raises(LingshuError, match="differ"):
            other.restore(state)


def test_balanced_groups_are_drawn_as_weighted(store):
    groups = balanced_groups(store, ["data_set"])
    assert groups.names == (("large",), ("small",)) and [len(m) for m in groups.members] == [200, 30]
    cells = first(StoreLoader(store, 50, 0, groups=groups, window_cells=100), 120)
    drawn = np.bincount(store.data_set[cells], minlength=2) / len(cells)
    assert np.allclose(drawn, 0.5, atol=0.01)
    times = np.bincount(cells, minlength=230)[groups.members[1]]
    assert times.max() - times.min() <= 2  # within a group all cells are drawn equally often
    assert np.allclose(balanced_groups(store, ["data_set"], power=1).weights, [200 / 230, 30 / 230])
    weighted = balanced_groups(store, ["data_set", "cell_type"], cells=range(100), power=1, weights={"small": 0})
    assert all(name[0] == "large" for name in weighted.names)
    assert max(m.max() for m in weighted.members) < 100 and np.isclose(weighted.weights.sum(), 1)
    with pytest.raises(LingshuError, match="no cell has 'nothing'"):
        balanced_groups(store, ["data_set"], weights={"nothing": 2.0})


def test_more_groups_than_cells_of_a_window_are_drawn_as_weighted_too(store):
    groups = Groups(tuple((str(i),) for i in range(230)), tuple(np.arange(i, i + 1) for i in range(230)),
                    np.arange(1, 231) / (231 * 115))  # fmt: skip
    loader = StoreLoader(store, 30, 0, groups=groups, window_cells=20)
    drawn = np.bincount(first(loader, 900), minlength=230)
    assert np.abs(drawn - 27_000 * groups.weights).max() < 1.5
    again = StoreLoader(store, 30, 0, groups=groups, window_cells=20)
    assert (again.minibatch(450).cells == loader.minibatch(450).cells).all()


@pytest.mark.parametrize("genes", [None, np.array([0, 3, 40, 79])])
def test_library_sizes_are_sums_of_the_counts_delivered(store, genes):
    minibatch = StoreLoader(store, 64, 0, genes=genes, library=True).minibatch(1)
    counts = store.counts(minibatch.cells)[:, slice(None) if genes is None else genes]
    assert (minibatch.library == np.asarray(counts.sum(1)).ravel()).all() and minibatch.library.any()


def test_what_does_not_fit_is_refused(store):
    for kwargs, words in (
        ({"world_size": 13}, "Start fewer processes"),
        ({"cells": range(0)}, "needs cells"),
        ({"condition_keys": ["x"]}, "Available"),
        ({"groups": balanced_groups(store, ["cell_type"]), "cells": range(4)}, "given once"),
    ):
        with pytest.raises(LingshuError, match=words):
            StoreLoader(store, 12, 0, **kwargs)


def test_memory_does_not_grow_with_the_store(tmp_path):
    peaks = []
    for copies in (2, 12):
        adata = real_cells(200, 150)
        many = ad.concat([adata] * copies, index_unique="-")
        many.write_h5ad(tmp_path / f"{copies}.h5ad")
        prepare([tmp_path / f"{copies}.h5ad"], tmp_path / f"store{copies}", cells_per_shard=100)
        loader = StoreLoader(open_store(tmp_path / f"store{copies}"), 20, 0, window_cells=100, block_cells=10)
        first(loader, 10 * copies)  # every shard is opened and checked
        tracemalloc.start()
        for _ in islice(loader, 10 * copies):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # six times the cells: only the order of the blocks grows
