"""Embeddings, gene sets, networks, tilts, DE tables, lists and tables of genes."""

# ruff: noqa: E501 - a case is one line
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from malformed.catalogue import Collector
from malformed.file_cases import Executed
from malformed.harness import ACCEPTED, EITHER, REFUSED

CASES = Collector()
GENES = [f"GENE{g}" for g in range(40)]
VECTORS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def _embeddings(name: str, write: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        write(Path(name))
        return ["embeddings", "--from-file", name, "--out", "out.npz"]

    return make


def _npz(**arrays: object) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **{"genes": np.array(GENES), "embeddings": VECTORS, **arrays})


def _changed(value: float) -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[3, 1] = value
    return vectors


def _header(shape: str, descr: str = "'<f4'") -> bytes:
    """An npy file that announces a shape, with nothing in it."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _zip(**members: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)

    return write


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


NAMES = _npy(np.array(GENES))
for _what, _expected, _write in (
    ("whole", ACCEPTED, _npz()),
    ("no vectors", REFUSED, lambda p: np.savez(p, genes=np.array(GENES))),
    ("no names", REFUSED, lambda p: np.savez(p, embeddings=VECTORS)),
    ("no arrays", REFUSED, lambda p: np.savez(p)),
    ("fewer names than vectors", REFUSED, _npz(genes=np.array(GENES[:7]))),
    ("zero vectors", REFUSED, _npz(genes=np.array([], "U5"), embeddings=np.zeros((0, 3)))),
    ("vectors of no length", REFUSED, _npz(embeddings=np.zeros((40, 0)))),
    ("NaN", REFUSED, _npz(embeddings=_changed(np.nan))),
    ("infinity", REFUSED, _npz(embeddings=_changed(np.inf))),
    ("numbers beyond float32", REFUSED, _npz(embeddings=_changed(1.0).astype(np.float64) * 1e300)),
    ("constant vectors", REFUSED, _npz(embeddings=np.ones((40, 3)))),
    ("a cube", REFUSED, _npz(embeddings=np.ones((40, 3, 2)))),
    ("complex numbers", REFUSED, _npz(embeddings=VECTORS.astype(np.complex64))),
    ("truth values", REFUSED, _npz(embeddings=VECTORS > 0)),
    ("vectors of text", REFUSED, _npz(embeddings=VECTORS.astype("U8"))),
    ("names that are objects", REFUSED, _npz(genes=np.array(GENES, dtype=object))),
    ("vectors that are objects", REFUSED, _npz(embeddings=VECTORS.astype(object))),
    ("a pickle that runs code", REFUSED, _zip(genes=_npy(np.array([Executed()] * 40)), embeddings=_npy(VECTORS))),
    ("names that are bytes", ACCEPTED, _npz(genes=np.array(GENES, "S"))),
    ("names that are no UTF-8", REFUSED, _npz(genes=np.array([b"\xff%d" % i for i in range(40)]))),
    ("duplicated names with other vectors", REFUSED, _npz(genes=np.array(["GENE0"] * 40))),
    ("duplicated names with the same vector", ACCEPTED,
     lambda p: np.savez(p, genes=np.array(GENES * 2), embeddings=np.concatenate([VECTORS, VECTORS]))),
    ("a header of 10^12 vectors", REFUSED, _zip(genes=NAMES, embeddings=_header("(1000000000000, 3)"))),
    ("a header of negative length", REFUSED, _zip(genes=NAMES, embeddings=_header("(-40, 3)"))),
    ("a header that overflows", REFUSED, _zip(genes=NAMES, embeddings=_header("(4294967296, 4294967296)"))),
    ("a header of code", REFUSED, _zip(genes=NAMES, embeddings=_header("__import__('os').system('touch EXECUTED')"))),
    ("a header of an unknown type", REFUSED, _zip(genes=NAMES, embeddings=_header("(40, 3)", "'<q9'"))),
    ("a header of objects", REFUSED, _zip(genes=NAMES, embeddings=_header("(40,)", "'|O'") + pickle.dumps(Executed()))),
    ("an array that is cut off", REFUSED, _zip(genes=NAMES, embeddings=_npy(VECTORS)[:-40])),
    ("a member that is no array", REFUSED, _zip(genes=NAMES, embeddings=b"no array")),
    ("a zip of 160 MB of zeros", REFUSED, _zip(genes=NAMES, embeddings=_header("(40, 1000000)") + b"\0" * (40 * 4_000_000))),
    ("no zip", REFUSED, lambda p: p.write_bytes(b"no zip")),
    ("an empty file", REFUSED, lambda p: p.touch()),
    ("a named pipe", REFUSED, lambda p: os.mkfifo(p)),
    ("an endless device", REFUSED, lambda p: os.symlink("/dev/zero", p)),
    ("a folder", REFUSED, lambda p: p.mkdir()),
    ("names with newlines, markup and escapes", ACCEPTED, _npz(genes=np.array(["a\nb", "[red]", "\x1b[2J", *GENES[3:]]))),
):  # fmt: skip
    CASES("embeddings, npz", _what, _expected)(_embeddings("bad.npz", _write))


def _tensors(about: dict[str, str] | None, **arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda path: save_file(arrays, path, metadata=about)


def _safetensors_header(header: object, data: bytes = b"") -> Callable[[Path], None]:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + data)


_LIST = {"genes": json.dumps(GENES)}
for _what, _expected, _write in (
    ("whole", ACCEPTED, _tensors(_LIST, embeddings=VECTORS)),
    ("no names", REFUSED, _tensors(None, embeddings=VECTORS)),
    ("names that are no JSON", REFUSED, _tensors({"genes": "GENE0, GENE1"}, embeddings=VECTORS)),
    ("names that are a number", REFUSED, _tensors({"genes": "3"}, embeddings=VECTORS)),
    ("names that are an object", REFUSED, _tensors({"genes": '{"a": 1}'}, embeddings=VECTORS)),
    ("deeply nested names", REFUSED, _tensors({"genes": "[" * 100_000}, embeddings=VECTORS)),
    ("fewer names than vectors", REFUSED, _tensors({"genes": '["a"]'}, embeddings=VECTORS)),
    ("no tensors", REFUSED, _tensors(_LIST)),
    ("vectors of unequal length", REFUSED, _tensors(None, a=np.ones(3, np.float32), b=np.ones(4, np.float32))),
    ("a header of 10^12 values", REFUSED,
     _safetensors_header({"embeddings": {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 12 * 10**12]}})),
    ("a header that overlaps", REFUSED,
     _safetensors_header({k: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} for k in "ab"}, b"\0" * 12)),
    ("a header of another length", REFUSED, lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
    ("a header that is no JSON", REFUSED, _safetensors_header(b"{")),
    ("an unknown type", REFUSED,
     _safetensors_header({"embeddings": {"dtype": "Q9", "shape": [3], "data_offsets": [0, 12]}}, b"\0" * 12)),
    ("an empty file", REFUSED, lambda p: p.touch()),
    ("NaN", REFUSED, _tensors(_LIST, embeddings=_changed(np.nan))),
    ("whole numbers", ACCEPTED, _tensors(_LIST, embeddings=(VECTORS * 100).astype(np.int16))),
):  # fmt: skip
    CASES("embeddings, safetensors", _what, _expected)(_embeddings("bad.safetensors", _write))


def _csv(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


_TABLE = pd.DataFrame(VECTORS, index=pd.Index(GENES, name="gene")).to_csv()
for _what, _expected, _name, _write in (
    ("whole", ACCEPTED, "bad.csv", _csv(_TABLE)),
    ("gzipped", ACCEPTED, "bad.csv.gz", _csv(gzip.compress(_TABLE.encode()))),
    ("lines that end in CR LF and a byte order mark", ACCEPTED, "bad.csv",
     _csv(b"\xef\xbb\xbf" + _TABLE.replace("\n", "\r\n").encode())),
    ("empty", REFUSED, "bad.csv", _csv("")),
    ("only a header", REFUSED, "bad.csv", _csv("gene,a,b\n")),
    ("one column", REFUSED, "bad.csv", _csv("gene\nGENE0\n")),
    ("words among the numbers", REFUSED, "bad.csv", _csv("gene,a\nGENE0,one\nGENE1,2\n")),
    ("missing numbers", REFUSED, "bad.csv", _csv("gene,a,b\nGENE0,1,\nGENE1,2,3\n")),
    ("lines of unequal length", REFUSED, "bad.csv", _csv("gene,a\nGENE0,1,2,3\nGENE1,2\n")),
    ("a quote without an end", REFUSED, "bad.csv", _csv('gene,a\n"GENE0,1\nGENE1,2\n')),
    ("bytes that are no text", REFUSED, "bad.csv", _csv(b"gene,a\n\xff\xfe,1\n")),
    ("UTF-16", REFUSED, "bad.csv", _csv(_TABLE.encode("utf-16"))),
    ("a gzip that is cut off", REFUSED, "bad.csv.gz", _csv(gzip.compress(_TABLE.encode())[:-20])),
    ("a gzip of 1 GB of zeros", REFUSED, "bad.csv.gz", _csv(gzip.compress(b"gene,a\n") + gzip.compress(b"0" * (1 << 24)) * 64)),
    ("another ending", REFUSED, "bad.pt", _csv(pickle.dumps(Executed()))),
    ("a pickle under the name of parquet", REFUSED, "bad.parquet", _csv(pickle.dumps(Executed()))),
    ("an empty parquet file", REFUSED, "bad.parquet", _csv("")),
    ("a parquet file of words", REFUSED, "bad.parquet", lambda p: pd.DataFrame({"gene": GENES, "a": GENES}).to_parquet(p)),
    ("a parquet file of 10^9 zeros", REFUSED, "bad.parquet", lambda p: _long_parquet(p)),
    ("a whole parquet file", ACCEPTED, "bad.parquet",
     lambda p: pd.DataFrame(VECTORS, index=pd.Index(GENES, name="gene"), columns=list("abc")).to_parquet(p)),
):  # fmt: skip
    CASES("embeddings, tables", _what, _expected)(_embeddings(_name, _write))


def _long_parquet(path: Path) -> None:
    """A column of one value, which takes next to no space."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"gene": pa.repeat(pa.scalar("GENE0"), 1 << 20), "a": pa.repeat(pa.scalar(0.0), 1 << 20)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(100):
            writer.write_table(table)


def _train_on(write: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        from malformed.examples import tiny

        Path("data.h5ad").symlink_to(examples / "cells.h5ad")
        write(Path("bad.npz"))
        keys = ["--perturbation-key", "perturbation", "--control", "control", "--set", 'data.embeddings=["bad.npz"]']
        return ["train", "data.h5ad", "--out", "run", *tiny(), *keys]

    return make


for _what, _expected, _write in (
    ("whole", ACCEPTED, _npz()),
    ("no overlap with the perturbations", REFUSED, _npz(genes=np.array([f"other{i}" for i in range(40)]))),
    ("no such file", REFUSED, lambda p: None),
    ("one dimension", ACCEPTED, _npz(embeddings=VECTORS[:, :1])),
    ("constant vectors", REFUSED, _npz(embeddings=np.ones((40, 3)))),
):
    CASES("embeddings in training", _what, _expected)(_train_on(_write))

# --- gene sets and networks -------------------------------------------------------------------------------------------


def _source(option: str, name: str, content: str | bytes) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return ["embeddings", option, name, "--components", "2", "--out", "out.npz"]

    return make


_SETS = "".join(f"set{s}\tnote\t" + "\t".join(GENES[s::5]) + "\n" for s in range(5)) + "all\t\tGENE0\tGENE7\n"
for _what, _expected, _name, _text in (
    ("whole", ACCEPTED, "s.gmt", _SETS),
    ("a byte order mark and CR LF", ACCEPTED, "s.gmt", b"\xef\xbb\xbf" + _SETS.replace("\n", "\r\n").encode()),
    ("empty", REFUSED, "s.gmt", ""),
    ("a line of two fields", REFUSED, "s.gmt", "a\tb\n"),
    ("a set twice", REFUSED, "s.gmt", _SETS + "set0\t\tGENE1\n"),
    ("blanks in place of tabs", REFUSED, "s.gmt", "set0 note GENE1 GENE2\n"),
    ("one set of one gene", REFUSED, "s.gmt", "a\t\tGENE1\n"),
    ("bytes that are no text", REFUSED, "s.gmt", b"a\t\t\xff\n"),
    ("a gzip that is none", REFUSED, "s.gmt.gz", b"plain"),
    ("a gzip that is cut off", REFUSED, "s.gmt.gz", gzip.compress(_SETS.encode())[:-9]),
    ("a gzip of 1 GB of genes", REFUSED, "s.gmt.gz", gzip.compress(b"a\t\t") + gzip.compress(b"G\t" * (1 << 23)) * 64),
    ("zero bytes", EITHER, "s.gmt", _SETS.replace("GENE1\t", "GENE\0\t")),
    ("a gene of 100,000 characters", ACCEPTED, "s.gmt", _SETS + f"long\t\t{'G' * 100_000}\tGENE1\n"),
):  # fmt: skip
    CASES("gene sets", _what, _expected)(_source("--from-gene-sets", _name, _text))
_LINKS = "a\tb\tsign\n" + "".join(f"GENE{i}\tGENE{(3 * i + 1) % 40}\t{'+-'[i % 2]}\n" for i in range(40))
for _what, _expected, _name, _text in (
    ("whole", ACCEPTED, "l.tsv", _LINKS),
    ("empty", REFUSED, "l.tsv", ""),
    ("one column", REFUSED, "l.tsv", "a\nGENE1\n"),
    ("no links", REFUSED, "l.tsv", "a\tb\n"),
    ("links of genes with themselves", REFUSED, "l.tsv", "a\tb\nG\tG\n"),
    ("signs that are words", REFUSED, "l.tsv", "a\tb\tsign\nG\tH\tmaybe\n"),
    ("signs that are infinite", REFUSED, "l.tsv", "a\tb\tsign\nG\tH\tinf\n"),
    ("signs of 1e300", EITHER, "l.tsv", _LINKS.replace("+", "1e300")),
    ("lines of unequal length", REFUSED, "l.tsv", "a\tb\nG\tH\tI\tJ\nK\tL\n"),
    ("bytes that are no text", REFUSED, "l.tsv", b"a\tb\n\xff\tH\n"),
    ("a gzip of 1 GB of zeros", REFUSED, "l.tsv.gz", gzip.compress(b"a\tb\n") + gzip.compress(b"\0" * (1 << 24)) * 64),
    ("numbers as genes", ACCEPTED, "l.tsv", "a\tb\n" + "".join(f"{i}\t{(3 * i + 1) % 40}\n" for i in range(40))),
):  # fmt: skip
    CASES("networks", _what, _expected)(_source("--from-network", _name, _text))

# --- tilts ------------------------------------------------------------------------------------------------------------


def _tilts(text: str) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path("model").symlink_to(examples / "run")
        Path("tilts.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
        return ["generate", "model", "--n", "2", "--tilt", "tilts.csv", "--out", "g.h5ad"]

    return make


for _what, _expected, _text in (
    ("whole", ACCEPTED, "gene,direction\nGENE1,up\n"),
    ("empty", REFUSED, ""),
    ("no direction", REFUSED, "gene\nGENE1\n"),
    ("a direction that is none", REFUSED, "gene,direction\nGENE1,sideways\n"),
    ("an unknown gene", REFUSED, "gene,direction\nXYZ,up\n"),
    ("a gene twice", REFUSED, "gene,direction\nGENE1,up\nGENE1,down\n"),
    ("a change of NaN", REFUSED, "gene,log2_fold_change\nGENE1,nan\n"),
    ("a change of 1e308", REFUSED, "gene,log2_fold_change\nGENE1,1e308\n"),
    ("a change of -5,000", REFUSED, "gene,log2_fold_change\nGENE1,-5000\n"),
    ("a strength of 2", REFUSED, "gene,direction,strength\nGENE1,up,2\n"),
    ("a strength of NaN", REFUSED, "gene,direction,strength\nGENE1,up,nan\n"),
    ("direction and change that disagree", REFUSED, "gene,direction,log2_fold_change\nGENE1,up,-1\n"),
    ("a column twice, of which the first counts", ACCEPTED, "gene,direction,direction\nGENE1,up,up\n"),
    ("columns twice by capitals", REFUSED, "gene,Gene,direction\nGENE1,GENE2,up\n"),
    ("no rows", ACCEPTED, "gene,direction\n"),
    ("bytes that are no text", REFUSED, "gene,direction\n\udcff,up\n"),
):
    CASES("tilts", _what, _expected)(_tilts(_text))

# --- lists and tables of genes ----------------------------------------------------------------------------------------


def _beside(option: str, form: str, name: str, content: str | bytes | None) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path("data.h5ad").symlink_to(examples / "cells.h5ad")
        if content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return ["genes", "data.h5ad", option, form.format(name)]

    return make


for _option, _form in (("--aliases", "{}"), ("--gene-table", "human={}"), ("--orthologs", "{}"), ("--join", "{}")):
    for _what, _name, _content in (
        ("not there", "t.tsv", None),
        ("empty", "t.tsv", b""),
        ("bytes that are no text", "t.tsv", b"\xff\xfe\t\xff\n"),
        ("a gzip that is none", "t.tsv.gz", b"plain"),
        ("a gzip of 1 GB of zeros", "t.tsv.gz", gzip.compress(b"a\tb\n") + gzip.compress(b"0" * (1 << 24)) * 64),
        ("one column", "t.tsv", b"symbol\nA\n"),
        ("a field of 200,000 characters", "t.tsv", b"a\tb\n" + b"x" * 200_000 + b"\ty\n"),
    ):
        if (_option, _what) not in (("--join", "one column"),):
            long = _what.startswith("a field")
            wanted = (EITHER if _option != "--orthologs" else REFUSED) if long else REFUSED
            CASES(f"table for {_option}", _what, wanted)(_beside(_option, _form, _name, _content))

for _what, _text in (
    ("empty", ""), ("genes twice", "GENE1\nGENE1\n"), ("bytes that are no text", "\udcff\n"),
    ("no gene of the data", "A\nB\n"),
):  # fmt: skip

    def _export(text: str) -> Callable[[Path], list[str]]:
        def make(examples: Path) -> list[str]:
            Path("data.h5ad").symlink_to(examples / "cells.h5ad")
            Path("genes.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
            words = ["--target-key", "perturbation", "--context-key", "cell_type", "--control", "control"]
            return [
                "export",
                "vcc2026",
                "data.h5ad",
                "--genes",
                "genes.txt",
                "--out",
                "s.h5ad",
                "--n-genes",
                "0",
                *words,
            ]

        return make

    CASES("gene list of an export", _what, REFUSED)(_export(_text))

# --- DE tables --------------------------------------------------------------------------------------------------------


def _de(files: dict[str, str], read: str) -> Callable[[Path], Callable[[], object]]:
    def make(examples: Path) -> Callable[[], object]:
        from lingshu_cell.data.de_tables import read_de_table

        for name, text in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return lambda: read_de_table(read)

    return make


_DE = "target,feature,target_mean,ref_mean,log2_fold_change,fdr\nGENE1,GENE2,1,2,-1,0.01\n"
_INDEX = "condition,cell_type,perturbation,file\nB / GENE1,B,GENE1,{}\n"
for _what, _expected, _files, _read in (
    ("whole", ACCEPTED, {"d.csv": _DE}, "d.csv"),
    ("empty", REFUSED, {"d.csv": ""}, "d.csv"),
    ("a column less", REFUSED, {"d.csv": _DE.replace(",fdr", "").replace(",0.01", "")}, "d.csv"),
    ("words in place of numbers", REFUSED, {"d.csv": _DE.replace("0.01", "small")}, "d.csv"),
    ("missing numbers", ACCEPTED, {"d.csv": _DE.replace("0.01", "NA")}, "d.csv"),
    ("a column twice by capitals", ACCEPTED, {"d.csv": _DE.replace("fdr", "fdr,FDR").replace("0.01", "0.01,0.02")}, "d.csv"),
    ("bytes that are no text", REFUSED, {"d.csv": _DE + "\udcff,a,1,1,1,1\n"}, "d.csv"),
    ("a folder without an index", REFUSED, {"d/x.csv": _DE}, "d"),
    ("a whole folder", ACCEPTED, {"d/index.csv": _INDEX.format("x.csv"), "d/x.csv": _DE}, "d"),
    ("an index that names a file elsewhere", REFUSED, {"d/index.csv": _INDEX.format("../x.csv"), "x.csv": _DE}, "d"),
    ("an index that names an absolute path", REFUSED, {"d/index.csv": _INDEX.format("/etc/passwd")}, "d"),
    ("an index that names a missing file", REFUSED, {"d/index.csv": _INDEX.format("x.csv")}, "d"),
    ("an index of one column", REFUSED, {"d/index.csv": "condition\nB\n"}, "d"),
    ("an index with columns in another order", REFUSED,
     {"d/index.csv": "perturbation,condition,file\nG,B,x.csv\n", "d/x.csv": "a\n1\n"}, "d"),
):  # fmt: skip
    CASES("DE table", _what, _expected)(_de(_files, _read))
