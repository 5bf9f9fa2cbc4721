"""Cells in shards: the same bytes whoever makes them and whatever is killed, one request a folder, read by anything."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from lingshu_cell.claims import Claims
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.cell_folder import is_cell_folder, read_manifest, shard_files
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import TrainedModel, generate, load_model
from lingshu_cell.generate_shards import generate_folder
from lingshu_cell.metrics.folder import provenance
from lingshu_cell.wanted_cells import WantedRow, cut_into_shards, read_wanted_cells

SHARD_CELLS = 16  # two tiles
CELLS = (WantedRow({}, 100, 7), WantedRow({"cell_type": "B cells"}, 30, 8, "few"), WantedRow({}, 110, 9, "more"))


@pytest.fixture(scope="module")
def model(trained_run) -> TrainedModel:
    return load_model(trained_run)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Path:
    """240 cells in 16 shards, made by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "cells"
    assert generate_folder(model, CELLS, out, shard_cells=SHARD_CELLS).n_made == 240
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(run: Path, out: Path, ready) -> None:
    """Be one of several processes."""
    trained = load_model(run)
    ready.set()
    generate_folder(trained, CELLS, out, shard_cells=SHARD_CELLS, minibatch_size=random.choice([1, 16, 100]))


@pytest.fixture(scope="module")
def processes(trained_run):
    """Start processes that fill a folder, forked off a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lingshu_cell.generate_shards", "test_generate_shards"])

    def start(n: int, out: Path) -> list[multiprocessing.Process]:
        events = [context.Event() for _ in range(n)]
        started = [context.Process(target=fill, args=(trained_run, out, event)) for event in events]
        for process in started:
            process.start()
        for event in events:
            assert event.wait(120)
        return started

    return start


def test_kills_at_any_moment_leave_the_bytes_of_an_undisturbed_run(processes, undisturbed, tmp_path):
    choose, out, n_kills = random.Random(0), tmp_path / "cells", 0
    while n_kills < 8:
        started = processes(choose.choice([1, 2, 3]), out)
        time.sleep(choose.uniform(0, 0.1))
        for process in started:
            n_kills += process.is_alive()
            process.kill()
            process.join()
    unfinished = not (out / "manifest.json").exists()
    for process in processes(2, out):
        process.join(120)
        assert process.exitcode == 0
    assert unfinished and content(out) == content(undisturbed)


def test_the_rest_of_a_killed_process_is_done_by_one_that_waits_for_it(processes, undisturbed, tmp_path):
    """A stopped process holds its claim: others do all else and wait; killed, it frees the claim and they go on."""
    out = tmp_path / "cells"
    holder = processes(1, out)[0]
    while not list(out.glob(".work/shard-*")):
        assert holder.is_alive()
        time.sleep(0.001)
    os.kill(holder.pid, signal.SIGSTOP)
    other, n_others = processes(1, out)[0], len(shard_files(undisturbed)) - 1
    deadline = time.monotonic() + 60
    while len(list(out.glob("shards/*.json"))) < n_others and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert other.is_alive() and len(list(out.glob("shards/*.json"))) == n_others
    holder.kill()
    holder.join()
    other.join(60)
    assert other.exitcode == 0 and content(out) == content(undisturbed)


def test_a_claim_is_held_by_one_process_and_freed_by_its_end(tmp_path):
    code = "import sys; from pathlib import Path; from lingshu_cell.claims import Claims\n"
    code += "c = Claims(Path(sys.argv[1])); print(c.take(3), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "claims")]
    with Claims(tmp_path / "claims") as claims:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "True\n"
        assert not claims.take(3) and claims.take(4)
        holder.kill()
        holder.wait()
        assert claims.take(3)


def test_a_folder_holds_the_cells_of_a_file(model, undisturbed):
    whole = read_counts(undisturbed)
    for row, start in ((CELLS[0], 0), (CELLS[1], 100), (CELLS[2], 130)):
        alone = generate(model, row.n_cells, condition=row.condition, seed=row.seed)
        here = slice(start, start + row.n_cells)
        np.testing.assert_array_equal(whole.counts[here].toarray(), alone.X.toarray())
        np.testing.assert_array_equal(whole.obs["seed"][here], alone.obs["seed"])
        assert list(whole.obs["cell_type"][here].astype(str)) == list(alone.obs["cell_type"].astype(str))
    assert whole.n_cells == whole.obs_names.nunique() == 240
    assert whole.obs_names[0] == "generated-7-0" and whole.obs_names[100] == "few-0"
    assert provenance(undisturbed)["n_cells"] == SHARD_CELLS


def test_others_read_the_shards_lazily(undisturbed, tmp_path):
    """What docs/generation.md says of anndata."""
    from anndata.experimental import AnnCollection, concat_on_disk

    whole, files = read_counts(undisturbed), shard_files(undisturbed)
    lazily = AnnCollection([ad.read_h5ad(file, backed="r") for file in files], join_vars="inner", index_unique=None)
    assert lazily.shape == (240, 150)
    np.testing.assert_array_equal(lazily[90:140].X.toarray(), whole.counts[90:140].toarray())
    concat_on_disk(files, tmp_path / "whole.h5ad", merge="first")
    joined = ad.read_h5ad(tmp_path / "whole.h5ad")
    np.testing.assert_array_equal(joined.X.toarray(), whole.counts.toarray())
    assert list(joined.obs_names) == list(whole.obs_names) and list(joined.var["modelled"]) == list(
        whole.var["modelled"]
    )


def test_another_request_is_refused(model, undisturbed):
    before = content(undisturbed)
    for settings, finding in (
        ({"steps": 4}, "other 'schedule'"),
        ({"shard_cells": 32}, r"other 'shard_cells' \(1\) \(16, now 32\)"),
        ({"rows": CELLS[:2]}, "other 'rows'"),
    ):
        asked = {"rows": CELLS, "shard_cells": SHARD_CELLS, **settings}
        with pytest.raises(LingshuError, match=f"A folder holds the cells of one request: .* {finding}"):
            generate_folder(model, out=undisturbed, **asked)
    assert content(undisturbed) == before


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LingshuError, match=r"Shards of cells need a folder of their own: .* holds notes.txt"):
        generate_folder(model, CELLS, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_row_that_cannot_be_asked_for_leaves_nothing_behind(model, tmp_path):
    with pytest.raises(LingshuError, match="Neuron"):
        generate_folder(model, [*CELLS, WantedRow({"cell_type": "Neuron"}, 3, 1, "x")], tmp_path / "cells")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no record"])
def test_damaged_shards_are_never_read_and_made_anew(model, undisturbed, tmp_path, damage):
    out = tmp_path / "cells"
    shutil.copytree(undisturbed, out)
    shard = out / "shards" / "shard-000003.h5ad"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: shard.write_bytes(data),
        "cut": lambda: shard.write_bytes(data[:-100]),
        "gone": shard.unlink,
        "no record": lambda: (shard.with_suffix(".json").write_text("{}"), shard.write_bytes(data)),
    }[damage]()
    with pytest.raises(LingshuError, match=r"must be whole: .*shard-000003.h5ad is missing"):
        read_counts(out)
    made = generate_folder(model, CELLS, out, shard_cells=SHARD_CELLS)
    assert made.n_made == SHARD_CELLS and content(out) == content(undisturbed)


def test_an_unfinished_folder_and_a_changed_manifest_are_not_read(undisturbed, tmp_path):
    out = tmp_path / "cells"
    shutil.copytree(undisturbed, out)
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-000000.h5ad", "../../outside.h5ad"))
    assert is_cell_folder(out)
    with pytest.raises(LingshuError, match="does not match its checksum"):
        read_manifest(out)
    manifest.unlink()
    with pytest.raises(LingshuError, match="is not finished"):
        read_counts(out)


def test_a_file_system_without_locks_costs_work_not_cells(model, undisturbed, tmp_path, monkeypatch):
    """Another process makes a shard while this one does: the bytes are the same, so nothing is wrong."""
    monkeypatch.setattr(Claims, "take", lambda self, number: True)
    out, raced = tmp_path / "cells", []
    import lingshu_cell.generate_shards as module

    real = module._Worker._write

    def race(worker, number, pieces):
        if number == 2 and not raced:
            raced.append(number)
            other = module._Worker(model, worker._folder, worker._planned, worker._shards)
            draft = real(other, number, pieces)  # removes our draft, and keeps its own
            raise FileNotFoundError(2, "the draft is gone", str(draft))
        return real(worker, number, pieces)

    monkeypatch.setattr(module._Worker, "_write", race)
    generate_folder(model, CELLS, out, shard_cells=SHARD_CELLS)
    assert raced and content(out) == content(undisturbed)


def table(folder: Path, text: str) -> Path:
    (folder / "wanted.csv").write_text(text)
    return folder / "wanted.csv"


def test_a_rows_cells_do_not_depend_on_other_rows(model, tmp_path):
    fields = list(model.conditions.fields)
    long = read_wanted_cells(table(tmp_path, "cell_type,n\nB cells,20\n,9\nNK cells,33\n"), fields, 5)
    short = read_wanted_cells(table(tmp_path, "n,cell_type\n40,NK cells\n"), fields, 5)
    assert [row.n_cells for row in long] == [20, 9, 33] and long[1].condition == {}
    assert (long[2].seed, long[2].name) == (short[0].seed, short[0].name)
    assert len({row.seed for row in long}) == 3
    assert read_wanted_cells(tmp_path / "wanted.csv", fields, 6)[0].seed != short[0].seed
    for rows, name in ((long, "long"), (short, "short")):
        generate_folder(model, rows, tmp_path / name, shard_cells=SHARD_CELLS)
    one, other = read_counts(tmp_path / "long"), read_counts(tmp_path / "short")
    np.testing.assert_array_equal(one.counts[29:].toarray(), other.counts[:33].toarray())
    assert list(one.obs_names[29:]) == list(other.obs_names[:33])
    assert (one.obs["cell_type"][29:] == "NK cells").all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no row"),
        ("cell_type,n\n", "has no row"),
        ("donor,n\nA,3\n", "unknown: 'donor'"),
        ("n,n\n1,2\n", "hold some twice"),
        ("cell_type,n\nB cells\n", "other numbers of values than columns in row 1"),
        ("cell_type,n\nB cells,0\n", "The number of cells must lie between 1"),
        ("cell_type,n\nB cells,1e3\n", "must be a whole number"),
        ("cell_type,n\nB cells,99999999999\n", "must lie between"),
        ("cell_type,n\nB cells,\n", "Every row must say how many cells"),
        ("cell_type,n\nB cells,3\nB cells,4\n", "rows 1 and 2 do"),
        ("n,dose\n3,much\n", "A dose must be a number"),
        ("\x00", "unknown"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, text, words):
    with pytest.raises(LingshuError, match=words):
        read_wanted_cells(table(tmp_path, text), ["cell_type"], 0)


def test_shards_hold_every_cell_once_and_cut_rows_between_tiles():
    choose = random.Random(1)
    for _ in range(200):
        tile = choose.choice([2, 8, 64])
        most = tile * choose.randint(1, 5) + choose.randint(0, tile - 1)
        rows = [WantedRow({}, choose.randint(1, 6 * most), 0) for _ in range(choose.randint(1, 9))]
        shards = cut_into_shards(rows, most, tile)
        pieces = [piece for shard in shards for piece in shard]
        assert all(sum(piece.n_cells for piece in shard) <= most for shard in shards)
        assert all(piece.first % tile == 0 and piece.n_cells > 0 for piece in pieces)
        held = [(piece.row, i) for piece in pieces for i in range(piece.first, piece.first + piece.n_cells)]
        assert held == [(number, i) for number, row in enumerate(rows) for i in range(row.n_cells)]
        assert len(shards) <= 2 * sum(row.n_cells for row in rows) / (most - tile + 1) + 1 or most < 2 * tile


def test_the_command_fills_a_folder_with_one_process_killed(trained_run, tmp_path):
    table(tmp_path, "cell_type,n\nB cells,20\nNK cells,30\n")
    words = ["generate", str(trained_run), "--requests", "wanted.csv", "--out", "cells", "--processes", "2"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lingshu_cell", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("cells: 50 cells x 150 genes in 1 shards")
    assert "process 0 of 2 ended early (SIGKILL); the others did its work" in err
    assert read_counts(tmp_path / "cells").n_cells == 50


def test_an_export_takes_the_folder(model, tmp_path):
    from lingshu_cell.export_vcc2026 import write_vcc2026

    generate_folder(model, [WantedRow({"cell_type": "B cells"}, 40, 1)], tmp_path / "cells", shard_cells=SHARD_CELLS)
    whole = read_counts(tmp_path / "cells")
    labels = {"target_key": "cell_type", "context_key": "cell_type", "control": "none"}
    rules = {"cells_per_condition": 40, "n_genes": 150, "check": False}
    made = write_vcc2026([tmp_path / "cells"], tmp_path / "export.h5ad", list(whole.gene_names), **labels, **rules)
    exported = ad.read_h5ad(made.path)
    np.testing.assert_array_equal(exported.X.toarray(), whole.counts.toarray())
    assert list(exported.obs_names) == list(whole.obs_names)
