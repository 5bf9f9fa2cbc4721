"""Counts to count tokens and back: the paper's quantiser, exact below 100, one digit coarser per decade above."""

import numpy as np

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

__all__ = ["MASK_TOKEN", "N_EXPRESSION_TOKENS", "bin_edges", "decode", "encode", "token_midpoints"]

_FIRST_OVERFLOW = 10_000  # the smallest count of the overflow token
_LAST_OVERFLOW = 19_999  # the paper leaves this bin open; we close it after one leading digit, like its neighbours


def _lower_edges() -> np.ndarray:
    exact = np.arange(100)
    tens = np.arange(100, 1_000, 10)
    hundreds = np.arange(1_000, 10_000, 100)
    return np.concatenate([exact, tens, hundreds, [_FIRST_OVERFLOW]]).astype(np.int32)


_LOWER = _lower_edges()
_UPPER = np.append(_LOWER[1:] - 1, np.int32(_LAST_OVERFLOW))
_WIDTH = _UPPER - _LOWER + 1
# A table over 0 … 10,000 is exact where floor(log10 x) in floats is not, and faster than arithmetic per entry.
_TOKEN_OF_COUNT = np.searchsorted(_LOWER, np.arange(_FIRST_OVERFLOW + 1), side="right").astype(np.int16) - np.int16(1)


def encode(counts: np.ndarray) -> np.ndarray:
    r"""Give the token of every count.

    .. math::

        q(x) = x \ (x < 100), \qquad
        q(x) = 100 + 90 (k - 2) + \Big\lfloor \frac{x - 10^k}{10^{k-1}} \Big\rfloor,\ k = \lfloor \log_{10} x \rfloor
        \ (100 \le x \le 9999), \qquad q(x) = 280 \ (x \ge 10^4)

    Parameters
    ----------
    counts
        UMI counts, integer dtype, any shape, 0 or more without upper limit.

    Returns
    -------
    np.ndarray
        Tokens in 0 … 280, int16, of the same shape.

    Raises
    ------
    LingshuError
        If ``counts`` has no integer dtype or holds a negative value.

    References
    ----------
    arXiv 2603.25240, the quantiser q(x) of the input tokens.
    """
    counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise LingshuError("Counts to tokenize must be integers", f"the dtype is {counts.dtype}", "Pass raw UMI counts")
    if counts.size and counts.min() < 0:
        raise LingshuError("Counts must be 0 or more", f"the smallest is {counts.min()}", "Pass raw UMI counts")
    if counts.dtype.itemsize == 1:  # 10,000 does not fit
        counts = counts.astype(np.int16)
    return _TOKEN_OF_COUNT[np.minimum(counts, counts.dtype.type(_FIRST_OVERFLOW))]


def decode(tokens: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Draw the count of every token, uniformly among the integers of its bin.

    The paper does not say how a coarse token becomes a count again; the bin's edge would bias every gene's mean
    downwards, its middle would leave gaps, so the integer is drawn.

    Parameters
    ----------
    tokens
        Expression tokens, integer dtype, any shape, 0 … 280.
    uniform
        Uniform draws in [0, 1), of the shape of ``tokens``; the caller owns the randomness.

    Returns
    -------
    np.ndarray
        UMI counts, int32, 0 … 19,999, of the same shape; ``encode`` gives ``tokens`` back.

    Raises
    ------
    LingshuError
        If a token is [MASK] or outside 0 … 280, or if ``uniform`` has another shape or leaves [0, 1).
    """
    tokens = np.asarray(tokens)
    _check_expression_tokens(tokens)
    uniform = np.asarray(uniform, dtype=np.float64)  # float32 draws times a wide bin could round up into the next one
    if uniform.shape != tokens.shape:
        raise LingshuError(
            "Decoding needs one uniform draw per token",
            f"the tokens have shape {tokens.shape} and the draws {uniform.shape}",
            "Pass draws of the same shape",
        )
    if not ((uniform >= 0.0) & (uniform < 1.0)).all():
        raise LingshuError(
            "Uniform draws must lie in [0, 1)", "some do not", "Pass the output of np.random.Generator.random"
        )
    return _LOWER[tokens] + (uniform * _WIDTH[tokens]).astype(np.int32)


def bin_edges() -> tuple[np.ndarray, np.ndarray]:
    """Give the smallest and the largest count of every expression token.

    The overflow token 280 stands for every count from 10,000 on; when decoding, and here, it is 10,000 … 19,999.

    Returns
    -------
    tuple of np.ndarray
        ``lower`` and ``upper``, both inclusive, int32, shape [281].
    """
    return _LOWER.copy(), _UPPER.copy()


def token_midpoints() -> np.ndarray:
    """Give the expected count of every expression token under :func:`decode`.

    Returns
    -------
    np.ndarray
        (lower + upper) / 2, float64, shape [281].
    """
    return (_LOWER.astype(np.float64) + _UPPER) / 2.0


def _check_expression_tokens(tokens: np.ndarray) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise LingshuError("Tokens must be integers", f"the dtype is {tokens.dtype}", "Pass the output of encode")
    outside = (tokens < 0) | (tokens >= N_EXPRESSION_TOKENS)
    if not outside.any():
        return
    n_masked = int((tokens == MASK_TOKEN).sum())
    if n_masked:
        raise LingshuError(
            "Only expression tokens have a count",
            f"{n_masked} of {tokens.size} tokens are [MASK] ({MASK_TOKEN})",
            "Reveal every gene before decoding",
        )
    raise LingshuError(
        f"Expression tokens lie in 0 … {N_EXPRESSION_TOKENS - 1}",
        f"found {offenders(np.unique(tokens[outside]))}",
        "Pass the output of encode",
    )
