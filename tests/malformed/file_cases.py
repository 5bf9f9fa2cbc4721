"""Files that are no files, zarr folders, files of 10x, and every command that reads counts."""

# ruff: noqa: E501 - a case is one line
import gzip
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from malformed.catalogue import Collector
from malformed.counts_cases import PREPARE, TRAIN
from malformed.examples import cells
from malformed.harness import ACCEPTED, EITHER, REFUSED

CASES = Collector()
KEYS = ["--perturbation-key", "perturbation", "--control", "control"]


class Executed:
    """A pickle of this leaves a file behind when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


# --- a path that leads to no data -------------------------------------------------------------------------------------


def _cut(examples: Path, share: float) -> None:
    whole = (examples / "cells.h5ad").read_bytes()
    Path("bad.h5ad").write_bytes(whole[: int(len(whole) * share)])


def _no_rights(examples: Path) -> None:
    shutil.copy(examples / "cells.h5ad", "bad.h5ad")
    os.chmod("bad.h5ad", 0)
    if os.geteuid() == 0:  # for root there are no rights
        os.chmod(".", 0o777)
        os.seteuid(65534)


def _socket(examples: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("bad.h5ad")


def _empty_hdf5(examples: Path) -> None:
    h5py.File("bad.h5ad", "w").close()


PATHS: list[tuple[str, Callable[[Path], object]]] = [
    ("nothing there", lambda e: None),
    ("an empty file", lambda e: Path("bad.h5ad").touch()),
    ("a text file", lambda e: Path("bad.h5ad").write_text("no cells")),
    ("an empty folder", lambda e: Path("bad.h5ad").mkdir()),
    ("a named pipe", lambda e: os.mkfifo("bad.h5ad")),
    ("an endless device", lambda e: os.symlink("/dev/zero", "bad.h5ad")),
    ("an empty device", lambda e: os.symlink("/dev/null", "bad.h5ad")),
    ("a socket", _socket),
    ("a link to itself", lambda e: os.symlink("bad.h5ad", "bad.h5ad")),
    ("a link to nothing", lambda e: os.symlink("nowhere", "bad.h5ad")),
    ("a file without the right to read it", _no_rights),
    ("an HDF5 file of nothing", _empty_hdf5),
    ("the first bytes of HDF5 only", lambda e: Path("bad.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 90)),
    ("a pickle", lambda e: Path("bad.h5ad").write_bytes(pickle.dumps(Executed()))),
    ("a gzipped h5ad", lambda e: Path("bad.h5ad").write_bytes(gzip.compress((e / "cells.h5ad").read_bytes()))),
    *((f"the first {share:.0%} of a file", lambda e, share=share: _cut(e, share)) for share in (0.01, 0.3, 0.7, 0.99)),
]  # fmt: skip


def _bad_path(prepare: Callable[[Path], object], command: list[str]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path("cells.h5ad").symlink_to(examples / "cells.h5ad")
        Path("model").symlink_to(examples / "run")
        prepare(examples)
        return command

    return make


for _what, _prepare in PATHS:
    CASES("data path", _what, REFUSED)(_bad_path(_prepare, TRAIN))
    CASES("data path, streamed", _what, REFUSED)(_bad_path(_prepare, PREPARE))

READERS = {
    "genes": ["genes", "bad.h5ad"],
    "split": ["split", "bad.h5ad", "--from-state", "state.toml", "--out", "parts"],
    "evaluate, generated": ["evaluate", "--real", "cells.h5ad", "--generated", "bad.h5ad", "--out", "judged"],
    "evaluate, real": ["evaluate", "--real", "bad.h5ad", "--generated", "cells.h5ad", "--out", "judged"],
    "evaluate responses": ["evaluate", "--real", "cells.h5ad", "--generated", "bad.h5ad", "--out", "judged", *KEYS],
    "de": ["de", "bad.h5ad", *KEYS, "--out", "tables"],
    "baseline": ["baseline", "additive", "--training", "bad.h5ad", "--like", "cells.h5ad", *KEYS, "--out", "p.h5ad"],
    "baseline, labels": ["baseline", "additive", "--training", "cells.h5ad", "--like", "bad.h5ad", *KEYS, "--out", "p.h5ad"],
    "embeddings": ["embeddings", "--from-counts", "bad.h5ad", "--components", "2", "--out", "e.npz"],
    "generate, context": ["generate", "model", "--n", "2", "--context", "bad.h5ad", "--condition", "perturbation=GENE1",
                          "--out", "g.h5ad"],
    "calibrate": ["calibrate", "model", "--data", "bad.h5ad"],
    "schedule": ["schedule", "model", "--data", "bad.h5ad"],
    "export": ["export", "vcc2026", "bad.h5ad", "--genes", "genes.txt", "--out", "s.h5ad", "--n-genes", "0"],
    "export, check": ["export", "vcc2026", "--check", "bad.h5ad", "--genes", "genes.txt", "--n-genes", "0"],
}  # fmt: skip


def _reader(prepare: Callable[[Path], object], command: list[str]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path("genes.txt").write_text("\n".join(f"GENE{g}" for g in range(40)))
        Path("state.toml").write_text('[training]\nd = "train"\n[zeroshot]\n"d.B" = "test"\n')
        return _bad_path(prepare, command)(examples)

    return make


_FOR_EVERY_READER = (
    "nothing there", "a text file", "an empty folder", "a named pipe", "an endless device", "an HDF5 file of nothing",
    "the first 70% of a file",
)  # fmt: skip
for _command, _words in READERS.items():
    for _what, _prepare in PATHS:
        if _what in _FOR_EVERY_READER:
            CASES(f"data path, {_command}", _what, REFUSED)(_reader(_prepare, _words))


def _values(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def prepare(examples: Path) -> None:
        adata = cells()
        adata.X = sparse.csr_matrix(edit(adata.X.toarray()))
        adata.write_h5ad("bad.h5ad")

    return prepare


def _nan(counts: np.ndarray) -> np.ndarray:
    counts[2, 3] = np.nan
    return counts


for _command, _words in READERS.items():
    if _command not in ("genes", "split", "baseline, labels"):  # these read labels or names only
        CASES(f"counts, {_command}", "NaN", REFUSED)(_reader(_values(_nan), _words))
        CASES(f"counts, {_command}", "log-normalised values", REFUSED)(_reader(_values(np.log1p), _words))

for _what, _address in (
    ("a port where nobody listens", "http://127.0.0.1:9/cells.h5ad"),
    ("an unknown kind of address", "gopher://example.org/cells.h5ad"),
    ("a file that is not there", "file:///nowhere/cells.h5ad"),
    ("a device", "file:///dev/zero"),
    ("a broken address", "http://[::1/cells.h5ad"),
    ("no host", "http:///cells.h5ad"),
):
    CASES("URL", _what, REFUSED)(lambda e, a=_address: [TRAIN[0], a, *TRAIN[2:]])
for _what, _name in (
    ("empty", ""), ("of 5,000 characters", "x" * 5000), ("of no UTF-8", os.fsdecode(b"\xff\xfe.h5ad")),
    ("with markup", "[bold]x[bold].h5ad"), ("with a terminal escape", "\x1b[2Jx.h5ad"),
    ("with a newline", "a\nb.h5ad"), ("of a home that is not there", "~nobody_here/x.h5ad"),
):  # fmt: skip
    CASES("file name", _what, REFUSED)(lambda e, n=_name: [TRAIN[0], n, *TRAIN[2:]])
    CASES("file name, streamed", _what, REFUSED)(lambda e, n=_name: [PREPARE[0], n, *PREPARE[2:]])
for _what, _name in (
    ("of no UTF-8", os.fsdecode(b"\xff\xfe.h5ad")), ("with a newline", "a\nb.h5ad"), ("with blanks", " a b .h5ad"),
    ("of emoji", "🧬.h5ad"), ("with markup", "[bold]x[bold].h5ad"), ("with a terminal escape", "\x1b[2Jx.h5ad"),
):  # fmt: skip

    def _named(name: str, command: list[str]) -> Callable[[Path], list[str]]:
        def make(examples: Path) -> list[str]:
            shutil.copy(examples / "cells.h5ad", name)
            return [command[0], name, *command[2:]]

        return make

    CASES("file name", f"{_what}, and whole data", ACCEPTED)(_named(_name, TRAIN))
    CASES("file name, streamed", f"{_what}, and whole data", ACCEPTED)(_named(_name, PREPARE))


# --- zarr -------------------------------------------------------------------------------------------------------------


def _zarr(edit: Callable[[Path], object], command: list[str]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        shutil.copytree(examples / "cells.zarr", "bad.zarr")
        edit(Path("bad.zarr"))
        return ["bad.zarr" if word == "bad.h5ad" else word for word in command]

    return make


def _metadata(place: str, **changes: object) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        (store / ".zmetadata").unlink(missing_ok=True)
        file = store / place / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _attributes(place: str, **changes: object) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        (store / ".zmetadata").unlink(missing_ok=True)
        file = store / place / ".zattrs"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _pickled(store: Path) -> None:
    """Gene names under a codec that runs what it is given."""
    names = store / "var" / "_index"
    shape = json.loads((names / ".zarray").read_text())["shape"]
    _metadata("var/_index", dtype="|O", filters=[{"id": "pickle", "protocol": 5}], compressor=None, chunks=shape)(store)
    for chunk in names.iterdir():
        if not chunk.name.startswith("."):
            chunk.unlink()
    (names / "0").write_bytes(pickle.dumps([Executed()] * shape[0]))


def _chunks(place: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        for chunk in (store / place).iterdir():
            if not chunk.name.startswith("."):
                chunk.write_bytes(change(chunk.read_bytes()))

    return edit


def _text(place: str, text: str) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        (store / ".zmetadata").unlink(missing_ok=True)
        (store / place).write_text(text)

    return edit


for _what, _expected, _edit in (
    ("whole", ACCEPTED, lambda s: None),
    ("no group", REFUSED, lambda s: [(s / ".zgroup").unlink(), (s / ".zmetadata").unlink(missing_ok=True)]),
    ("a group that is no JSON", REFUSED, _text(".zgroup", "{")),
    ("metadata that are no JSON", REFUSED, _text("X/data/.zarray", "{")),
    ("metadata that are a list", REFUSED, _text("X/data/.zarray", "[]")),
    ("deeply nested metadata", REFUSED, _text("X/data/.zarray", "[" * 100_000)),
    ("metadata of another zarr format", REFUSED, _metadata("X/data", zarr_format=9)),
    ("10^12 values", REFUSED, _metadata("X/data", shape=[10**12])),
    ("10^12 values in one chunk", REFUSED, _metadata("X/data", shape=[10**12], chunks=[10**12])),
    ("10^11 row pointers", REFUSED, _metadata("X/indptr", shape=[10**11])),
    ("10^10 cell names", REFUSED, _metadata("obs/_index", shape=[10**10], chunks=[10**10])),
    ("a negative shape", REFUSED, _metadata("X/data", shape=[-3])),
    ("chunks of no length", REFUSED, _metadata("X/data", chunks=[0])),
    ("a codec that nobody knows", REFUSED, _metadata("X/data", compressor={"id": "rot13"})),
    ("a codec that runs pickles", REFUSED, _pickled),
    ("a type that nobody knows", REFUSED, _metadata("X/data", dtype="<q9")),
    ("values without chunks", REFUSED, lambda s: [c.unlink() for c in (s / "X/indptr").iterdir() if c.name[0] != "."]),
    ("chunks that are cut off", REFUSED, _chunks("X/data", lambda b: b[: len(b) // 2])),
    ("chunks of noise", REFUSED, _chunks("X/indices", lambda b: bytes(reversed(b)))),
    ("empty chunks", REFUSED, _chunks("X/data", lambda b: b"")),
    ("an encoding that nobody knows", REFUSED, _attributes("X", **{"encoding-type": "quantum_matrix"})),
    ("a shape that is too large", REFUSED, _attributes("X", shape=[120, 4000])),
    ("a shape of 10^15 cells", REFUSED, _attributes("X", shape=[10**15, 40])),
    ("chunks that are named pipes", REFUSED,
     lambda s: [(c.unlink(), os.mkfifo(c)) for c in (s / "X/data").iterdir() if c.name[0] != "."]),
    ("chunks that are folders", REFUSED,
     lambda s: [(c.unlink(), c.mkdir()) for c in (s / "X/data").iterdir() if c.name[0] != "."]),
):  # fmt: skip
    CASES("zarr", _what, _expected)(_zarr(_edit, TRAIN))
    CASES("zarr, streamed", _what, _expected)(_zarr(_edit, PREPARE))


# --- 10x --------------------------------------------------------------------------------------------------------------


def _tenx_h5(edit: Callable[[h5py.Group], object]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        adata = cells(30, 12)
        with h5py.File("bad.h5", "w") as file:
            group = file.create_group("matrix")
            group["barcodes"] = np.array(adata.obs_names, "S")
            for name, values in (("id", adata.var_names), ("name", adata.var_names)):
                group[f"features/{name}"] = np.array(values, "S")
            group["features/feature_type"] = np.array(["Gene Expression"] * 12, "S")
            group["data"], group["indices"] = adata.X.data.astype(np.int32), adata.X.indices
            group["indptr"], group["shape"] = adata.X.indptr, [12, 30]
            edit(group)
        return ["prepare", "bad.h5", "--out", "store"]

    return make


def _put(name: str, values: object) -> Callable[[h5py.Group], None]:
    def edit(group: h5py.Group) -> None:
        del group[name]
        group[name] = values

    return edit


def _unstored(name: str, shape: tuple[int, ...], dtype: str) -> Callable[[h5py.Group], None]:
    def edit(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, shape, dtype, chunks=(1000,), compression="gzip")

    return edit


for _what, _expected, _edit in (
    ("whole", ACCEPTED, lambda g: None),
    ("no barcodes", REFUSED, lambda g: g.__delitem__("barcodes")),
    ("no features", REFUSED, lambda g: g.__delitem__("features")),
    ("no shape", REFUSED, lambda g: g.__delitem__("shape")),
    ("a shape of one number", REFUSED, _put("shape", [12])),
    ("a shape of text", REFUSED, _put("shape", "12x30")),
    ("a scalar shape", REFUSED, _put("shape", 12)),
    ("a shape that is too large", REFUSED, _put("shape", [12, 10**12])),
    ("fewer barcodes than cells", REFUSED, _put("barcodes", np.array(["a", "b"], "S"))),
    ("duplicated barcodes", REFUSED, _put("barcodes", np.array(["a"] * 30, "S"))),
    ("duplicated gene names", ACCEPTED, _put("features/name", np.array(["a"] * 12, "S"))),
    ("names that are numbers", REFUSED, _put("features/name", np.arange(12))),
    ("names that are no UTF-8", REFUSED, _put("features/name", np.array([b"\xff%d" % i for i in range(12)]))),
    ("only antibodies", REFUSED, _put("features/feature_type", np.array(["Antibody Capture"] * 12, "S"))),
    ("fewer kinds than features", REFUSED, _put("features/feature_type", np.array(["Gene Expression"], "S"))),
    ("indices out of range", REFUSED, lambda g: _put("indices", np.full(len(g["indices"]), 12))(g)),
    ("negative indices", REFUSED, lambda g: _put("indices", np.full(len(g["indices"]), -1))(g)),
    ("pointers that fall", REFUSED, _put("indptr", np.arange(31)[::-1].copy())),
    ("negative values", REFUSED, lambda g: _put("data", np.full(len(g["data"]), -1))(g)),
    ("fractions", REFUSED, lambda g: _put("data", np.full(len(g["data"]), 0.5))(g)),
    ("10^12 values that were never stored", REFUSED, _unstored("data", (10**12,), "i4")),
    ("10^10 barcodes that were never stored", REFUSED, _unstored("barcodes", (10**10,), "S16")),
    ("a matrix that is a dataset", REFUSED, lambda g: (g.file.__delitem__("matrix"), g.file.__setitem__("matrix", 3))),
):  # fmt: skip
    CASES("10x h5", _what, _expected)(_tenx_h5(_edit))

_MTX = {
    "matrix.mtx": "%%MatrixMarket matrix coordinate integer general\n%\n4 3 4\n1 1 2\n2 1 1\n3 2 5\n4 3 1\n",
    "barcodes.tsv": "AAA\nCCC\nGGG\n",
    "features.tsv": "".join(f"ENSG0000000000{i}\tG{i}\tGene Expression\n" for i in range(1, 5)),
}
_HEAD = "%%MatrixMarket matrix coordinate integer general\n"


def _mtx(**files: str | bytes | None) -> Callable[[Path], list[str]]:
    """Files of a folder by the name without ending; None leaves a file out, bytes are written with ``.gz``."""

    def make(examples: Path) -> list[str]:
        Path("tenx").mkdir()
        for name, whole in _MTX.items():
            content = files.get(name.split(".")[0], whole)
            if isinstance(content, bytes):
                Path("tenx", f"{name}.gz").write_bytes(content)
            elif content is not None:
                Path("tenx", name).write_bytes(content.encode("utf-8", "surrogateescape"))
        return ["prepare", "tenx", "--out", "store"]

    return make


for _what, _expected, _files in (
    ("whole", ACCEPTED, {}),
    ("lines that end in CR LF", ACCEPTED, {"matrix": _MTX["matrix.mtx"].replace("\n", "\r\n")}),
    ("gzipped", ACCEPTED, {"matrix": gzip.compress(_MTX["matrix.mtx"].encode())}),
    ("no barcodes", REFUSED, {"barcodes": None}),
    ("no features", REFUSED, {"features": None}),
    ("an empty matrix", REFUSED, {"matrix": ""}),
    ("no header", REFUSED, {"matrix": "4 3 1\n1 1 1\n"}),
    ("comments without an end", REFUSED, {"matrix": _HEAD + "%\n" * 100_000}),
    ("only a header", REFUSED, {"matrix": _HEAD}),
    ("a header of words", REFUSED, {"matrix": _HEAD + "four 3 4\n1 1 1\n"}),
    ("a header of two numbers", REFUSED, {"matrix": _HEAD + "4 3\n1 1 1\n"}),
    ("a header of 10^15 cells", REFUSED, {"matrix": _HEAD + "4 1000000000000000 1\n1 1 1\n"}),
    ("10^15 values announced", REFUSED, {"matrix": _HEAD + "4 3 1000000000000000\n1 1 1\n"}),
    ("-1 values announced", REFUSED, {"matrix": _HEAD + "4 3 -1\n1 1 1\n"}),
    ("fewer values than announced", REFUSED, {"matrix": _HEAD + "4 3 4\n1 1 1\n"}),
    ("more values than announced", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 1\n2 1 1\n"}),
    ("no values announced", REFUSED, {"matrix": _HEAD + "4 3 0\n1 1 1\n"}),
    ("an index of 0", REFUSED, {"matrix": _HEAD + "4 3 1\n0 1 1\n"}),
    ("a cell of 0", REFUSED, {"matrix": _HEAD + "4 3 1\n1 0 1\n"}),
    ("a gene out of range", REFUSED, {"matrix": _HEAD + "4 3 1\n5 1 1\n"}),
    ("a cell out of range", REFUSED, {"matrix": _HEAD + "4 3 1\n1 4 1\n"}),
    ("a cell of 10^18", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1000000000000000000 1\n"}),
    ("an index of NaN", REFUSED, {"matrix": _HEAD + "4 3 1\nnan 1 1\n"}),
    ("a fraction of an index", REFUSED, {"matrix": _HEAD + "4 3 1\n1.5 1 1\n"}),
    ("cells out of order", REFUSED, {"matrix": _HEAD + "4 3 2\n1 2 1\n1 1 1\n"}),
    ("a negative value", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 -1\n"}),
    ("a fraction", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 0.5\n"}),
    ("a value of NaN", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 nan\n"}),
    ("a value of 1e999", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 1e999\n"}),
    ("a value of words", REFUSED, {"matrix": _HEAD + "4 3 1\n1 1 many\n"}),
    ("a line of two fields", REFUSED, {"matrix": _HEAD + "4 3 2\n1 1 1\n1 2\n"}),
    ("a line of four fields", REFUSED, {"matrix": _HEAD + "4 3 2\n1 1 1\n1 2 3 4\n"}),
    ("bytes that are no text", REFUSED, {"matrix": "\udcff\udcfe"}),
    ("a gzip that is cut off", REFUSED, {"matrix": gzip.compress(_MTX["matrix.mtx"].encode())[:-12]}),
    ("a gzip that is none", REFUSED, {"matrix": b"plain"}),
    ("a gzip of 1 GB of comments", REFUSED, {"matrix": gzip.compress(_HEAD.encode() + b"%" * 10) + gzip.compress(b"%" * (1 << 24)) * 64}),
    ("a gzip of 1 GB of barcodes", REFUSED, {"barcodes": gzip.compress(b"A" * (1 << 24)) * 64}),
    ("duplicated barcodes", REFUSED, {"barcodes": "A\nA\nB\n"}),
    ("fewer barcodes than cells", REFUSED, {"barcodes": "A\n"}),
    ("empty barcodes", REFUSED, {"barcodes": ""}),
    ("barcodes with zero bytes", EITHER, {"barcodes": "A\0\nB\0\nC\0\n"}),
    ("features of one column", ACCEPTED, {"features": "a\nb\nc\nd\n"}),
    ("only antibodies", REFUSED, {"features": "".join(f"i{i}\tG{i}\tAntibody Capture\n" for i in range(4))}),
    ("features of unequal lines", EITHER, {"features": "i1\tG1\tGene Expression\ni2\ni3\tG3\ni4\tG4\n"}),
):  # fmt: skip
    CASES("10x mtx", _what, _expected)(_mtx(**_files))
