"""Schedules are grids of whole visible counts: from 0 to G, strictly rising, in exactly the steps asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingshu_cell.diffusion.schedule import GRIDS, cosine_grid, custom_grid, geometric_grid, uniform_grid
from lingshu_cell.errors import LingshuError

GENES_AND_STEPS = st.integers(1, 40_000).flatmap(lambda g: st.tuples(st.just(g), st.integers(1, min(g, 600))))


def assert_is_grid(grid: np.ndarray, n_genes: int, n_steps: int) -> None:
    assert np.issubdtype(grid.dtype, np.integer)
    assert len(grid) == n_steps + 1
    assert grid[0] == 0
    assert grid[-1] == n_genes
    assert (np.diff(grid) >= 1).all()


@pytest.mark.parametrize("name", GRIDS)
@given(GENES_AND_STEPS)
def test_grid_starts_at_0_rises_strictly_and_ends_at_all_genes_in_n_steps(name, genes_and_steps):
    assert_is_grid(GRIDS[name](*genes_and_steps), *genes_and_steps)


@pytest.mark.parametrize("name", GRIDS)
@given(st.integers(1, 5_000))
def test_as_many_steps_as_genes_reveals_one_by_one_and_one_step_reveals_all(name, n_genes):
    assert GRIDS[name](n_genes, n_genes).tolist() == list(range(n_genes + 1))
    assert GRIDS[name](n_genes, 1).tolist() == [0, n_genes]


def test_uniform_reveals_equal_shares():
    assert uniform_grid(18_080, 4).tolist() == [0, 4520, 9040, 13_560, 18_080]


def test_cosine_is_g_times_one_minus_cosine():
    exact = 18_080 * (1 - np.cos(np.pi / 2 * np.arange(257) / 256))
    np.testing.assert_allclose(cosine_grid(18_080, 256), exact, atol=1.0)
    assert cosine_grid(100, 2).tolist() == [0, 29, 100]


def test_geometric_multiplies_the_visible_count_by_a_constant():
    grid = geometric_grid(4**8, 9)
    assert grid.tolist() == [0, *(4**i for i in range(9))]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n_steps", [0, -1, 11])
def test_impossible_number_of_steps_is_refused(name, n_steps):
    with pytest.raises(LingshuError, match=rf"between 1 and the number of genes: {n_steps} steps, 10 genes"):
        GRIDS[name](10, n_steps)


def test_custom_grid_is_kept():
    assert custom_grid([0, 1, 5, 10], 10).tolist() == [0, 1, 5, 10]


@pytest.mark.parametrize(
    "bad", [[1, 10], [0, 9], [0, 5, 5, 10], [0, 7, 5, 10], [0.0, 10.0], [], [0], [0, 11], [[0, 10]]], ids=str
)
def test_custom_grid_that_is_no_grid_is_refused(bad):
    with pytest.raises(LingshuError, match="start at 0, rise strictly and end at the number of genes"):
        custom_grid(bad, 10)
