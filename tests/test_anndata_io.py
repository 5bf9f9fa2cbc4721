"""Counts are read from every storage, everything else is refused in words, and written cells come back."""

import re
import warnings
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from lingshu_cell.data.anndata_io import H5adWriter, read_counts
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SHAPES = {
    "chicken_embryo": (1000, 24356),
    "dentate_gyrus_mouse": (5454, 14545),
    "fly_embryo": (1297, 8924),
    "gbm_panobinostat_300g": (5000, 300),
    "kang_ifnb": (13999, 14053),
    "kang_ifnb_allgenes": (6000, 35635),
    "marrow_cd34": (4142, 16106),
    "mousebrain_zeisel18": (1099, 27998),
    "pancreas_h2c": (3274, 33053),
    "papalexi_eccite_299g": (20729, 299),
    "pbmc3k": (2700, 32738),
    "pbmc8k": (8381, 33694),
    "vcc_h1_sub": (600, 1000),
    "worm_embryo": (1805, 10000),
}


@pytest.fixture(scope="session")
def pbmc() -> ad.AnnData:
    """200 real cells × 1,500 real genes around the densest ones, no cell empty."""
    adata = ad.read_h5ad(pbmc3k_path())
    dense = np.argsort(-np.asarray(adata.X.sum(axis=0)).ravel())[:1500]
    return adata[:200, np.sort(dense)].copy()


def rebuilt(adata: ad.AnnData, X) -> ad.AnnData:
    return ad.AnnData(X=X, obs=adata.obs.copy(), var=adata.var.copy())


def same(left: sparse.spmatrix, right: sparse.spmatrix) -> bool:
    return left.shape == right.shape and (left != right).nnz == 0


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shared_set_is_read(name):
    path = SHARED / f"{name}.h5ad"
    if not path.exists():
        pytest.skip("shared data absent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_counts(path)
    assert read.counts.shape == SHAPES[name] == (read.n_cells, read.n_genes) == (len(read.obs), len(read.var))
    assert read.counts.dtype == np.int32 and read.counts.has_canonical_format and read.counts.data.min() > 0
    assert read.obs_names.is_unique and read.gene_names.is_unique and read.uns_source


def test_reading_gives_what_anndata_gives():
    read, adata = read_counts(pbmc3k_path(), obs_keys=["cell_type"]), ad.read_h5ad(pbmc3k_path())
    assert same(read.counts, adata.X)
    assert list(read.obs_names) == list(adata.obs_names) and list(read.gene_names) == list(adata.var_names)
    pd.testing.assert_frame_equal(read.obs, adata.obs)
    assert read.uns_source == adata.uns["source"] and read.source == str(pbmc3k_path())


def test_the_storage_changes_nothing(pbmc, tmp_path):
    """CSR, CSC, dense, floats, split entries, sparse arrays, in memory, h5ad and zarr: one fingerprint."""
    X = pbmc.X
    halves = sparse.csr_matrix(X.copy())
    doubled = sparse.csr_matrix(
        (np.repeat(halves.data, 2), np.repeat(halves.indices, 2), halves.indptr * 2), shape=halves.shape
    )
    doubled.data[::2], doubled.data[1::2] = doubled.data[::2] - 1, 1
    forms = {
        "csr": X,
        "csc": X.tocsc(),
        "dense": X.toarray(),
        "float32": X.astype(np.float32),
        "float64 csc": X.tocsc().astype(np.float64),
        "float dense": X.toarray().astype(np.float32),
        "uint16": X.astype(np.uint16),
        "sparse array": sparse.csr_array(X),
    }
    expected = read_counts(pbmc)
    assert same(expected.counts, X)
    for name, form in forms.items():
        adata = rebuilt(pbmc, form)
        path = tmp_path / f"{name}.h5ad"
        adata.write_h5ad(path)
        for source in (adata, path):
            read = read_counts(source)
            assert same(read.counts, X), name
            assert read.fingerprint == expected.fingerprint, name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata 0.12 announces zarr v3
        rebuilt(pbmc, X).write_zarr(tmp_path / "pbmc.zarr")
    backed = ad.read_h5ad(tmp_path / "csr.h5ad", backed="r")
    for source in (tmp_path / "pbmc.zarr", backed, rebuilt(pbmc, doubled), pbmc[:]):
        assert read_counts(source).fingerprint == expected.fingerprint
    backed.file.close()


def test_the_fingerprint_sees_counts_genes_and_shape(pbmc):
    changed = pbmc.copy()
    changed.X.data[0] += 1
    renamed = pbmc.copy()
    renamed.var_names = ["other", *pbmc.var_names[1:]]
    prints = {read_counts(adata).fingerprint for adata in (pbmc, changed, renamed, pbmc[:-1].copy())}
    assert len(prints) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in prints)


def test_a_large_dense_matrix_is_read_by_blocks(pbmc, tmp_path, monkeypatch):
    monkeypatch.setattr("lingshu_cell.data.anndata_io._CHUNK", 7 * pbmc.n_vars)
    rebuilt(pbmc, pbmc.X.toarray()).write_h5ad(tmp_path / "dense.h5ad")
    assert same(read_counts(tmp_path / "dense.h5ad").counts, pbmc.X)


def test_the_callers_anndata_stays_as_it_is(pbmc):
    X = sparse.csr_matrix((np.array([2.0, 1.0, 0.0]), np.array([1, 0, 2]), np.array([0, 2, 3])), shape=(2, 3))
    adata = ad.AnnData(X=X.copy(), obs=pbmc.obs.iloc[:2].copy(), var=pbmc.var.iloc[:3].copy())
    with pytest.warns(UserWarning, match="Cells without any counts are kept"):
        read = read_counts(adata)
    assert read.counts.toarray().tolist() == [[1, 2, 0], [0, 0, 0]] and read.counts.nnz == 2
    assert adata.X.indices.tolist() == [1, 0, 2] and adata.X.data.tolist() == [2.0, 1.0, 0.0]
    read.obs["new"] = 1
    assert "new" not in adata.obs


def test_layers_and_raw_can_hold_the_counts(pbmc, tmp_path):
    adata = rebuilt(pbmc, pbmc.X.astype(np.float32))
    adata.layers["counts"] = pbmc.X.copy()
    adata.raw = rebuilt(pbmc, pbmc.X.copy())
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata = adata[:, 100:900].copy()
    adata.write_h5ad(tmp_path / "layers.h5ad")
    for source in (adata, tmp_path / "layers.h5ad"):
        assert same(read_counts(source, layer="counts").counts, pbmc.X[:, 100:900])
        raw = read_counts(source, layer="raw")
        assert same(raw.counts, pbmc.X) and list(raw.gene_names) == list(pbmc.var_names) == list(raw.var.index)


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_the_layout_of_before_2020_is_read(pbmc, tmp_path):
    """anndata < 0.7 kept obs and var as compound arrays and named the sparse format in other attributes."""
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": pbmc.shape})
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(pbmc.X, part)
        file["obs"] = np.array([(name.encode(), 5) for name in pbmc.obs_names], [("index", "S20"), ("n", "i4")])
        file["var"] = np.array([(name.encode(),) for name in pbmc.var_names], [("index", "S30")])
    read = read_counts(tmp_path / "old.h5ad", obs_keys=["n"])
    assert read.fingerprint == read_counts(pbmc).fingerprint and list(read.obs_names) == list(pbmc.obs_names)


def test_a_url_is_downloaded(pbmc, tmp_path):
    pbmc.write_h5ad(tmp_path / "pbmc.h5ad")
    url = (tmp_path / "pbmc.h5ad").as_uri()
    read = read_counts(url)
    assert read.fingerprint == read_counts(pbmc).fingerprint and read.source == url
    with pytest.raises(LingshuError, match=r"must lead to an h5ad file: .*absent\.h5ad could not be fetched"):
        read_counts((tmp_path / "absent.h5ad").as_uri())
    with pytest.raises(LingshuError, match=r"could not be fetched .*unknown url type: s3"):
        read_counts("s3://bucket/pbmc.h5ad")


def test_a_download_that_breaks_off_is_refused(pbmc, tmp_path):
    """A real server that announces more bytes than it sends."""
    import http.server
    import threading

    pbmc.write_h5ad(tmp_path / "pbmc.h5ad")
    content = (tmp_path / "pbmc.h5ad").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            whole = self.path == "/whole.h5ad"
            self.send_response(200 if whole or self.path == "/half.h5ad" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if whole else content[: len(content) // 2])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert same(read_counts(f"{address}/whole.h5ad").counts, pbmc.X)
        with pytest.raises(LingshuError, match=f"must be whole: {len(content) // 2} of {len(content)} bytes"):
            read_counts(f"{address}/half.h5ad")
        with pytest.raises(LingshuError, match="could not be fetched"):
            read_counts(f"{address}/absent.h5ad")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- refusals of files ----------------------------------------------------------------------------------------------


def refused(source, words: str, **arguments) -> None:
    """The message holds ``words`` and is one line that ends with a full stop."""
    with pytest.raises(LingshuError) as caught:
        read_counts(source, **arguments)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".") and not message.endswith("..")


def test_files_that_are_no_anndata_are_refused(pbmc, tmp_path):
    refused(tmp_path / "absent.h5ad", "The data file must exist: there is no ")
    (tmp_path / "table.csv").write_text("gene,cell\nA,1\n")
    refused(tmp_path / "table.csv", "must be an AnnData (.h5ad or .zarr): ")
    refused(tmp_path / "table.csv", "it is no HDF5 file. Read other formats with scanpy (read_10x_h5")
    (tmp_path / "empty.h5ad").touch()
    refused(tmp_path / "empty.h5ad", "it is empty")
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file.create_group("matrix")
    refused(tmp_path / "tenx.h5", "it holds 'matrix' (1). Read other formats with scanpy")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "the folder is no zarr group")
    refused(np.ones((2, 2)), "an AnnData, a path or a URL: got ndarray. Wrap a matrix as anndata.AnnData(X=…)")


def test_broken_files_are_refused(pbmc, tmp_path):
    path = tmp_path / "pbmc.h5ad"
    pbmc.write_h5ad(path, compression="gzip")
    content = path.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.h5ad", "must be whole: ")
    refused(tmp_path / "cut.h5ad", "it is cut off. Copy, download or write it again")
    with h5py.File(path, "r") as file:
        place = file["X/data"].id.get_chunk_info(0)
    broken = bytearray(content)
    broken[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    (tmp_path / "broken.h5ad").write_bytes(broken)
    refused(tmp_path / "broken.h5ad", "must be whole: the count matrix is damaged")
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = pbmc.n_vars + 5
    refused(path, "must be whole: the count matrix is damaged (ValueError: ")


def test_sparse_matrix_with_another_number_of_cells_is_refused(pbmc, tmp_path):
    path = tmp_path / "pbmc.h5ad"
    pbmc.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [pbmc.n_obs, pbmc.n_vars + 9]
    refused(path, f"its shape is ({pbmc.n_obs}, {pbmc.n_vars + 9}), but there are {pbmc.n_obs} cells")


# --- refusals of content --------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "h5ad"])
def stored(request, tmp_path):
    """Give the data back as it is, or as a file."""

    def store(adata: ad.AnnData):
        if request.param == "memory":
            return adata
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata tells of duplicated names; so will we
            adata.write_h5ad(tmp_path / "data.h5ad")
        return tmp_path / "data.h5ad"

    return store


def with_value(adata: ad.AnnData, value: float) -> ad.AnnData:
    X = adata.X.astype(np.float64)
    X.data[0] = value
    return rebuilt(adata, X)


def test_log_normalised_data_are_refused_and_the_counts_found(pbmc, stored):
    adata = rebuilt(pbmc, pbmc.X.astype(np.float32))
    sc.pp.normalize_total(adata, target_sum=1e4)
    normalised = adata.copy()
    sc.pp.log1p(adata)
    refused(stored(adata), "Counts must be integers: X looks log-normalised (")
    refused(stored(adata), "Pass raw UMI counts, before normalisation, log or scaling.")
    refused(stored(normalised), "X looks normalised to 10000 per cell (")
    adata.layers["counts"] = pbmc.X.copy()
    adata.layers["scaled"] = adata.X * 1.5
    refused(stored(adata), ". layers['counts'] holds integers: pass layer='counts'.")
    adata.raw = rebuilt(pbmc, pbmc.X.copy())
    refused(stored(adata), "raw.X holds integers: pass layer='raw'")
    refused(stored(adata), "Counts must be integers: layers['scaled'] looks log-normalised", layer="scaled")
    corrected = rebuilt(pbmc, pbmc.X.astype(np.float64) * 1.37)
    refused(stored(corrected), "X is not integer (")
    swapped = rebuilt(pbmc, pbmc.X.copy())
    swapped.layers["lognorm"] = adata.X.copy()
    refused(stored(swapped), "X holds integers: pass layer=None", layer="lognorm")


def test_values_that_are_no_counts_are_refused(pbmc, stored):
    refused(stored(with_value(pbmc, -3)), "Counts must be 0 or more: X holds 1 negative values, the smallest -3.")
    refused(stored(with_value(pbmc, -0.5)), "X looks scaled: holds 1 negative values, the smallest -0.5")
    refused(stored(with_value(pbmc, np.nan)), "Counts must be finite: X holds 1 NaN or infinite values")
    refused(stored(with_value(pbmc, np.inf)), "Counts must be finite: X holds 1 NaN or infinite values")
    refused(stored(with_value(pbmc, 2.0**31)), "Counts must be at most 2,147,483,647: X holds 2,147,483,648")
    dense = pbmc.X.toarray().astype(np.float32)
    dense[3, 4] = np.nan
    refused(stored(rebuilt(pbmc, dense)), "Counts must be finite")


def test_the_largest_count_is_read(pbmc, stored):
    assert read_counts(stored(with_value(pbmc, 2.0**31 - 1))).counts.data[0] == 2**31 - 1


def test_layers_that_are_not_there_are_refused(pbmc, stored):
    refused(stored(pbmc.copy()), "there is no layer 'counts'. There are no layers: use X", layer="counts")
    adata = pbmc.copy()
    adata.layers["umi"] = adata.X.copy()
    refused(stored(adata), "there is no layer 'counts'. Layers present: 'umi' (1).", layer="counts")
    refused(stored(adata), "there is no layer 'raw'. Layers present: 'umi' (1).", layer="raw")
    adata.X = None
    refused(stored(adata), "there is no X. Layers present: 'umi' (1).")


def test_empty_data_and_repeated_names_are_refused(pbmc, stored):
    refused(stored(pbmc[:0].copy()), "The data must have cells: there are no cells")
    refused(stored(pbmc[:, :0].copy()), "The data must have genes: there are no genes")
    genes, cells = pbmc.copy(), pbmc.copy()
    genes.var_names = ["TP53"] * 3 + list(genes.var_names[3:])
    cells.obs_names = [*cells.obs_names[:-1], cells.obs_names[0]]
    refused(stored(genes), "var_names must be unique: found more than once: 'TP53' (1). Call adata.var_names_make_un")
    name = pbmc.obs_names[0]
    refused(
        stored(cells), f"obs_names must be unique: found more than once: {name!r} (1). Call adata.obs_names_make_un"
    )


def test_missing_keys_and_labels_are_refused(pbmc, stored):
    assert read_counts(stored(pbmc.copy()), obs_keys="cell_type").n_cells == 200
    refused(stored(pbmc.copy()), "there is no 'donor' (1). Available: 'cell_type' (1)", obs_keys=["donor", "cell_type"])
    adata = pbmc.copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(200) >= 7)
    words = f"Every cell needs a label in obs['cell_type']: cells without one: {pbmc.obs_names[0]!r}, "
    refused(stored(adata), words, obs_keys=["cell_type"])
    refused(stored(adata), ", … (7). Drop these cells or give them a label.", obs_keys=["cell_type"])
    assert read_counts(stored(adata)).n_cells == 200  # not asked for, not refused


def test_cells_without_counts_are_kept_with_a_warning(pbmc, stored):
    adata = pbmc.copy()
    adata.X = sparse.diags([0.0] * 2 + [1.0] * 198).tocsr() @ adata.X
    adata.X.eliminate_zeros()
    with pytest.warns(UserWarning, match=rf"are kept: '{pbmc.obs_names[0]}', '{pbmc.obs_names[1]}' \(2\)"):
        assert read_counts(stored(adata)).n_cells == 200


# --- writing --------------------------------------------------------------------------------------------------------


def written(path: Path, pbmc: ad.AnnData, pieces=(0, 70, 71, 200), **arguments) -> None:
    with H5adWriter(path, pbmc.var, n_cells=pieces[-1], **arguments) as writer:
        for start, stop in pairwise(pieces):
            writer.append(pbmc.X[start:stop], pbmc.obs.iloc[start:stop].assign(seed=range(start, stop)))
        writer.close({"made_by": "test", "model": {"steps": 64, "fields": np.array(["cell_type"])}})


def test_written_cells_come_back(pbmc, tmp_path):
    path = tmp_path / "generated.h5ad"
    written(path, pbmc)
    assert [p.name for p in tmp_path.iterdir()] == ["generated.h5ad"]
    assert read_counts(path).fingerprint == read_counts(pbmc).fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata = ad.read_h5ad(path)
    assert same(adata.X, pbmc.X) and adata.X.dtype == np.int32 and isinstance(adata.X, sparse.csr_matrix)
    assert list(adata.obs_names) == list(pbmc.obs_names) and list(adata.var_names) == list(pbmc.var_names)
    assert isinstance(adata.obs["cell_type"].dtype, pd.CategoricalDtype)
    assert adata.obs["cell_type"].astype(str).tolist() == pbmc.obs["cell_type"].astype(str).tolist()
    assert adata.X.indptr.dtype == adata.X.indices.dtype  # scipy changes no mixture of both in place
    assert adata.obs["seed"].tolist() == list(range(200)) and adata.obs["seed"].dtype == np.int64
    assert adata.uns["made_by"] == "test" and adata.uns["model"]["steps"] == 64
    assert adata.var["gene_ids"].tolist() == pbmc.var["gene_ids"].tolist()
    backed = ad.read_h5ad(path, backed="r")
    assert same(sparse.csr_matrix(backed[5:9].X[:]), pbmc.X[5:9])
    backed.file.close()
    scanpy_adata = sc.read_h5ad(path)
    sc.pp.normalize_total(scanpy_adata)
    sc.pp.log1p(scanpy_adata)
    assert np.isfinite(scanpy_adata.X.data).all()


def test_the_file_does_not_depend_on_how_it_was_cut_in_pieces(pbmc, tmp_path):
    written(tmp_path / "one.h5ad", pbmc, (0, 200))
    written(tmp_path / "many.h5ad", pbmc, (0, *range(1, 200, 13), 200))
    one, many = (ad.read_h5ad(tmp_path / name) for name in ("one.h5ad", "many.h5ad"))
    assert same(one.X, many.X)
    pd.testing.assert_frame_equal(one.obs, many.obs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(
        np.int64,
        st.tuples(st.integers(1, 12), st.integers(1, 6)),
        elements=st.one_of(st.just(0), st.integers(0, 2**31 - 1)),
    ),
    st.integers(1, 5),
)
def test_any_counts_come_back(tmp_path, dense, step):
    path = tmp_path / "any.h5ad"
    n_cells, n_genes = dense.shape
    with H5adWriter(path, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]), overwrite=True) as writer:
        for i in range(0, n_cells, step):
            piece = dense[i : i + step]
            obs = pd.DataFrame({"type": [f"t{i}"] * len(piece)}, index=[f"c{i + j}" for j in range(len(piece))])
            writer.append(sparse.csr_matrix(piece), obs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty cells
        read = read_counts(path)
    np.testing.assert_array_equal(read.counts.toarray(), dense)
    assert list(read.obs_names) == [f"c{i}" for i in range(n_cells)]
    assert [str(one) for one in read.obs["type"]] == [f"t{i // step * step}" for i in range(n_cells)]


def test_the_writer_refuses_outputs_it_cannot_write(pbmc, tmp_path):
    path = tmp_path / "out.h5ad"
    path.write_text("precious")
    with pytest.raises(LingshuError, match=r"must not exist yet: .*out\.h5ad does\. Choose another name or allow over"):
        H5adWriter(path, pbmc.var)
    assert path.read_text() == "precious"
    with pytest.raises(LingshuError, match=r"folder of the output must exist: there is no .*absent"):
        H5adWriter(tmp_path / "absent" / "out.h5ad", pbmc.var)
    with pytest.raises(LingshuError, match=r"must be a file: .* is a folder\. Name a file in it"):
        H5adWriter(tmp_path, pbmc.var)
    (tmp_path / "blocked.h5ad.tmp").mkdir()
    with pytest.raises(LingshuError, match=r"must be writable: .*Check the rights and the space on the disk"):
        H5adWriter(tmp_path / "blocked.h5ad", pbmc.var)
    with pytest.raises(LingshuError, match="var_names must be unique: found more than once: 'A'"):
        H5adWriter(tmp_path / "new.h5ad", pd.DataFrame(index=["A", "A"]))
    written(path, pbmc, overwrite=True)
    assert read_counts(path).n_cells == 200


def test_an_error_leaves_the_old_file_and_no_rest(pbmc, tmp_path):
    path = tmp_path / "out.h5ad"
    written(path, pbmc)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), H5adWriter(path, pbmc.var, overwrite=True) as writer:
        writer.append(pbmc.X[:5], pbmc.obs.iloc[:5])
        raise KeyboardInterrupt
    writer = H5adWriter(path, pbmc.var, n_cells=6, overwrite=True)
    writer.append(pbmc.X[:5], pbmc.obs.iloc[:5])
    with pytest.raises(LingshuError, match="must hold all cells: 5 of 6 came"), writer:
        pass
    with pytest.raises(LingshuError, match="must hold all cells: 0 of at least one came"):
        H5adWriter(path, pbmc.var, overwrite=True).close()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.h5ad"]


def test_the_writer_refuses_cells_that_do_not_fit(pbmc, tmp_path):
    obs = pbmc.obs.iloc[:3]
    with H5adWriter(tmp_path / "out.h5ad", pbmc.var) as writer:
        with pytest.raises(LingshuError, match=r"shape \(3, 10\) for 3 rows of obs and 1500 genes"):
            writer.append(pbmc.X[:3, :10], obs)
        with pytest.raises(LingshuError, match=r"shape \(4, 1500\) for 3 rows of obs"):
            writer.append(pbmc.X[:4], obs)
        with pytest.raises(LingshuError, match="must be integer counts, 0 or more: dtype float32"):
            writer.append(pbmc.X[:3].astype(np.float32), obs)
        with pytest.raises(LingshuError, match="must be integer counts, 0 or more: dtype int32, smallest -"):
            writer.append(-pbmc.X[:3], obs)
        writer.append(pbmc.X[:3], obs)
        with pytest.raises(LingshuError, match=r"obs_names must be unique: .*\(3\)"):
            writer.append(pbmc.X[:3], obs)
        with pytest.raises(LingshuError, match=r"same obs columns: 'donor' .* after 'cell_type'"):
            writer.append(pbmc.X[3:4], pd.DataFrame({"donor": ["a"]}, index=["x"]))
    assert read_counts(tmp_path / "out.h5ad").n_cells == 3
