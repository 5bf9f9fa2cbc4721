"""Data sets come onto one gene list, what was not measured stays unknown, and every epoch shows every cell once."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED_DATA, TINY_SET, real_cells
from hypothesis import given
from hypothesis import strategies as st

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.data.training_set import TrainingSet, assemble, minibatch_cells
from lingshu_cell.diffusion.loss import nelbo_estimate
from lingshu_cell.diffusion.noising import MaskLaw
from lingshu_cell.errors import LingshuError
from lingshu_cell.network.set_denoiser import SetDenoiser
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS


@pytest.fixture(scope="module")
def two(pbmc):
    """Two real data sets that share 75 genes; the first has 75 of its own, the second 25."""
    first, second = pbmc[:100].copy(), pbmc[100:, 50:].copy()
    second.var_names = [f"only-second-{i}" if i >= 75 else name for i, name in enumerate(second.var_names)]
    del second.var["gene_ids"]  # ids would still say that the renamed genes are the same
    return (
        first,
        second,
        assemble([read_counts(first), read_counts(second)], min_cells_per_gene=0, condition_keys=["cell_type"]),
    )


def test_tokens_of_one_data_set_are_those_of_its_counts(pbmc):
    cells = assemble([read_counts(pbmc)], min_cells_per_gene=3)
    expected = encode(pbmc.X.toarray().astype(np.int64))[:, cells.modelled]
    np.testing.assert_array_equal(cells.rows(np.arange(pbmc.n_obs)).tokens_BG, expected)
    np.testing.assert_array_equal(np.sort(np.concatenate([cells.train, cells.validation])), np.arange(pbmc.n_obs))
    assert len(cells.validation) == 24


def test_rare_genes_are_those_below_the_threshold_in_training_cells_and_keep_their_counts(pbmc):
    cells = assemble([read_counts(pbmc)], min_cells_per_gene=8)
    counts = pbmc.X.toarray()[cells.train].astype(np.int64)
    detected = (counts > 0).sum(0)
    assert 0 < (detected < 8).sum() < pbmc.n_vars
    np.testing.assert_array_equal(cells.modelled, np.flatnonzero(detected >= 8))
    kept = np.bincount(cells.rare.gene, weights=cells.rare.count, minlength=pbmc.n_vars)
    np.testing.assert_array_equal(kept, np.where(detected < 8, counts.sum(0), 0))
    assert cells.rare.n_cells_S.tolist() == [len(cells.train)]
    assert any("genes are modelled" in note for note in cells.notes)


def test_token_counts_are_those_of_the_training_cells(two):
    cells: TrainingSet = two[2]
    dense = cells.rows(cells.train).tokens_BG
    counts_GV = cells.token_counts()
    for gene in range(0, dense.shape[1], 7):
        measured = dense[:, gene][dense[:, gene] != MASK_TOKEN]
        np.testing.assert_array_equal(counts_GV[gene], np.bincount(measured, minlength=N_EXPRESSION_TOKENS))


def test_genes_a_data_set_lacks_are_masked_and_those_it_has_are_its_counts(two):
    first, second, cells = two
    names = [cells.vocabulary.names[i] for i in cells.modelled]
    assert len(names) == 150 + 25
    offset = 0
    for adata in (first, second):
        dense = pd.DataFrame(cells.rows(np.arange(offset, offset + adata.n_obs)).tokens_BG, columns=names)
        absent = [name for name in names if name not in set(adata.var_names)]
        assert len(absent) == (25 if adata is first else 75)
        assert (dense[absent] == MASK_TOKEN).all(None)
        np.testing.assert_array_equal(dense[list(adata.var_names)], encode(adata.X.toarray().astype(np.int64)))
        offset += adata.n_obs
    assert len(cells.notes) == 2


def test_absent_genes_are_neither_scored_nor_learned_from(two):
    cells: TrainingSet = two[2]
    network = SetDenoiser(
        len(cells.modelled), cells.conditions.sizes, torch.from_numpy(token_midpoints()),
        **TINY_SET | {"dropout": 0.0}, n_small_values=16, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    of_first = np.flatnonzero(cells.data_set == 0)
    x_0_BG = torch.from_numpy(cells.rows(of_first).tokens_BG)
    condition_BC = torch.from_numpy(cells.condition_NC[of_first])
    nelbo_estimate(network, x_0_BG, condition_BC, MaskLaw(0.5), torch.Generator().manual_seed(0)).sum().backward()
    learned_G = network.head.gate_bias_G.grad != 0
    np.testing.assert_array_equal(learned_G.numpy(), cells.measured[0])
    assert not (network.head.gene_GE.grad.abs().sum(1) > 0).numpy()[~cells.measured[0]].any()


def test_conditions_of_all_data_sets_share_one_list(two):
    first, second, cells = two
    labels = np.concatenate([first.obs["cell_type"], second.obs["cell_type"]])
    assert cells.conditions.fields["cell_type"] == tuple(sorted(set(labels)))
    np.testing.assert_array_equal(cells.conditions.decode(cells.condition_NC)["cell_type"].astype(str), labels)
    rows, counts = cells.condition_frequencies()
    assert counts.sum() == len(cells.train)
    assert (
        dict(zip(cells.conditions.decode(rows)["cell_type"], counts, strict=True))
        == pd.Series(labels[cells.train]).value_counts().to_dict()
    )


@pytest.mark.skipif(not (SHARED_DATA / "kang_ifnb.h5ad").exists(), reason="the shared data sets are not here")
def test_two_real_experiments_with_different_gene_lists_fit_together():
    kang = ad.read_h5ad(SHARED_DATA / "kang_ifnb.h5ad")[::100].copy()
    pbmc = real_cells(200, 6_000)
    cells = assemble([read_counts(pbmc), read_counts(kang)], min_coverage=0.3)
    assert 0.3 < cells.measured.mean(1).min() < cells.measured.mean(1).max() < 1
    shared = cells.measured.all(0)
    assert shared.sum() > 2000
    dense = cells.rows(np.arange(len(cells.data_set))).tokens_BG
    np.testing.assert_array_equal(dense == MASK_TOKEN, ~cells.measured[cells.data_set])


def test_no_gene_detected_often_enough_is_refused(pbmc):
    with pytest.raises(LingshuError, match=r"none of 150 is detected in 1000 of 216 training cells\. Use more cells"):
        assemble([read_counts(pbmc)], min_cells_per_gene=1000)


@given(st.integers(1, 60), st.integers(1, 150), st.integers(0, 5))
def test_every_epoch_shows_every_cell_once(n_cells, minibatch_size, seed):
    train = np.arange(n_cells) * 3 + 1
    n_epochs = 3
    n_steps = -(-n_epochs * n_cells // minibatch_size)
    order = np.concatenate([minibatch_cells(train, minibatch_size, step, seed) for step in range(n_steps)])
    for epoch in range(n_epochs):
        np.testing.assert_array_equal(np.sort(order[epoch * n_cells : (epoch + 1) * n_cells]), train)


def test_minibatches_are_a_function_of_step_and_seed_and_epochs_differ():
    train = np.arange(100)
    one = [minibatch_cells(train, 20, step, 0) for step in range(10)]
    np.testing.assert_array_equal(minibatch_cells(train, 20, 7, 0), one[7])
    assert not np.array_equal(np.concatenate(one[:5]), np.concatenate(one[5:]))
    assert not np.array_equal(minibatch_cells(train, 20, 0, 1), one[0])
