"""Shuffled minibatches out of a store, each a function of the seed and the step, for any number of processes.

The cells of an epoch come in blocks of neighbours, whose order is drawn anew; a window of such blocks is read at once,
shuffled, and cut into minibatches. The store itself was shuffled when made, so neighbours have nothing in common.

Shapes: B cells of a minibatch on one process, G genes, C condition keys.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from lingshu_cell.data.positions import pieces, position_dtype, share_of
from lingshu_cell.data.store import Store
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.tokens import MASK_TOKEN

BLOCK_CELLS = 64
WINDOW_CELLS = 4096
_PIECE = 1 << 17


@dataclass(frozen=True, eq=False)
class Minibatch:
    """What one process gets in one step.

    Attributes
    ----------
    step
        The step, 0, 1, …
    cells
        Positions in the store, int64, B.
    tokens
        Expression tokens, CSR int16, B × G; zeros are not stored.
    conditions
        Condition indices, int64, B × C; 0 = unknown.
    data_set
        Index of the data set, int64, B.
    library
        UMI of the genes delivered, int64, B; None where not asked for.
    """

    step: int
    cells: np.ndarray
    tokens: sparse.csr_matrix
    conditions: np.ndarray
    data_set: np.ndarray
    library: np.ndarray | None

    def dense(self, measured: np.ndarray) -> np.ndarray:
        """Give the tokens as an array, [MASK] where a data set did not measure a gene.

        Parameters
        ----------
        measured
            Boolean, data sets × G.

        Returns
        -------
        np.ndarray
            int16, B × G.
        """
        tokens = self.tokens.toarray()
        if not measured.all():
            tokens[~measured[self.data_set]] = MASK_TOKEN
        return tokens


@dataclass(frozen=True, eq=False)
class Groups:
    """Cells that share labels, and how often each group is drawn.

    Attributes
    ----------
    names
        Labels of each group.
    members
        Positions of its cells in the store, rising, uint32 if they fit.
    weights
        Share of each group among the cells drawn; sum 1.
    """

    names: tuple[tuple[str, ...], ...]
    members: tuple[np.ndarray, ...]
    weights: np.ndarray


def balanced_groups(
    store: Store,
    keys: Sequence[str],
    cells: Sequence[int] | np.ndarray | range | None = None,
    *,
    power: float = 0.0,
    weights: Mapping[str, float] | None = None,
) -> Groups:
    """Group cells by labels so that rare groups are drawn more often.

    Parameters
    ----------
    store
        The store.
    keys
        Labels, e.g. ``["data_set"]`` or ``["data_set", "cell_type"]``; cells without a label form groups of their own.
    cells
        Positions of the cells to draw from; None for all.
    power
        A group of n cells has a weight of n ** power: 0 draws all groups equally often, 1 as often as they occur.
    weights
        Label → factor on the weight of the groups that have it; 0 leaves them out.

    Returns
    -------
    Groups

    Raises
    ------
    LingshuError
        If a key is no label, a weight is given for a label that no cell has, or no group is left.
    """
    places = range(store.n_cells) if cells is None else cells
    n_in_group: dict[int, int] = {}
    for piece in pieces(places):
        for group, n in zip(*np.unique(_codes(store, keys, piece), return_counts=True), strict=True):
            n_in_group[int(group)] = n_in_group.get(int(group), 0) + int(n)
    groups = np.array(sorted(n_in_group), dtype=np.int64)
    members = [np.empty(n_in_group[int(group)], dtype=position_dtype(store.n_cells)) for group in groups]
    filled = np.zeros(len(groups), dtype=np.int64)
    for piece in pieces(places):
        group_of = np.searchsorted(groups, _codes(store, keys, piece))
        order = np.argsort(group_of, kind="stable")
        bounds = np.searchsorted(group_of[order], np.arange(len(groups) + 1))
        for g in np.unique(group_of):
            here = piece[order[bounds[g] : bounds[g + 1]]]
            members[g][filled[g] : filled[g] + len(here)] = here
            filled[g] += len(here)
    names = [_names_of(store, keys, int(group)) for group in groups]
    shares = [len(of) ** power * _factor(name, weights or {}) for of, name in zip(members, names, strict=True)]
    if strange := [label for label in weights or {} if not any(label in name for name in names)]:
        raise LingshuError(
            "Weights are given for labels that cells have",
            f"no cell has {offenders(strange)}",
            f"Labels: {offenders(dict.fromkeys(one for name in names for one in name))}",
        )
    kept = [g for g, share in enumerate(shares) if share > 0]
    if not kept:
        raise LingshuError("Some group must have a weight above 0", f"none of {len(shares)} has", "Raise a weight")
    total = np.array([shares[g] for g in kept])
    return Groups(tuple(names[g] for g in kept), tuple(members[g] for g in kept), total / total.sum())


class StoreLoader:
    """Minibatches of a store without end, in an order that depends on the seed alone.

    Step ``s`` is made of the cells ``s * minibatch_size`` and following of one sequence, shared out among processes:
    with another number of processes the steps hold the same cells. Without ``groups`` the sequence is one epoch after
    the other, each with every cell exactly once.

    Parameters
    ----------
    store
        The store.
    minibatch_size
        Cells of a step over all processes, at least ``world_size``; their shares differ by one cell at most.
    seed
        Seed of the order.
    rank, world_size
        Which of how many processes this is.
    cells
        Positions of the cells to draw from; None for all. A ``range`` takes no memory.
    genes
        Indices of the genes to deliver, rising; None for all.
    condition_keys
        Labels to deliver as conditions.
    groups
        Weights of groups of cells, from :func:`balanced_groups`; they say which cells there are, so ``cells`` is None.
    window_cells, block_cells
        Cells read and shuffled together, and cells that lie together in the store.
    prefetch
        Read the next window in a thread while this one is used.
    library
        Also deliver the sum of each cell's counts.

    Raises
    ------
    LingshuError
        If sizes do not fit, or there are no cells.
    """

    def __init__(
        self,
        store: Store,
        minibatch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        cells: Sequence[int] | np.ndarray | range | None = None,
        genes: np.ndarray | None = None,
        condition_keys: Sequence[str] = (),
        groups: Groups | None = None,
        window_cells: int = WINDOW_CELLS,
        block_cells: int = BLOCK_CELLS,
        prefetch: bool = False,
        library: bool = False,
    ) -> None:
        if not 0 <= rank < world_size <= minibatch_size:
            raise LingshuError(
                "Every process needs cells of the minibatch",
                f"{minibatch_size} cells, process {rank} of {world_size}",
                "Start fewer processes, or choose a larger minibatch",
            )
        if seed < 0 or min(window_cells, block_cells) < 1:
            raise LingshuError("Seed and sizes must not be negative", f"seed {seed}", "Choose e.g. 0")
        members = range(store.n_cells) if cells is None else cells
        if groups is not None and cells is not None:
            raise LingshuError("Cells are given once", "groups and cells", "Pass cells to balanced_groups")
        if groups is None and not len(members):
            raise LingshuError("A loader needs cells", "there are none", "Choose some")
        self.store, self.minibatch_size, self.seed = store, minibatch_size, seed
        self._mine = share_of(minibatch_size, rank, world_size)
        self._with_library = library
        self.step = 0
        self._keys = tuple(condition_keys)
        store.conditions(self._keys)  # refuses unknown ones
        self._window_cells, self._block_cells = window_cells, block_cells
        drawn = (members,) if groups is None else groups.members
        self._streams = tuple(_Stream(one, block_cells, seed, g) for g, one in enumerate(drawn))
        self._shares = None if groups is None else _Shares(groups.weights, window_cells, seed)
        self._n_genes = store.n_genes if genes is None else len(genes)
        self._column_of = columns_of(None if genes is None else np.asarray(genes, dtype=np.int64), store.n_genes)
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "loader") if prefetch else None
        self._coming: dict[tuple[int, int], Future[_Window]] = {}

    @property
    def cells_per_epoch(self) -> int:
        """Number of cells to draw from."""
        return sum(len(stream.members) for stream in self._streams)

    @property
    def state(self) -> dict[str, Any]:
        """Position as JSON values: the next step, and what the order depends on."""
        return {"step": self.step, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the minibatches that follow are those that would have followed then.

        Parameters
        ----------
        state
            What :attr:`state` gave, for any number of processes.

        Raises
        ------
        LingshuError
            If the order depended on something else then.
        """
        now = self._identity()
        if differing := [key for key, value in now.items() if state.get(key) != value]:
            raise LingshuError(
                "A position is of one store and one way to draw",
                f"{offenders(differing)} differ",
                "Use the same store, seed, minibatch size, cells and weights",
            )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[Minibatch]:
        while True:
            minibatch = self.minibatch(self.step)
            self.step += 1
            yield minibatch

    def minibatch(self, step: int) -> Minibatch:
        """Give the minibatch of a step.

        Parameters
        ----------
        step
            0 or more; consecutive steps are quick, others read a window first.

        Returns
        -------
        Minibatch
        """
        at, end = (step * self.minibatch_size + place for place in (self._mine.start, self._mine.stop))
        cells, tokens, library = [], [], []
        while at < end:
            key, start, size = self._place(at)
            window = self._window(key, start, size)
            stop = min(end, start + size)
            a, b = (int(n) for n in np.searchsorted(window.positions, (at, stop)))
            cells.append(window.cells[a:b])
            tokens.append(window.tokens[a:b])
            library.append(None if window.library is None else window.library[a:b])
            at = stop
        found = np.concatenate(cells)
        return Minibatch(
            step=step,
            cells=found,
            tokens=tokens[0] if len(tokens) == 1 else sparse.vstack(tokens, format="csr"),
            conditions=self.store.condition_rows(self._keys, found),
            data_set=self.store.data_set[found].astype(np.int64),
            library=np.concatenate(library) if self._with_library else None,
        )

    def close(self) -> None:
        """Stop reading ahead."""
        if self._worker:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        self._coming.clear()

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self.store.fingerprint,
            "seed": self.seed,
            "minibatch_size": self.minibatch_size,
            "window_cells": self._window_cells,
            "block_cells": self._block_cells,
            "cells": [_told(stream.members) for stream in self._streams],
            "weights": None if self._shares is None else self._shares.weights.tolist(),
        }

    def _place(self, position: int) -> tuple[tuple[int, int], int, int]:
        """Give the window of a position in the sequence: its (epoch, number), first position and size."""
        if self._shares is not None:
            number, start, size = self._shares.window_at(position)
            return (0, number), start, size
        n = len(self._streams[0].members)
        epoch, offset = divmod(position, n)
        number = offset // self._window_cells
        start = number * self._window_cells
        return (epoch, number), epoch * n + start, min(self._window_cells, n - start)

    def _window(self, key: tuple[int, int], start: int, size: int) -> "_Window":
        if key not in self._windows:
            coming = self._coming.pop(key, None)
            while len(self._windows) > 1:  # a minibatch may lie across two
                self._windows.popitem(last=False)
            self._windows[key] = coming.result() if coming else self._load(key, start, size)
            if self._worker:
                next_key, next_start, next_size = self._place(start + size)
                self._coming = {next_key: self._worker.submit(self._load, next_key, next_start, next_size)}
        self._windows.move_to_end(key)
        return self._windows[key]

    def _load(self, key: tuple[int, int], start: int, size: int) -> "_Window":
        """Read what this process needs of a window, in the order in which it is delivered."""
        epoch, number = key
        if self._shares is None:
            offset = number * self._window_cells + epoch * len(self._streams[0].members)
            cells = self._streams[0].take(offset, offset + size)
        else:
            bounds = zip(self._streams, self._shares.before(number), self._shares.before(number + 1), strict=True)
            cells = np.concatenate([stream.take(int(first), int(stop)) for stream, first, stop in bounds])
        cells = cells[_generator(self.seed, 1, epoch, number).permutation(size)]
        positions = np.arange(start, start + size)
        if self._mine.stop - self._mine.start < self.minibatch_size:
            place = positions % self.minibatch_size
            mine = (place >= self._mine.start) & (place < self._mine.stop)
            positions, cells = positions[mine], cells[mine]
        order = np.argsort(cells, kind="stable")
        tokens, library = tokenize(
            self.store.counts(cells[order]), self._column_of, self._n_genes, with_library=self._with_library
        )
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return _Window(positions, cells, tokens[back], None if library is None else library[back])


def columns_of(genes: np.ndarray | None, n_genes: int) -> np.ndarray | None:
    """Give the column of each gene of a store among the genes chosen, -1 for the others; None where all are.

    Raises
    ------
    LingshuError
        If they are not rising indices into the vocabulary.
    """
    if genes is None:
        return None
    if len(genes) and ((np.diff(genes) <= 0).any() or not 0 <= genes[0] <= genes[-1] < n_genes):
        raise LingshuError(
            "Genes are rising indices into the vocabulary", "these are not", "Pass what modelled_genes gives"
        )
    columns = np.full(n_genes, -1, dtype=np.int32)
    columns[genes] = np.arange(len(genes))
    return columns


def tokenize(
    counts: sparse.csr_matrix, column_of: np.ndarray | None, n_genes: int, *, with_library: bool = False
) -> tuple[sparse.csr_matrix, np.ndarray | None]:
    """Tokenize counts and keep the genes asked for, in pieces that fit into the processor's cache.

    Parameters
    ----------
    counts
        Counts of a store, whose arrays are used up.
    column_of
        What :func:`columns_of` gave.
    n_genes
        How many genes are kept.
    with_library
        Whether to add up each cell's counts.

    Returns
    -------
    tuple
        Tokens, CSR int16, and UMI of the genes kept, int64, one per cell.
    """
    values, columns, indptr = np.empty(counts.nnz, dtype=np.int16), counts.indices, counts.indptr
    off_list = [np.empty(0, dtype=np.int64)]
    for i in range(0, counts.nnz, _PIECE):
        piece = slice(i, i + _PIECE)
        values[piece] = encode(counts.data[piece])
        if column_of is not None:
            columns[piece] = column_of[columns[piece]]
            off_list.append(np.flatnonzero(columns[piece] < 0) + i)
    gone = np.concatenate(off_list)
    library = None
    if with_library:
        umi = np.append(0, np.cumsum(counts.data, dtype=np.int64))
        off_umi = np.append(0, np.cumsum(counts.data[gone], dtype=np.int64))
        library = np.diff(umi[indptr] - off_umi[np.searchsorted(gone, indptr)])
    if len(gone):
        values, columns = np.delete(values, gone), np.delete(columns, gone)
        indptr = indptr - np.searchsorted(gone, indptr).astype(indptr.dtype)
    return sparse.csr_matrix((values, columns, indptr), (counts.shape[0], n_genes), copy=False), library


@dataclass(frozen=True, eq=False)
class _Window:
    """Cells of one window that this process delivers, in order of their positions in the sequence."""

    positions: np.ndarray
    cells: np.ndarray
    tokens: sparse.csr_matrix
    library: np.ndarray | None


class _Stream:
    """Epoch after epoch of some cells, in blocks of neighbours."""

    def __init__(self, members: Sequence[int] | np.ndarray | range, block_cells: int, seed: int, number: int) -> None:
        self.members = members if isinstance(members, range) else np.asarray(members)
        self._block, self._seed, self._number = block_cells, seed, number
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def take(self, first: int, stop: int) -> np.ndarray:
        """Give the cells at places ``first`` … ``stop`` − 1 of the stream, int64."""
        n, parts = len(self.members), []
        while first < stop:
            epoch, offset = divmod(first, n)
            size = min(stop - first, n - offset)
            parts.append(self._of_epoch(epoch, offset, size))
            first += size
        places = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        if isinstance(self.members, range):
            return self.members.start + places * self.members.step
        return self.members[places].astype(np.int64)

    def _of_epoch(self, epoch: int, offset: int, size: int) -> np.ndarray:
        order, starts = self._order(epoch)
        n, stop = len(self.members), offset + size
        i = int(np.searchsorted(starts, offset, side="right")) - 1
        j = int(np.searchsorted(starts, stop, side="left"))
        firsts = order[i:j] * self._block
        lengths = np.minimum(firsts + self._block, n) - firsts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(firsts, lengths) + within
        skip = offset - int(starts[i])
        return places[skip : skip + size]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Give the blocks of an epoch in order, and where in the epoch each begins."""
        if epoch not in self._orders:
            n = len(self.members)
            order = _generator(self._seed, 0, self._number, epoch).permutation(-(-n // self._block))
            lengths = np.minimum((order + 1) * self._block, n) - order * self._block
            self._orders[epoch] = order, np.cumsum(lengths) - lengths
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]


def _generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *numbers])))


class _Shares:
    """How many cells of each group are in each window: its weight of them, rounded so that over many windows nothing
    is lost, and windows of about the size asked for.
    """

    def __init__(self, weights: np.ndarray, window_cells: int, seed: int) -> None:
        self.weights = weights
        self._window_cells = window_cells
        self._phase = _generator(seed, 2).random(len(weights))  # else all rare groups would be in the same windows

    def before(self, window: int) -> np.ndarray:
        """Say how many cells of each group are in the windows before one, int64."""
        return np.floor(self.weights * (window * self._window_cells) + self._phase).astype(np.int64)

    def window_at(self, position: int) -> tuple[int, int, int]:
        """Give the window of a position in the sequence, its first position and its size."""
        number = position // self._window_cells
        while (start := int(self.before(number).sum())) > position:
            number -= 1
        while (stop := int(self.before(number + 1).sum())) <= position:
            number, start = number + 1, stop
        return number, start, stop - start


def _codes(store: Store, keys: Sequence[str], cells: np.ndarray) -> np.ndarray:
    """Number the combinations of labels, int64."""
    code = np.zeros(len(cells), dtype=np.int64)
    for key in keys:
        code = code * (len(store.categories(key)) + 1) + store.column(key)[cells] + 1
    return code


def _names_of(store: Store, keys: Sequence[str], code: int) -> tuple[str, ...]:
    names = []
    for key in reversed(keys):
        categories = store.categories(key)
        code, one = divmod(code, len(categories) + 1)
        names.append(categories[one - 1] if one else "unknown")
    return tuple(reversed(names))


def _factor(names: tuple[str, ...], weights: Mapping[str, float]) -> float:
    factor = 1.0
    for name in names:
        factor *= weights.get(name, 1.0)
    return factor


def _told(members: np.ndarray | range) -> Any:
    """Say in short which cells these are."""
    if isinstance(members, range):
        return [members.start, members.stop, members.step]
    digest = hashlib.sha256()
    for piece in pieces(members):
        digest.update(piece.astype("<i8").tobytes())
    return digest.hexdigest()
