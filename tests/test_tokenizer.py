"""The quantiser is the paper's over its whole range, and comes back inside the bin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lingshu_cell.data.tokenizer import MASK_TOKEN, N_EXPRESSION_TOKENS, bin_edges, decode, encode, token_midpoints
from lingshu_cell.errors import LingshuError

COUNTS = hnp.arrays(np.int64, hnp.array_shapes(max_dims=3, max_side=20), elements=st.integers(0, 10**9))
TOKENS = hnp.arrays(np.int16, st.integers(0, 50), elements=st.integers(0, N_EXPRESSION_TOKENS - 1))


def paper_token(x: int) -> int:
    """The formula of the paper in exact integer arithmetic: k = ⌊log10 x⌋ is one less than the number of digits."""
    if x <= 99:
        return x
    if x > 9999:
        return 280
    k = len(str(x)) - 1
    return 100 + 90 * (k - 2) + (x - 10**k) // 10 ** (k - 1)


def test_encode_is_the_papers_quantiser_from_0_to_20000():
    counts = np.arange(20_001)
    np.testing.assert_array_equal(encode(counts), [paper_token(int(x)) for x in counts])


@given(COUNTS)
def test_encode_is_the_papers_quantiser_for_any_count_and_shape(counts):
    tokens = encode(counts)
    assert tokens.dtype == np.int16
    assert tokens.shape == counts.shape
    np.testing.assert_array_equal(tokens.ravel(), [paper_token(int(x)) for x in counts.ravel()])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_encode_takes_every_integer_dtype_to_its_limit(dtype):
    largest = np.iinfo(dtype).max
    np.testing.assert_array_equal(encode(np.array([0, 7, largest], dtype)), [0, 7, paper_token(int(largest))])


def test_counts_come_back_exactly_below_100_and_inside_their_bin_up_to_20000():
    counts = np.arange(20_000)
    back = decode(encode(counts), np.random.default_rng(0).random(counts.shape))
    np.testing.assert_array_equal(back[:100], counts[:100])
    in_bins = counts[:10_000]
    assert (np.abs(back[:10_000] - in_bins) < np.where(in_bins < 100, 1, np.where(in_bins < 1_000, 10, 100))).all()
    assert ((back[10_000:] >= 10_000) & (back[10_000:] <= 19_999)).all()


@given(TOKENS, st.integers(0, 2**32 - 1))
def test_tokens_come_back_through_any_draw(tokens, seed):
    counts = decode(tokens, np.random.default_rng(seed).random(tokens.shape))
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(encode(counts), tokens)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_extreme_draws_give_the_edges_of_the_bin(dtype):
    lower, upper = bin_edges()
    tokens = np.arange(N_EXPRESSION_TOKENS)
    np.testing.assert_array_equal(decode(tokens, np.zeros(281, dtype)), lower)
    np.testing.assert_array_equal(decode(tokens, np.full(281, np.nextafter(dtype(1), dtype(0)))), upper)


def test_bins_tile_0_to_19999_without_gap_or_overlap():
    lower, upper = bin_edges()
    assert lower[0] == 0 and upper[-1] == 19_999 and len(lower) == len(upper) == N_EXPRESSION_TOKENS == MASK_TOKEN
    np.testing.assert_array_equal(lower[1:], upper[:-1] + 1)
    widths = upper - lower + 1
    np.testing.assert_array_equal(widths, [1] * 100 + [10] * 90 + [100] * 90 + [10_000])


def test_draws_are_uniform_in_the_bin_and_average_to_the_midpoint():
    tokens = np.repeat([100, 190, 280], 200_000)
    counts = decode(tokens, np.random.default_rng(1).random(tokens.shape)).reshape(3, -1)
    np.testing.assert_allclose(counts.mean(axis=1), token_midpoints()[[100, 190, 280]], rtol=0.002)
    seen, times = np.unique(counts[0], return_counts=True)
    np.testing.assert_array_equal(seen, np.arange(100, 110))
    assert abs(times / 20_000 - 1).max() < 0.03
    np.testing.assert_array_equal(token_midpoints()[:100], np.arange(100))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (np.array([1.0]), "must be integers: the dtype is float64"),
        (np.array([True]), "must be integers: the dtype is bool"),
        (np.array([3, -2]), "must be 0 or more: the smallest is -2"),
    ],
)
def test_encode_refuses_what_is_no_count(counts, words):
    with pytest.raises(LingshuError, match=words):
        encode(counts)


@pytest.mark.parametrize(
    ("tokens", "uniform", "words"),
    [
        ([5, 281, 281], [0, 0, 0], r"2 of 3 tokens are \[MASK\] \(281\)\. Reveal every gene"),
        ([5, 300], [0, 0], r"lie in 0 … 280: found 300 \(1\)"),
        ([-1], [0], r"found -1 \(1\)"),
        ([5.0], [0], "Tokens must be integers: the dtype is float64"),
        ([5, 6], [0], r"shape \(2,\) and the draws \(1,\)"),
        ([5], [1.0], r"must lie in \[0, 1\)"),
        ([5], [np.nan], r"must lie in \[0, 1\)"),
    ],
)
def test_decode_refuses_what_it_cannot_turn_into_a_count(tokens, uniform, words):
    with pytest.raises(LingshuError, match=words):
        decode(np.array(tokens), np.array(uniform))
