"""Counts that are none, odd matrices and odd labels: AnnData in memory, h5ad in memory, h5ad streamed."""

# ruff: noqa: E501 - a case is one line
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from malformed.catalogue import Collector
from malformed.examples import cells, tiny
from malformed.harness import ACCEPTED, REFUSED

CASES = Collector()
TRAIN = ["train", "bad.h5ad", "--out", "run", *tiny()]
WITH_PERTURBATIONS = [*TRAIN, "--perturbation-key", "perturbation", "--control", "control"]
PREPARE = ["prepare", "bad.h5ad", "--out", "store"]
Change = Callable[[ad.AnnData], ad.AnnData | None]


def dense(change: Callable[[np.ndarray], np.ndarray | None], dtype: type = np.float32) -> Change:
    """A change of the counts as a dense matrix."""

    def apply(adata: ad.AnnData) -> None:
        counts = adata.X.toarray().astype(dtype)
        changed = change(counts)
        adata.X = sparse.csr_matrix(counts if changed is None else changed)

    return apply


def put(value: float, dtype: type = np.float32) -> Change:
    """One value of the matrix is something else."""

    def apply(counts: np.ndarray) -> None:
        counts[3, 5] = value

    return dense(apply, dtype)


def obs(name: str, values: Callable[[int], object]) -> Change:
    """A column of obs."""

    def apply(adata: ad.AnnData) -> None:
        adata.obs[name] = values(adata.n_obs)

    return apply


def x(matrix: Callable[[ad.AnnData], object]) -> Change:
    """Another X."""

    def apply(adata: ad.AnnData) -> ad.AnnData:
        return ad.AnnData(matrix(adata), obs=adata.obs, var=adata.var)

    return apply


def names(axis: str, change: Callable[[list[str]], list[str]]) -> Change:
    """Other names of cells or genes."""

    def apply(adata: ad.AnnData) -> None:
        setattr(adata, axis, change(list(getattr(adata, axis))))

    return apply


def _unsorted(adata: ad.AnnData) -> sparse.csr_matrix:
    m = adata.X.copy()
    for i in range(m.shape[0]):
        here = slice(m.indptr[i], m.indptr[i + 1])
        m.indices[here], m.data[here] = m.indices[here][::-1].copy(), m.data[here][::-1].copy()
    m.has_sorted_indices = False
    return m


def _duplicates(adata: ad.AnnData, value: float = 1.0) -> sparse.csr_matrix:
    m = adata.X.copy()
    m.indices[1], m.data[:2] = m.indices[0], value
    m.has_canonical_format = False
    return m


def _explicit_zeros(adata: ad.AnnData) -> sparse.csr_matrix:
    m = adata.X.copy()
    m.data[:5] = 0
    return m


def _no_labels(adata: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(adata.X, var=adata.var, obs=pd.DataFrame(index=adata.obs_names))


def _mixed(n: int) -> pd.Categorical:
    return pd.Categorical(["1", 1, 2.5, True][i % 4] for i in range(n))


LABELS = {  # as cell types; each is well formed, if odd
    "labels right to left": ["خلايا", "תאים"],
    "labels of emoji": ["🧬", "🦠"],
    "labels with newlines": ["B\ncells", "T\r\ncells"],
    "labels with tabs and commas": ["B\tcells,1", "T;\"cells'"],
    "labels with terminal escapes": ["\x1b[31mB\x1b[0m", "\x07T"],
    "labels that are markup": ["[bold]B[/bold]", "[/]"],
    "labels that are HTML": ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>"],
    "labels that are paths": ["../../B", "/etc/passwd"],
    "labels with equality signs": ["a=b", "=c="],
    "labels of 100,000 characters": ["B" * 100_000, "T" * 100_000],
    "one label in two Unicode forms": ["é", "e\u0301"],
    "labels that differ in spaces": ["B", "B "],
    "labels that are numbers": ["1", "2"],
    "labels that are words for missing": ["nan", "None"],
    "labels with surrogate-free astral and zero-width characters": ["B\u200b", "\U0001f9ec\u202e"],
}

CHANGES: list[tuple[str, str, Change, str]] = [
    # values
    ("NaN", REFUSED, put(np.nan), "NaN"),
    ("infinity", REFUSED, put(np.inf), "infinite"),
    ("minus infinity", REFUSED, put(-np.inf), "infinite"),
    ("a negative count", REFUSED, put(-1), "negative"),
    ("a fraction", REFUSED, put(0.5), "integers"),
    ("log-normalised values", REFUSED, dense(np.log1p), "log-normalised"),
    ("values scaled to 10,000", REFUSED, dense(lambda m: m / m.sum(1, keepdims=True) * 1e4), "normalised"),
    ("scaled values", REFUSED, dense(lambda m: (m - m.mean(0)) / (m.std(0) + 1)), "scaled"),
    ("a count beyond int32", REFUSED, put(2.0**31, np.float64), "at most"),
    ("a count beyond int64", REFUSED, put(1e300, np.float64), "at most"),
    ("a count of 2^64 - 1 as uint64", REFUSED, put(2**64 - 1, np.uint64), "at most"),
    ("the largest count allowed", ACCEPTED, put(2**31 - 1, np.float64), ""),
    ("the smallest float above a whole number", REFUSED, put(np.nextafter(3.0, 4.0), np.float64), "integers"),
    ("only zeros", REFUSED, dense(np.zeros_like), ""),
    ("cells without counts", ACCEPTED, dense(lambda m: m * (np.arange(len(m)) % 5 > 0)[:, None]), ""),
    ("all cells alike", ACCEPTED, dense(lambda m: np.ones_like(m)), ""),
    # types of numbers
    ("int8 counts", ACCEPTED, dense(lambda m: np.minimum(m, 100).astype(np.int8)), ""),
    ("uint16 counts", ACCEPTED, dense(lambda m: m.astype(np.uint16)), ""),
    ("uint64 counts", ACCEPTED, dense(lambda m: m.astype(np.uint64)), ""),
    ("int64 counts", ACCEPTED, dense(lambda m: m.astype(np.int64)), ""),
    ("float64 counts", ACCEPTED, dense(lambda m: m.astype(np.float64)), ""),
    ("float16 counts", ACCEPTED, x(lambda a: a.X.toarray().astype(np.float16)), ""),
    ("boolean counts", ACCEPTED, x(lambda a: a.X.toarray() > 0), ""),
    ("complex counts", REFUSED, x(lambda a: a.X.toarray().astype(np.complex64)), "numbers"),
    ("text counts", REFUSED, x(lambda a: a.X.toarray().astype(int).astype(str).astype(object)), "numbers"),
    # storage
    ("a dense matrix", ACCEPTED, x(lambda a: a.X.toarray()), ""),
    ("a dense matrix in Fortran order", ACCEPTED, x(lambda a: np.asfortranarray(a.X.toarray())), ""),
    ("a CSC matrix", ACCEPTED, x(lambda a: a.X.tocsc()), ""),
    ("a csr_array", ACCEPTED, x(lambda a: sparse.csr_array(a.X)), ""),
    ("unsorted indices", ACCEPTED, x(_unsorted), ""),
    ("duplicated indices", ACCEPTED, x(_duplicates), ""),
    ("duplicated indices that add up beyond int32", REFUSED, x(lambda a: _duplicates(a, 2.0**30)), "at most"),
    ("stored zeros", ACCEPTED, x(_explicit_zeros), ""),
    # shapes
    ("no cells", REFUSED, lambda a: a[:0].copy(), "no cells"),
    ("no genes", REFUSED, lambda a: a[:, :0].copy(), "no genes"),
    ("one cell", REFUSED, lambda a: a[:1].copy(), ""),
    ("one gene", REFUSED, lambda a: a[:, :1].copy(), "genes"),
    ("no X", REFUSED, lambda a: ad.AnnData(obs=a.obs, var=a.var), "no X"),
    ("a layer with another number of genes in raw", ACCEPTED,
     lambda a: (setattr(a, "raw", a[:, :10].copy()), a)[1], ""),
    # names
    ("duplicated gene names", REFUSED, names("var_names", lambda n: [n[0], n[0], *n[2:]]), "unique"),
    ("duplicated cell names", REFUSED, names("obs_names", lambda n: [n[0], n[0], *n[2:]]), "unique"),
    ("gene names with newlines, escapes and markup", ACCEPTED,
     names("var_names", lambda n: ["A\nB", "\x1b[1mC", "[bold]D", "<b>E</b>", *n[4:]]), ""),
    ("an empty gene name", REFUSED, names("var_names", lambda n: ["", *n[1:]]), "name"),
    ("gene names that differ in capitals", ACCEPTED, names("var_names", lambda n: ["gene1", *n[1:]]), ""),
    ("a gene name of 100,000 characters, twice", REFUSED,
     names("var_names", lambda n: ["G" * 100_000, "G" * 100_000, *n[2:]]), "unique"),
    # labels
    ("no obs columns", ACCEPTED, _no_labels, ""),
    ("a missing label", REFUSED, obs("perturbation", lambda n: [None, *["control", "GENE1"] * (n // 2)][:n]), "label"),
    ("empty labels", REFUSED, obs("perturbation", lambda n: ["", "control"] * (n // 2)), ""),
    ("labels of spaces", REFUSED, obs("perturbation", lambda n: [" ", "control"] * (n // 2)), ""),
    ("integer labels", ACCEPTED, obs("cell_type", lambda n: np.arange(n) % 2), ""),
    ("boolean labels", ACCEPTED, obs("cell_type", lambda n: np.arange(n) % 2 == 0), ""),
    ("float labels", ACCEPTED, obs("cell_type", lambda n: np.arange(n) % 2 + 0.5), ""),
    ("NaN among float labels", ACCEPTED, obs("cell_type", lambda n: np.where(np.arange(n) % 2, np.nan, 1.0)), ""),
    ("one label of each cell", ACCEPTED, obs("cell_type", lambda n: [f"type {i}" for i in range(n)]), ""),
    ("unused categories", ACCEPTED,
     obs("cell_type", lambda n: pd.Categorical(["B"] * n, categories=["A", "B", "C"])), ""),
    ("100,000 unused categories", ACCEPTED,
     obs("cell_type", lambda n: pd.Categorical(["0"] * n, categories=[str(i) for i in range(100_000)])), ""),
    ("times as labels", ACCEPTED, obs("cell_type", lambda n: pd.Categorical(pd.date_range("2026", periods=n).astype(str))), ""),
    ("drugs with parentheses and blanks", ACCEPTED,
     obs("perturbation", lambda n: ["control", "(−)-JQ1 (50 nM)", "α-TNF, [3H]", "a (b + c)"] * (n // 4)), ""),
    ("drugs that end in the separator of combinations", REFUSED,
     obs("perturbation", lambda n: ["control", "(+)-JQ1", "TNF+ ", "a (b) + c"] * (n // 4)), ""),
    ("a control label that is absent", REFUSED, obs("perturbation", lambda n: ["DMSO", "GENE1"] * (n // 2)), "control"),
    ("only control cells", REFUSED, obs("perturbation", lambda n: ["control"] * n), ""),
    *((what, ACCEPTED, obs("cell_type", lambda n, two=two: [two[i % 2] for i in range(n)]), "")
      for what, two in LABELS.items()),
]  # fmt: skip

NEEDS_PERTURBATIONS = {
    "a missing label", "empty labels", "labels of spaces", "drugs with parentheses and blanks",
    "drugs that end in the separator of combinations",
    "a control label that is absent", "only control cells",
}  # fmt: skip
STREAMED = {  # what the streaming reader thinks of otherwise: labels are not asked for, one cell makes a store
    "only zeros": ACCEPTED, "one cell": ACCEPTED, "a missing label": None, "empty labels": None,
    "labels of spaces": None, "one gene": ACCEPTED,
    "drugs with parentheses and blanks": None, "drugs that end in the separator of combinations": None, "a control label that is absent": None, "only control cells": None,
}  # fmt: skip


def _written(change: Change) -> None:
    adata = cells()
    changed = change(adata)
    (adata if changed is None else changed).write_h5ad("bad.h5ad")


def _add(what: str, expected: str, change: Change, says: str) -> None:
    command = WITH_PERTURBATIONS if what in NEEDS_PERTURBATIONS else TRAIN

    @CASES("h5ad", what, expected, says)
    def in_memory(examples: Path) -> list[str]:
        _written(change)
        return command

    streamed = STREAMED.get(what, expected)
    if streamed is None:
        return

    @CASES("h5ad, streamed", what, streamed, says if streamed == expected else "")
    def streaming(examples: Path) -> list[str]:
        _written(change)
        return PREPARE


for _case in CHANGES:
    _add(*_case)


# --- AnnData in memory -----------------------------------------------------------------------------------------------


def _in_python(change: Callable[[ad.AnnData], object], **settings: object) -> Callable[[Path], Callable[[], object]]:
    """Train on an object in memory, in Python; settings as of ``LingshuCell.train``."""

    def make(examples: Path) -> Callable[[], object]:
        from lingshu_cell import LingshuCell
        from malformed.examples import TINY

        adata = cells()
        changed = change(adata)
        data = adata if changed is None else changed
        return lambda: LingshuCell.train(data, out="run", settings=TINY, **settings)

    return make


def _read_only(adata: ad.AnnData) -> None:
    for array in (adata.X.data, adata.X.indices, adata.X.indptr):
        array.flags.writeable = False


def _set_x(matrix: Callable[[ad.AnnData], object]) -> Change:
    """Put a matrix behind AnnData's back, as a careless user would."""

    def apply(adata: ad.AnnData) -> None:
        adata._X = matrix(adata)

    return apply


def _broken(**parts: object) -> Change:
    """CSR arrays that do not fit, which scipy does not look at when they are assigned."""

    def apply(adata: ad.AnnData) -> None:
        for name, change in parts.items():
            setattr(adata.X, name, change(getattr(adata.X, name).copy()))

    return apply


def _first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array[0] = value
        return array

    return apply


def _backed(adata: ad.AnnData) -> ad.AnnData:
    adata.write_h5ad("backed.h5ad")
    return ad.read_h5ad("backed.h5ad", backed="r")


for _what, _expected, _change, _says in (
    ("a view", ACCEPTED, lambda a: a[::2, ::-1], ""),
    ("a view of a view", ACCEPTED, lambda a: a[:100][np.arange(100) % 3 > 0], ""),
    ("arrays that may not be written", ACCEPTED, _read_only, ""),
    ("a backed object", ACCEPTED, _backed, ""),
    ("a masked matrix", REFUSED, _set_x(lambda a: np.ma.masked_equal(a.X.toarray(), 0)), "masked"),
    ("a matrix of numpy.matrix", ACCEPTED, _set_x(lambda a: np.asmatrix(a.X.toarray())), ""),
    ("COO storage", ACCEPTED, _set_x(lambda a: a.X.tocoo()), ""),
    ("LIL storage", ACCEPTED, _set_x(lambda a: a.X.tolil()), ""),
    ("a matrix of Python objects", REFUSED, _set_x(lambda a: a.X.toarray().astype(object)), "numbers"),
    ("a matrix of another shape", REFUSED, _set_x(lambda a: a.X[:50]), "shape"),
    ("a matrix of three dimensions", REFUSED, _set_x(lambda a: a.X.toarray()[None]), ""),
    ("a list as matrix", REFUSED, _set_x(lambda a: a.X.toarray().tolist()), ""),
    ("a gene index out of range", REFUSED, _broken(indices=_first(10_000)), ""),
    ("a negative gene index", REFUSED, _broken(indices=_first(-1)), ""),
    ("row pointers that fall", REFUSED, _broken(indptr=lambda p: p[::-1].copy()), ""),
    ("row pointers that do not start at 0", REFUSED, _broken(indptr=_first(3)), ""),
    ("too few row pointers", REFUSED, _broken(indptr=lambda p: p[:-1].copy()), ""),
    ("fewer values than indices", REFUSED, _broken(data=lambda d: d[:-5].copy()), ""),
    ("a pandas table", REFUSED, lambda a: a.to_df(), ""),
    ("a bare matrix", REFUSED, lambda a: a.X, "AnnData"),
    ("nothing", REFUSED, lambda a: [None], "AnnData"),
    ("an empty list of data sets", REFUSED, lambda a: [], ""),
    ("a number in place of a path", REFUSED, lambda a: [3], "AnnData"),
    ("bytes in place of a path", REFUSED, lambda a: [b"cells.h5ad"], "AnnData"),
    ("the same object twice", ACCEPTED, lambda a: [a, a], ""),
    ("data sets that share no gene", REFUSED,
     lambda a: [a, ad.AnnData(a.X, obs=a.obs, var=pd.DataFrame(index=[f"other{i}" for i in range(a.n_vars)]))], ""),
):  # fmt: skip
    CASES("AnnData", _what, _expected, _says)(_in_python(_change))

for _what, _expected, _settings, _says in (
    ("a setting that does not exist", REFUSED, {"settings": {"training.no": 1}}, "known"),
    ("settings that are no mapping", REFUSED, {"settings": ["training.steps"]}, ""),
    ("condition keys that are numbers", REFUSED, {"condition_keys": [3]}, ""),
    ("a preset that is a number", REFUSED, {"preset": 3}, "preset"),
):  # fmt: skip

    def _with(settings: dict[str, object]) -> Callable[[Path], Callable[[], object]]:
        def make(examples: Path) -> Callable[[], object]:
            from lingshu_cell import LingshuCell

            adata = cells()
            return lambda: LingshuCell.train(adata, out="run", **settings)

        return make

    CASES("Python interface", _what, _expected, _says)(_with(_settings))

for _what, _wrong, _says in (
    ("a negative number of cells", {"n_cells": -1}, "cells"),
    ("a fraction of a cell", {"n_cells": 1.5}, "cells"),
    ("no number of cells", {"n_cells": "many"}, "cells"),
    ("a seed that is text", {"seed": "x"}, "seed"),
    ("a seed that is a fraction", {"seed": 0.5}, "seed"),
    ("a condition that is no mapping", {"condition": "B"}, "condition"),
    ("a condition value that is a list", {"condition": {"cell_type": ["B"]}}, ""),
    ("a dose that is NaN", {"dose": float("nan")}, "dose"),
    ("a negative dose", {"dose": -1}, "dose"),
    ("a depth of words", {"depth": "deep"}, "depth"),
    ("steps of a fraction", {"steps": 2.5}, "steps"),
    ("a clamp of NaN", {"clamp": {"GENE1": float("nan")}}, "count"),
    ("a clamp of text", {"clamp": {"GENE1": "x"}}, "count"),
    ("a clamp beyond int32", {"clamp": {"GENE1": 2**31}}, "count"),
    ("a clamp that is a list", {"clamp": ["GENE1"]}, ""),
    ("a tilt of infinity", {"tilt": {"GENE1": float("inf")}}, "factor"),
    ("a tilt of text", {"tilt": {"GENE1": "x"}}, "factor"),
    ("guidance of NaN", {"guidance_scale": float("nan")}, "guidance"),
    ("guidance of text", {"guidance_scale": "strong"}, "guidance"),
    ("a minibatch of 0", {"minibatch_size": 0}, "minibatch"),
    ("a minibatch of a fraction", {"minibatch_size": 1.5}, "minibatch"),
    ("a maximal KL of NaN", {"steps": "auto", "max_kl": float("nan")}, ""),
    ("a schedule that is a number", {"schedule": 3}, "schedule"),
):  # fmt: skip

    def _generating(wrong: dict[str, object]) -> Callable[[Path], Callable[[], object]]:
        def make(examples: Path) -> Callable[[], object]:
            from lingshu_cell import LingshuCell

            model = LingshuCell.load(examples / "run")
            return lambda: model.generate(**{"n_cells": 3, **wrong})

        return make

    CASES("Python interface", _what, REFUSED, _says)(_generating(_wrong))


# --- h5ad files that no AnnData would write ---------------------------------------------------------------------------


def _edited(edit: Callable[[h5py.File], None], command: list[str]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        adata = cells()
        adata.layers["counts"] = adata.X.copy()
        adata.write_h5ad("bad.h5ad")
        with h5py.File("bad.h5ad", "r+") as file:
            edit(file)
        return command

    return make


def _replace(file: h5py.File, name: str, values: object, **how: object) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=values, **how)
    file[name].attrs.update(attributes)


def _huge(name: str, shape: tuple[int, ...]) -> Callable[[h5py.File], None]:
    """A dataset that announces far more than is stored: chunks that were never written."""

    def edit(file: h5py.File) -> None:
        attributes, dtype = dict(file[name].attrs), getattr(file[name], "dtype", np.dtype(np.float32))
        del file[name]
        made = file.create_dataset(name, shape, dtype, chunks=tuple(min(n, 1000) for n in shape), compression="gzip")
        made.attrs.update({k: v for k, v in attributes.items() if k not in ("encoding-type", "shape")})
        made.attrs.update({"encoding-type": attributes.get("encoding-type", "array"), "encoding-version": "0.2.0"})

    return edit


def _attribute(place: str, name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file[place].attrs.__setitem__(name, value)


def _link_outside(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink("/etc/hostname", "/X")


def _stored_outside(file: h5py.File) -> None:
    """Values that lie in another file of the machine."""
    Path("secret.txt").write_bytes(b"\x01\x00\x00\x00" * 4800)
    attributes = dict(file["X"].attrs)
    del file["X"]
    place = [(str(Path("secret.txt").resolve()), 0, 4 * 4800)]
    file.create_dataset("X", (120, 40), np.int32, external=place)
    file["X"].attrs.update({**attributes, "encoding-type": "array", "encoding-version": "0.2.0"})
    del file["X"].attrs["shape"]


def _loop(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.SoftLink("/X")


FILE_EDITS: list[tuple[str, str, Callable[[h5py.File], None], str]] = [
    ("no obs", REFUSED, lambda f: f.__delitem__("obs"), "AnnData"),
    ("no var", REFUSED, lambda f: f.__delitem__("var"), "AnnData"),
    ("obs that is a dataset", REFUSED, lambda f: _replace(f, "obs", np.zeros(3)), ""),
    ("var that is text", REFUSED, lambda f: _replace(f, "var", "genes"), ""),
    ("obs without an index", REFUSED, lambda f: f["obs"].__delitem__("_index"), ""),
    ("obs whose index column does not exist", REFUSED, _attribute("obs", "_index", "nowhere"), ""),
    ("obs whose column order names a stranger", REFUSED, _attribute("obs", "column-order", ["nowhere"]), ""),
    ("obs columns of other lengths", REFUSED, lambda f: _replace(f, "obs/dose", np.ones(7)), ""),
    ("category codes beyond the categories", REFUSED,
     lambda f: _replace(f, "obs/cell_type/codes", np.full(120, 100, np.int8)), ""),
    ("category codes below -1", REFUSED, lambda f: _replace(f, "obs/cell_type/codes", np.full(120, -9, np.int8)), ""),
    ("duplicated categories", REFUSED, lambda f: _replace(f, "obs/cell_type/categories", [b"B", b"B"]), ""),
    ("an encoding that nobody knows", REFUSED, _attribute("X", "encoding-type", "quantum_matrix"), ""),
    ("an encoding of a later version", REFUSED, _attribute("X", "encoding-version", "99.0"), ""),
    ("an encoding that is a number", REFUSED, _attribute("X", "encoding-type", 3), ""),
    ("a file encoding that nobody knows", ACCEPTED, _attribute("/", "encoding-version", "99.0"), ""),
    ("a shape of three numbers", REFUSED, _attribute("X", "shape", [120, 40, 1]), ""),
    ("a shape that is too large", REFUSED, _attribute("X", "shape", [120, 4000]), ""),
    ("a shape of 10^15 cells", REFUSED, _attribute("X", "shape", [10**15, 40]), ""),
    ("a negative shape", REFUSED, _attribute("X", "shape", [-120, 40]), ""),
    ("a shape of text", REFUSED, _attribute("X", "shape", "big"), ""),
    ("no shape", REFUSED, lambda f: f["X"].attrs.__delitem__("shape"), ""),
    ("no row pointers", REFUSED, lambda f: f["X"].__delitem__("indptr"), ""),
    ("no values", REFUSED, lambda f: f["X"].__delitem__("data"), ""),
    ("row pointers of floats", REFUSED, lambda f: _replace(f, "X/indptr", np.linspace(0, 9, 121)), ""),
    ("row pointers beyond the values", REFUSED, lambda f: _replace(f, "X/indptr", np.arange(121) * 10**6), ""),
    ("row pointers that fall", REFUSED, lambda f: _replace(f, "X/indptr", f["X/indptr"][:][::-1]), ""),
    ("negative row pointers", REFUSED, lambda f: _replace(f, "X/indptr", f["X/indptr"][:] - 5), ""),
    ("row pointers that wrap around", REFUSED,
     lambda f: _replace(f, "X/indptr", np.array([0, *[2**63] * 119, 4], np.uint64)), ""),
    ("gene indices out of range", REFUSED,
     lambda f: _replace(f, "X/indices", np.full(f["X/indices"].shape, 40, np.int32)), ""),
    ("negative gene indices", REFUSED,
     lambda f: _replace(f, "X/indices", np.full(f["X/indices"].shape, -1, np.int32)), ""),
    ("gene indices of floats", REFUSED, lambda f: _replace(f, "X/indices", f["X/indices"][:] + 0.5), ""),
    ("fewer values than indices", REFUSED, lambda f: _replace(f, "X/data", f["X/data"][:-3]), ""),
    ("values of text", REFUSED, lambda f: _replace(f, "X/data", [b"1"] * len(f["X/data"])), ""),
    ("values of two dimensions", REFUSED, lambda f: _replace(f, "X/data", f["X/data"][:][:, None]), ""),
    ("values of a compound type", REFUSED,
     lambda f: _replace(f, "X/data", np.zeros(len(f["X/data"]), [("a", "i4"), ("b", "f4")])), ""),
    ("a dense matrix of 10^12 values that were never stored", REFUSED, _huge("X", (10**6, 10**6)), ""),
    ("10^12 values that were never stored", REFUSED, _huge("X/data", (10**12,)), ""),
    ("10^12 gene indices that were never stored", REFUSED, _huge("X/indices", (10**12,)), ""),
    ("10^11 row pointers that were never stored", REFUSED, _huge("X/indptr", (10**11,)), ""),
    ("10^10 cell names that were never stored", REFUSED, _huge("obs/_index", (10**10,)), ""),
    ("10^10 doses that were never stored", REFUSED, _huge("obs/dose", (10**10,)), ""),
    ("a link to another file", REFUSED, _link_outside, ""),
    ("values stored in another file", REFUSED, _stored_outside, ""),
    ("a link to itself", REFUSED, _loop, ""),
    ("X that is a scalar", REFUSED, lambda f: _replace(f, "X", 3.0), ""),
    ("gene names of numbers", REFUSED, lambda f: _replace(f, "var/_index", np.arange(40)), ""),
    ("gene names that are no UTF-8", REFUSED, lambda f: _replace(f, "var/_index", [b"\xff\xfe" + b"%d" % i for i in range(40)]), ""),
    ("cell names with zero bytes", REFUSED,
     lambda f: _replace(f, "obs/_index", np.array([b"a\x00%d" % i for i in range(120)])), ""),
    ("uns that is a dataset", ACCEPTED, lambda f: _replace(f, "uns", 3), ""),
    ("a species in uns that is broken", ACCEPTED,
     lambda f: f["uns"].create_dataset("species", data=3).attrs.update({"encoding-type": "x"}), ""),
    ("layers that are a dataset", REFUSED, lambda f: _replace(f, "layers", 3), ""),
    ("no encoding of the file, as before anndata 0.7", ACCEPTED, lambda f: f.attrs.clear(), ""),
]  # fmt: skip
for _what, _expected, _edit, _says in FILE_EDITS:
    CASES("h5ad", _what, _expected, _says)(_edited(_edit, TRAIN))
    CASES("h5ad, streamed", _what, _expected, _says)(_edited(_edit, PREPARE))

for _what, _layer, _expected, _says in (
    ("a layer that does not exist", "nothing", REFUSED, "layer"),
    ("an empty layer name", "", REFUSED, "layer"),
    ("a layer name that is a path", "../X", REFUSED, "layer"),
    ("a layer name with markup", "[red]", REFUSED, "layer"),
    ("raw where there is none", "raw", REFUSED, "layer"),
):
    CASES("h5ad", _what, _expected, _says)(_edited(lambda f: None, [*TRAIN, "--set", f'data.layer="{_layer}"']))
    CASES("h5ad, streamed", _what, _expected, _says)(_edited(lambda f: None, [*PREPARE, "--layer", _layer]))
