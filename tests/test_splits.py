"""Splits are disjoint, complete, repeatable and keep their strata."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.splits import split_cells
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_is_a_partition_of_the_asked_size_and_repeatable(n, fraction, seed):
    assume(0 < round(n * fraction) < n)
    train, validation = split_cells(n, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(n))
    assert len(validation) == round(n * fraction)
    again = split_cells(n, fraction, seed)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(validation, again[1])


@given(st.lists(st.sampled_from("abcd"), min_size=20, max_size=200), st.floats(0.1, 0.5), st.integers(0, 9))
def test_strata_give_their_share_and_never_their_last_cell(labels, fraction, seed):
    labels = np.array(labels)
    train, validation = split_cells(len(labels), fraction, seed, labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    for label in set(labels):
        share = (labels == label).sum() * fraction
        assert abs((labels[validation] == label).sum() - share) <= 1
        assert (labels[train] == label).any()


def test_seeds_differ_and_the_split_of_seed_0_stays_what_it_was():
    assert split_cells(10, 0.3, 0)[1].tolist() == [2, 4, 6]
    assert split_cells(1000, 0.3, 1)[1].tolist() != split_cells(1000, 0.3, 2)[1].tolist()


def test_every_cell_is_held_out_equally_often():
    times = np.zeros(20)
    for seed in range(2000):
        times[split_cells(20, 0.25, seed)[1]] += 1
    assert abs(times / 500 - 1).max() < 0.2  # four standard deviations are 0.155


def test_real_cell_types_keep_their_proportions():
    cell_type = read_counts(pbmc3k_path()).obs["cell_type"]
    _, validation = split_cells(2700, 0.1, 0, cell_type)
    assert len(validation) == 270
    expected = cell_type.value_counts() * 0.1
    assert ((cell_type.iloc[validation].value_counts() - expected).abs() < 1).all()


@pytest.mark.parametrize(
    ("n", "fraction", "strata", "words"),
    [
        (10, 0.0, None, "must lie between 0 and 1: got 0.0"),
        (10, 1.0, None, "must lie between 0 and 1: got 1.0"),
        (10, float("nan"), None, "must lie between 0 and 1: got nan"),
        (3, 0.1, None, "both need cells: 0.1 of 3 cells leaves 3 and 0"),
        (1, 0.9, None, "both need cells: 0.9 of 1 cells leaves 0 and 1"),
        (0, 0.5, None, "both need cells"),
        (3, 0.5, ["a", "b", "c"], "0.5 of 3 cells leaves 3 and 0. Use more cells, another fraction, or no strata"),
        (3, 0.5, ["a", "b"], "one label per cell: 2 labels for 3 cells"),
        (3, 0.5, ["a", None, "a"], "a label in every cell: 1 of 3 cells have none"),
    ],
)
def test_impossible_splits_are_refused(n, fraction, strata, words):
    with pytest.raises(LingshuError, match=words):
        split_cells(n, fraction, 0, strata)
