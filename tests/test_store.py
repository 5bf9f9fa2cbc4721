"""A store holds exactly the cells it was made from, scanpy reads its shards, and damage is seen."""

import json
import pickle
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import real_cells
from scipy import sparse

from lingshu_cell.checksums import checksum
from lingshu_cell.data.store import open_store
from lingshu_cell.data.tokenizer import encode
from lingshu_cell.data.training_set import assemble
from lingshu_cell.errors import LingshuError
from lingshu_cell.prepare import prepare


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two data sets of real cells that share 90 of their genes, one with large counts and a label of its own."""
    folder = tmp_path_factory.mktemp("files")
    adata = real_cells(300, 120)
    one, two = adata[:180, :100].copy(), adata[180:, 10:].copy()
    one.obs["depth"] = np.arange(180) / 7
    two.obs["donor"] = np.where(np.arange(120) % 3, "a", "b")
    two.X = two.X.astype(np.int32)
    two.X.data[7] = 100_000
    one.write_h5ad(folder / "one.h5ad", compression="gzip")
    two.write_h5ad(folder / "two.h5ad")
    return [folder / "one.h5ad", folder / "two.h5ad"]


@pytest.fixture(scope="module")
def built(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    prepare(files, out, cells_per_shard=64)
    return out


def by_name(store_path: Path) -> ad.AnnData:
    """All shards put together by AnnData itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ad.concat([ad.read_h5ad(f) for f in sorted((store_path / "shards").iterdir())], merge="same")


def test_every_cell_is_there_once_with_its_counts_and_labels(built, files):
    whole = by_name(built)
    assert whole.n_obs == 300 and whole.obs_names.is_unique
    store = open_store(built, verify=True)
    assert (store.n_cells, store.n_genes) == (300, 120) == whole.shape
    assert store.data_sets == ("one", "two") and store.measured.sum(axis=1).tolist() == [100, 110]
    assert (store.counts(range(300)) != whole.X).nnz == 0
    for i, file in enumerate(files):
        source = ad.read_h5ad(file)
        mine = whole[[f"{file.stem}:{name}" for name in source.obs_names], source.var_names]
        assert (mine.X != source.X).nnz == 0
        assert (mine.obs["data_set"] == file.stem).all()
        assert list(mine.obs["cell_type"]) == list(source.obs["cell_type"])
        measured = whole.varm["measured"][:, i]
        assert set(whole.var_names[measured]) == set(source.var_names)
        of_set = whole[(whole.obs["data_set"] == file.stem).to_numpy()]
        assert of_set.X[:, np.flatnonzero(~measured)].nnz == 0
    assert whole.obs["donor"].isna().sum() == 180 and np.isnan(whole.obs["depth"]).sum() == 120
    assert {ad.read_h5ad(f).X.dtype for f in (built / "shards").iterdir()} == {np.dtype("u2"), np.dtype("i4")}


def test_the_order_is_shuffled(built):
    store = open_store(built)
    assert 0.2 < (store.data_set[:64] == 0).mean() < 0.95
    names = [name.split(":")[1] for name in by_name(built).obs_names]
    assert names != sorted(names)


def test_any_cells_in_any_order(built):
    store, rng = open_store(built), np.random.default_rng(0)
    whole = store.counts(range(300))
    for cells in (rng.permutation(300), rng.integers(0, 300, 50), np.array([63, 64]), [299], [], range(10, 200, 7)):
        assert (store.counts(cells) != whole[np.asarray(cells, dtype=int)]).nnz == 0
    pieces = list(store.iterate(range(5, 100), chunk_cells=40))
    assert [len(cells) for cells, _ in pieces] == [40, 40, 15]
    assert (sparse.vstack([counts for _, counts in pieces]) != whole[5:100]).nnz == 0
    with pytest.raises(LingshuError, match=r"lie in 0 … 299"):
        store.counts([300])


def test_labels(built):
    store = open_store(built)
    table = by_name(built).obs
    assert list(store.obs()["cell_type"]) == list(table["cell_type"])
    assert np.array_equal(store.obs([7, 3], ["depth"])["depth"], table["depth"].iloc[[7, 3]], equal_nan=True)
    rows = store.condition_rows(["cell_type", "donor"], np.arange(300))
    decoded = store.conditions(["cell_type", "donor"]).decode(rows)
    assert list(decoded["cell_type"]) == list(table["cell_type"])
    assert (decoded["donor"].isna().to_numpy() == table["donor"].isna().to_numpy()).all()
    for call, words in (
        (lambda: store.column("x"), "Available: 'data_set'"),
        (lambda: store.conditions(["depth"]), "numbers"),
    ):
        with pytest.raises(LingshuError, match=words):
            call()


def test_sums_spare_training_a_pass(built):
    store = open_store(built)
    train, validation = store.split(0.2)
    assert (len(train), len(validation)) == (240, 60) and len(store.split(0.2, 10)[1]) == 10
    counts = store.counts(train)
    detected = np.bincount(counts.indices, minlength=120)
    assert (store.detected_in(validation) == detected).all()
    assert (store.modelled_genes(30, validation) == np.flatnonzero(detected >= 30)).all()
    expected = np.zeros((120, 281), dtype=np.int64)
    np.add.at(expected, (counts.indices, encode(counts.data)), 1)
    n_measured = np.bincount(store.data_set[train], minlength=2) @ store.measured
    expected[:, 0] = n_measured - expected.sum(axis=1)
    assert (store.token_counts(validation) == expected).all()
    whole = store.counts(range(300)).tocoo()
    rare = np.bincount(whole.col, minlength=120) <= store.manifest["rare_up_to_cells"]
    triples = {(r, c, v) for r, c, v in zip(whole.row, whole.col, whole.data, strict=True) if rare[c]}
    assert {tuple(row) for row in store.rare_counts().tolist()} == triples and rare.any() and not rare.all()


def test_token_counts_are_those_of_a_training_set(files, tmp_path):
    prepare(files[:1], tmp_path / "store")
    from lingshu_cell.data.anndata_io import read_counts

    training = assemble([read_counts(files[0])], min_cells_per_gene=0, validation_fraction=0)
    assert (open_store(tmp_path / "store").token_counts() == training.token_counts()).all()


def test_a_store_travels_to_other_processes(built):
    store = open_store(built)
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.counts([1, 2]) != store.counts([1, 2])).nnz == 0


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(built, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(built, tmp_path / "copy"))


def rewrite(store: Path, change) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    manifest["checksum"] = checksum(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["shards/shard-000001.h5ad", "arrays/measured.npy", "arrays/token_counts.npy"])
def test_a_flipped_bit_is_seen(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(LingshuError, match=f"A store must be whole: .*{Path(name).name} does not match its checksum"):
        open_store(copy, verify=True)
    with pytest.raises(LingshuError, match="does not match its checksum"):  # also when first read
        store = open_store(copy)
        store.token_counts()
        store.counts(range(300))


def test_cut_off_and_missing_files_are_seen(copy):
    shard = copy / "shards/shard-000002.h5ad"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(LingshuError, match=r"shard-000002\.h5ad has [\d,]+ of [\d,]+ bytes"):
        open_store(copy)
    shard.unlink()
    with pytest.raises(LingshuError, match=r"shard-000002\.h5ad is missing"):
        open_store(copy)


def test_a_shard_that_shrinks_while_open_is_seen(copy):
    store = open_store(copy)
    store.counts([0])
    with open(copy / "shards/shard-000000.h5ad", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(LingshuError, match="shorter than when it was opened"):
        store.counts(range(60))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
            r"names '\.\./\.\./etc/passwd'",
        ),
        (lambda m: m["files"].update({"shards/../x.h5ad": {"bytes": 1, "sha256": ""}}), "names"),
        (lambda m: m.update(format_version=9), "format version 1"),
        (lambda m: m.update(files=[]), "is no manifest"),
        (lambda m: m.pop("genes"), "KeyError"),
        (lambda m: m.update(obs=7), "TypeError"),
        (lambda m: m["genes"].update(names=m["genes"]["names"][:-1]), "Ensembl id|holds bool"),
    ],
)
def test_a_manifest_that_lies_is_refused(copy, change, words):
    rewrite(copy, change)
    with pytest.raises(LingshuError, match=words):
        open_store(copy)


def test_an_edited_manifest_or_none_is_refused(copy, tmp_path):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"n_cells": 300', '"n_cells": 299'))
    with pytest.raises(LingshuError, match="does not match its checksum"):
        open_store(copy)
    (copy / "manifest.json").write_text(text[:-9])
    with pytest.raises(LingshuError, match=r"manifest\.json"):
        open_store(copy)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(LingshuError, match="is no store"):
            open_store(path)
