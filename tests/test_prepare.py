"""Preparing a store: killed anywhere it goes on to the same bytes, a full disk is said, and nothing is done twice."""

import errno
import os
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from conftest import SHARED_DATA, real_cells
from forks import in_child

from lingshu_cell.data import sources, store_builder, store_writer
from lingshu_cell.data.quality import QualityRules
from lingshu_cell.data.store import open_store
from lingshu_cell.errors import LingshuError
from lingshu_cell.prepare import NameTables, data_set_names, examine, joint_list, prepare, split_pair

SHARD = 40
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two data sets of 100 and 90 real cells."""
    folder = tmp_path_factory.mktemp("files")
    adata = real_cells(190, 60)
    adata[:100].copy().write_h5ad(folder / "one.h5ad")
    adata[100:, 5:].copy().write_h5ad(folder / "two.h5ad")
    return [folder / "one.h5ad", folder / "two.h5ad"]


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    prepare(files, out, cells_per_shard=SHARD)
    return out


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many chunks and flushes, as if the files were large."""
    monkeypatch.setattr(sources, "CHUNK_CELLS", 30)
    monkeypatch.setattr(store_builder, "_FLUSH_BYTES", 4_000)


def killing(module: Any, name: str, at: int, before: bool) -> None:
    """Make the ``at``-th call of a function the last thing this process does."""
    original, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, counted)


def test_killed_at_any_rename_it_goes_on_to_the_same_store(files, undisturbed, tmp_path):
    expected = open_store(undisturbed).fingerprint
    n_killed = 0
    for at in range(1, 200):
        out = tmp_path / f"killed-{at}"

        def killed(out: Path = out, at: int = at) -> None:
            killing(os, "replace", at, before=at % 2 == 0)
            prepare(files, out, cells_per_shard=SHARD)

        code = in_child(killed)
        if code == 0:
            break
        assert code == KILLED
        n_killed += 1
        prepare(files, out, cells_per_shard=SHARD)
        store = open_store(out, verify=True)
        assert store.fingerprint == expected
        assert not (out / ".work").exists()
        shutil.rmtree(out)
    assert n_killed >= 25


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
def test_killed_while_it_appends_it_goes_on(files, undisturbed, tmp_path, at):
    out = tmp_path / "store"

    def killed() -> None:
        killing(store_writer.Buckets, "_append", at, before=False)
        prepare(files, out, cells_per_shard=SHARD)

    def killed_again() -> None:
        killing(store_writer, "write_shard", 1, before=False)
        killing(store_builder, "write_shard", 1, before=False)
        prepare(files, out, cells_per_shard=SHARD)

    assert in_child(killed) == KILLED and in_child(killed_again) == KILLED
    with pytest.raises(LingshuError, match="A store must be finished"):
        open_store(out)
    notes: list[str] = []
    prepare(files, out, cells_per_shard=SHARD, on_note=notes.append)
    assert any("going on where it stopped" in note for note in notes)
    assert open_store(out, verify=True).fingerprint == open_store(undisturbed).fingerprint


@pytest.mark.parametrize("kilobytes", [3, 9, 30])
def test_a_full_disk_is_said_and_can_be_mended(files, undisturbed, tmp_path, kilobytes, capfd):
    out = tmp_path / "store"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
        prepare(files, out, cells_per_shard=SHARD)

    assert in_child(limited) == 2
    said = capfd.readouterr().err
    assert "The disk must have space for the store" in said and os.strerror(errno.EFBIG) in said
    assert "it goes on where it stopped" in said and said.count("\n") == 1
    prepare(files, out, cells_per_shard=SHARD)
    assert open_store(out, verify=True).fingerprint == open_store(undisturbed).fingerprint


def test_too_little_space_is_said_before_anything_is_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(LingshuError, match=r"The disk must have space for the store: about .* MiB are needed"):
        prepare(files, tmp_path / "store")


def test_a_second_run_does_nothing(files, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.h5ad")}
    notes: list[str] = []
    result = prepare(files, undisturbed, cells_per_shard=SHARD, on_note=notes.append)
    assert result.up_to_date and any("nothing to do" in note for note in notes)
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.h5ad")}


def test_other_files_or_settings_are_refused(files, undisturbed, tmp_path):
    for change, words in (
        ({"seed": 1}, "'seed' (1) differ"),
        ({"rules": QualityRules(min_genes=1)}, "'rules' (1) differ"),
        ({"cells_per_shard": 9}, "'cells_per_shard' (1) differ"),
    ):
        with pytest.raises(LingshuError) as caught:
            prepare(files, undisturbed, **{"cells_per_shard": SHARD, **change})
        assert words in str(caught.value) and "The store was made from others" in str(caught.value)
    with pytest.raises(LingshuError, match="'files'"):
        prepare(files[:1], undisturbed, cells_per_shard=SHARD)
    changed = [tmp_path / file.name for file in files]
    for old, new in zip(files, changed, strict=True):
        shutil.copy(old, new)
    assert prepare(changed, undisturbed, cells_per_shard=SHARD).up_to_date  # the same bytes elsewhere
    adata = ad.read_h5ad(changed[0])
    adata.X.data[0] += 1
    adata.write_h5ad(changed[0])
    with pytest.raises(LingshuError, match="'files'"):
        prepare(changed, undisturbed, cells_per_shard=SHARD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(LingshuError, match=r"must be empty: .*thesis\.txt"):
        prepare(files, tmp_path / "full")


def test_two_processes_on_one_store_are_refused(files, tmp_path):
    import fcntl

    (tmp_path / "store").mkdir()
    with open(tmp_path / "store" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LingshuError, match="Only one process may prepare a store"):
            prepare(files, tmp_path / "store")


def test_quality_is_counted_by_rule(files, tmp_path):
    source = ad.read_h5ad(files[0])
    n_genes, total = np.diff(source.X.indptr), np.asarray(source.X.sum(1)).ravel()
    rules = QualityRules(min_genes=int(np.median(n_genes)), min_counts=int(np.median(total)), min_cells_per_gene=20)
    result = prepare(files[:1], tmp_path / "store", rules=rules)
    few, little = n_genes < rules.min_genes, total < rules.min_counts
    told = {"cells": 100, "min_genes": few.sum(), "min_counts": little.sum()}
    assert result.manifest["quality"]["one"] == {
        **told, "dropped": (few | little).sum(), "kept": (~few & ~little).sum()
    }  # fmt: skip
    kept = source[~few & ~little]
    often = np.bincount(kept.X.indices, minlength=60) >= 20
    store = open_store(tmp_path / "store")
    assert list(store.vocabulary.names) == list(source.var_names[often]) and 0 < often.sum() < 60
    assert store.n_cells == kept.n_obs and result.manifest["n_genes_dropped"] == (~often).sum()
    assert store.detected_in().tolist() == np.bincount(kept.X.indices, minlength=60)[often].tolist()
    with pytest.raises(LingshuError, match=r"none of 100 of one\.h5ad does"):
        prepare(files[:1], tmp_path / "none", rules=QualityRules(min_genes=10_000))


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(store_builder, "_FLUSH_BYTES", 100_000)
    monkeypatch.setattr(store_builder, "_PIECE", 1_000)
    peaks = []
    for copies in (2, 12):
        adata = ad.concat([real_cells(200, 150)] * copies, index_unique="-")
        adata.obs = adata.obs[[]]
        adata.write_h5ad(tmp_path / f"{copies}.h5ad")
        tracemalloc.start()
        prepare([tmp_path / f"{copies}.h5ad"], tmp_path / f"store{copies}", cells_per_shard=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = 200 * 10  # more cells
    assert peaks[1] - peaks[0] < 300 * grown  # names and a few numbers, but not the 150 genes of each cell
    assert peaks[1] < 3 * peaks[0]


def test_obs_keys_and_joins(files, tmp_path):
    prepare(files, tmp_path / "a", obs_keys=["cell_type"], join="intersection")
    store = open_store(tmp_path / "a")
    assert store.obs_columns == ("data_set", "species", "cell_type") and store.n_genes == 55
    with pytest.raises(LingshuError, match="there is no 'typo'"):
        prepare(files, tmp_path / "b", obs_keys=["typo"])
    wanted = tmp_path / "genes.txt"
    wanted.write_text("\n".join([*ad.read_h5ad(files[0]).var_names[3:9], "NOWHERE", ""]))
    joined = examine(files, join=joint_list(str(wanted)))
    assert len(joined.vocabulary) == 7 and joined.measured.sum(axis=1).tolist() == [6, 4]


def test_names_of_data_sets(tmp_path):
    paths = [tmp_path / "a/x.h5ad", tmp_path / "b/x.h5ad", tmp_path / "b/y.h5ad"]
    assert data_set_names(paths) == ("a-x", "b-x", "b-y") and data_set_names(paths[1:]) == ("x", "y")
    with pytest.raises(LingshuError, match="given once"):
        data_set_names([paths[0], tmp_path / "a/../a/x.h5ad"])
    assert split_pair("a=b.h5ad=mouse", "FILE=SPECIES") == ("a=b.h5ad", "mouse")
    with pytest.raises(LingshuError, match="must read FILE=SPECIES"):
        split_pair("mouse", "FILE=SPECIES")
    with pytest.raises(LingshuError, match="union, intersection or a list"):
        joint_list("unoin")


def test_real_cells_of_two_species_in_one_store(tmp_path):
    priors = SHARED_DATA / "priors"
    if not priors.is_dir():
        pytest.skip("shared data absent")
    for name in ("pancreas_h2c", "mousebrain_zeisel18"):
        adata = ad.read_h5ad(SHARED_DATA / f"{name}.h5ad")
        some = np.arange(adata.n_obs) % 20 == 0
        if "assay" in adata.obs:
            some |= (adata.obs["assay"] == "CEL-seq2").to_numpy()
        adata[some].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    tables = NameTables(
        priors / "genes/hgnc_complete_set.tsv.gz",
        {"mouse": priors / "genes/genes_mus_musculus.csv.gz"},
        [(None, priors / "orthologs/human2mouse_ensembl_best.csv.gz")],
    )
    paths = [tmp_path / "pancreas_h2c.h5ad", tmp_path / "mousebrain_zeisel18.h5ad"]
    rules = QualityRules(drop_read_counts=True)
    result = prepare(paths, tmp_path / "store", name_tables=tables, rules=rules)
    store = open_store(tmp_path / "store")
    assert store.categories("species") == ("homo_sapiens", "mus_musculus")
    n_reads = (ad.read_h5ad(paths[0]).obs["assay"] == "CEL-seq2").sum()
    assert result.manifest["quality"]["pancreas_h2c"]["read_counts"] == n_reads == 189
    assert "CEL-seq2" not in set(store.obs(columns=["assay"])["assay"].dropna())
    assert store.measured.all(axis=0).sum() > 14_000
    actin = store.vocabulary.index(["ACTB"])[0]
    mouse = ad.read_h5ad(paths[1])
    mine = store.counts(np.flatnonzero(store.data_set == 1))[:, actin]
    assert mine.sum() == mouse[:, "ENSMUSG00000029580"].X.sum() > 0
