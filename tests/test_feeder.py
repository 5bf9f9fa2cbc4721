"""Cells on their way to a device: drawn ahead or not they are the same, and non-zeros are spread out as they were."""

import numpy as np
import pytest
import torch
from conftest import real_cells
from scipy import sparse

from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.training_set import CellRows, TrainingSet, assemble
from lingshu_cell.engine.feeder import Feeder, spread, tokens_on
from lingshu_cell.errors import LingshuError
from lingshu_cell.tokens import MASK_TOKEN


@pytest.fixture(scope="module")
def cells() -> TrainingSet:
    """Cells of two data sets of which the second lacks genes of the first."""
    both = real_cells(60, 120)
    one, other = both[:30].copy(), both[30:, 20:].copy()
    return assemble([read_counts(one), read_counts(other)], min_cells_per_gene=1, min_coverage=0.1)


def test_drawn_ahead_they_are_the_same_cells_also_after_a_jump(cells):
    draw = cells.draws(8, 0, 0.0)
    ahead, plain = Feeder(draw, ahead=True), Feeder(draw, ahead=False)
    for step in (0, 1, 2, 7, 8, 3):
        np.testing.assert_array_equal(ahead.rows(step).tokens_BG, plain.rows(step).tokens_BG)


def test_what_drawing_ahead_raised_is_raised_in_its_own_step(cells):
    def draw(step: int) -> CellRows:
        if step == 2:
            raise LingshuError("A store must be whole", "shard 1 is damaged", "Prepare it again")
        return cells.rows(cells.train[:2])

    feeder = Feeder(draw, ahead=True)
    assert feeder.rows(0).tokens.shape[0] == feeder.rows(1).tokens.shape[0] == 2
    with pytest.raises(LingshuError, match="shard 1 is damaged"):
        feeder.rows(2)


def test_spread_out_on_a_device_they_are_the_tokens_of_the_cells(cells):
    rows = cells.rows(np.arange(len(cells.data_set)))
    expected = torch.from_numpy(rows.tokens_BG)
    assert (expected == MASK_TOKEN).any() and (expected[:30] != MASK_TOKEN).all()
    for given in (spread(rows, torch.device("cpu")), tokens_on(rows, torch.device("cpu"))):
        assert given.dtype == torch.int16
        torch.testing.assert_close(given, expected)
    nothing = CellRows(np.arange(3), sparse.csr_matrix((3, 5), dtype=np.int16), None, np.zeros((3, 0)), None, None)
    assert spread(nothing, torch.device("cpu")).tolist() == [[0] * 5] * 3
