"""Every kind of file gives the counts its own reader gives, in chunks, from any cell on, and says when it is broken."""

import gzip
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from conftest import real_cells
from scipy import io, sparse

from lingshu_cell.data import sources
from lingshu_cell.data.sources import identity, open_source
from lingshu_cell.errors import LingshuError


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """150 real cells × 200 genes, one cell and the last one without counts."""
    adata = real_cells(150, 200)
    adata.X = adata.X.astype(np.int32)
    adata.X = sparse.csr_matrix(sparse.diags(~np.isin(np.arange(150), (40, 149)), dtype=np.int32) @ adata.X)
    adata.X.eliminate_zeros()
    return adata


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CELLS", 32)
    monkeypatch.setattr(sources, "CHUNK_VALUES", 400)
    monkeypatch.setattr(sources, "_CSC_VALUES", 1500)


def write_10x_h5(adata: ad.AnnData, path: Path, version: int) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        antibody = 3 if version == 3 else 0  # Cell Ranger puts antibodies behind the genes
        X = sparse.hstack([adata.X, sparse.csr_matrix(np.full((adata.n_obs, antibody), 9, np.int32))], format="csr")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(X, name)
        group["shape"] = X.shape[::-1]
        group["barcodes"] = adata.obs_names.to_numpy().astype("S")
        names = [*adata.var_names, *["CD3"] * antibody]
        ids = [f"ENSG{i:011d}" for i in range(len(names))]
        if version == 2:
            group["genes"], group["gene_names"] = np.array(ids, "S"), np.array(names, "S")
            return
        features = group.create_group("features")
        features["id"], features["name"] = np.array(ids, "S"), np.array(names, "S")
        features["feature_type"] = np.array(["Gene Expression"] * adata.n_vars + ["Antibody Capture"] * antibody, "S")
        features["genome"] = np.array(["GRCh38"] * len(names), "S")


def write_10x_mtx(adata: ad.AnnData, folder: Path, zipped: bool = True) -> None:
    folder.mkdir()
    io.mmwrite(folder / "matrix.mtx", adata.X.T.tocsc())
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv", index=False, header=False)
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    table = pd.DataFrame({"id": ids, "name": adata.var_names, "type": "Gene Expression"})
    table.to_csv(folder / "features.tsv", sep="\t", index=False, header=False)
    if not zipped:
        (folder / "features.tsv").rename(folder / "genes.tsv")
        return
    for file in list(folder.iterdir()):
        with open(file, "rb") as plain, gzip.open(f"{file}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        file.unlink()


def written(cells: ad.AnnData, kind: str, folder: Path) -> Path:
    path = folder / {"zarr": "c.zarr", "mtx": "c", "mtx old": "c"}.get(kind, "c.h5ad" if "h5ad" in kind else "c.h5")
    adata = cells.copy()
    if kind == "h5ad csc":
        adata.X = adata.X.tocsc()
    if kind == "h5ad dense":
        adata.X = adata.X.toarray().astype(np.float32)
    if kind == "h5ad layer":
        adata.layers["counts"], adata.X = adata.X, adata.X.astype(np.float32) / 2
    if kind.startswith("h5ad"):
        adata.write_h5ad(path, compression="gzip")
    elif kind == "zarr":
        adata.write_zarr(path)
    elif kind.startswith("10x h5"):
        write_10x_h5(adata, path, int(kind[-1]))
    else:
        write_10x_mtx(adata, path, zipped=kind == "mtx")
    return path


KINDS = ("h5ad", "h5ad csc", "h5ad dense", "h5ad layer", "zarr", "10x h5 3", "10x h5 2", "mtx", "mtx old")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_counts(cells, kind, tmp_path):
    path = written(cells, kind, tmp_path)
    with open_source(path, "counts" if kind == "h5ad layer" else None) as source:
        assert list(source.obs_names) == list(cells.obs_names) and list(source.gene_names) == list(cells.var_names)
        for start in (0, 1, 41, 149):
            pieces = list(source.chunks(start))
            assert [at for at, _ in pieces] == [start, *(at + p.shape[0] for at, p in pieces[:-1])]
            assert len(pieces) > 1 or start > 100
            read = sparse.vstack([piece for _, piece in pieces])
            assert read.dtype == np.int32 and (read != cells.X[start:]).nnz == 0
            assert all(piece.has_canonical_format and piece.data.all() for _, piece in pieces)


def test_10x_readers_of_scanpy_agree(cells, tmp_path):
    for kind in ("10x h5 3", "mtx"):
        path = written(cells, kind, tmp_path)
        theirs = sc.read_10x_h5(path) if kind == "10x h5 3" else sc.read_10x_mtx(path)
        with open_source(path) as source:
            read = sparse.vstack([piece for _, piece in source.chunks()])
            assert (read != theirs.X).nnz == 0 and list(source.gene_names) == list(theirs.var_names)
            assert list(source.var["gene_ids"]) == list(theirs.var["gene_ids"])


@pytest.mark.parametrize("kind", ["h5ad", "10x h5 3", "mtx", "zarr"])
def test_broken_bytes_are_an_error_that_names_the_file(cells, kind, tmp_path):
    path = written(cells, kind, tmp_path)
    victim = path
    if path.is_dir():
        of_counts = [p for p in path.rglob("*") if p.is_file() and ("X" in p.parts or "matrix" in p.name)]
        victim = max(of_counts, key=lambda p: p.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LingshuError, match=r"must be whole|damaged"), open_source(path) as source:
        list(source.chunks())


def test_an_mtx_that_lies_is_refused(cells, tmp_path):
    folder = written(cells, "mtx old", tmp_path)
    lines = (folder / "matrix.mtx").read_text().splitlines()
    triples = lines[3:]
    for changed, words in (
        ([*lines[:3], *triples[::-1]], "sorted by cell"),
        (lines[:-1], "announces"),
        ([*lines[:3], *triples[:-1], triples[-1].replace(triples[-1].split()[0], "9999", 1)], "out of range"),
        ([lines[0], lines[1], "7 150 3", *triples], "the tables"),
        (["nothing", *lines[1:]], "Matrix Market"),
    ):
        (folder / "matrix.mtx").write_text("\n".join(changed) + "\n")
        with pytest.raises(LingshuError, match=words), open_source(folder) as source:
            list(source.chunks())


def test_values_that_are_no_counts_are_refused_in_any_chunk(cells, tmp_path):
    adata = cells.copy()
    adata.X = adata.X.astype(np.float32)
    adata.X.data[-1] = 1.5
    adata.write_h5ad(tmp_path / "c.h5ad")
    with (
        pytest.raises(LingshuError, match=r"Counts must be integers: c\.h5ad: X"),
        open_source(tmp_path / "c.h5ad") as source,
    ):
        list(source.chunks())


def test_files_of_no_known_kind_are_refused(cells, tmp_path):
    (tmp_path / "text.h5ad").write_text("no")
    (tmp_path / "folder").mkdir()
    for path, words in (("absent.h5ad", "there is no"), ("text.h5ad", "no HDF5 file"), ("folder", "zarr")):
        with pytest.raises(LingshuError, match=words), open_source(tmp_path / path):
            pass
    with (
        pytest.raises(LingshuError, match="have no layers"),
        open_source(written(cells, "10x h5 3", tmp_path), layer="counts"),
    ):
        pass
    folder = written(cells, "mtx", tmp_path)
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(LingshuError, match=r"has none of 'barcodes\.tsv\.gz'"), open_source(folder):
        pass


def test_identity_follows_the_bytes(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    first = identity(file)
    assert identity(file, {**first, "sha256": "remembered"})["sha256"] == "remembered"
    file.write_bytes(b"two")
    assert identity(file, first | {"mtime_ns": 0})["sha256"] != first["sha256"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_bytes(b"one")
    before = identity(folder)["sha256"]
    (folder / "x").rename(folder / "y")
    assert identity(folder)["sha256"] != before
