"""What is left when the machine fails: kills, full disks, two at once. The campaign is in benchmarks/faults."""

import contextlib
import csv
import errno
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import tiny_config
from forks import in_child

from lingshu_cell import cli
from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.data import hdf5_output
from lingshu_cell.data.anndata_io import H5adWriter, write_adata
from lingshu_cell.data.store import open_store
from lingshu_cell.data.store_files import WORK
from lingshu_cell.data.store_writer import write_array, write_shard
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.metrics.folder import holding_output, write_folder
from lingshu_cell.output_files import (
    Draft,
    discard,
    locked,
    read_checked_json,
    write_atomically,
    write_checked_json,
    write_text,
)
from lingshu_cell.prepare import prepare
from lingshu_cell.train import train

FAULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"
SHARD = 64


def load(name: str) -> Any:
    """Import a file of the campaign that needs nothing else of it."""
    spec = importlib.util.spec_from_file_location(name, FAULTS / "hook" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def killed_at(folder: Path, at: int, action: Callable[[], Any], number: int = signal.SIGKILL) -> int:
    """Run something in a fork that ends itself before its n-th write, rename, removal or flush under a folder."""

    def disturbed() -> None:
        load("fault_hook").install(folder, at, number)
        action()

    return in_child(disturbed)


def small_files(n_bytes: int) -> None:
    """Let no file grow past a size, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.fixture(scope="module")
def files(pbmc: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("faults")
    pbmc[:150].write_h5ad(folder / "one.h5ad")
    pbmc[150:].write_h5ad(folder / "two.h5ad")
    return [folder / "one.h5ad", folder / "two.h5ad"]


@pytest.fixture(scope="module")
def undisturbed(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    prepare(files, store, cells_per_shard=SHARD)
    return store


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 8))
def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path, at):
    file = tmp_path / "a.txt"
    file.write_text("old")
    code = killed_at(tmp_path, at, lambda: write_text(file, "new"))
    assert file.read_text() in ("old", "new")
    assert (code == -signal.SIGKILL) == (at <= 5)  # lock, write, flush, rename, flush
    write_text(file, "newer")
    assert file.read_text() == "newer" and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_flushed_renamed_and_its_folder_flushed(tmp_path):
    events: list[tuple[str, ...]] = []

    def recorded() -> None:
        load("fault_hook").install(tmp_path, None, 0, events)
        write_text(tmp_path / "a.txt", "x")
        sys.stdout.flush()
        (tmp_path.parent / "events.json").write_text(json.dumps(events))

    assert in_child(recorded) == 0
    kinds = [tuple(one) for one in json.loads((tmp_path.parent / "events.json").read_text())]
    assert kinds[-3:] == [("flush", ".a.txt.tmp"), ("rename", ".a.txt.tmp", "a.txt"), ("flush", ".")]


def test_one_file_has_one_writer_and_no_stale_lock(tmp_path):
    file = tmp_path / "a.txt"
    first = Draft(file)
    with pytest.raises(LingshuError, match=r"written by one process at a time: another one is writing .*a\.txt\. Wait"):
        Draft(file)
    first.path.write_text("first")
    first.commit()
    assert file.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / ".a.txt.tmp").write_text("left by a killed process, longer than what is written now")
    write_text(file, "second")
    assert file.read_text() == "second" and os.listdir(tmp_path) == ["a.txt"]


def test_a_draft_that_was_renamed_meanwhile_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Between opening a draft and locking it, its owner may give it its name and let go."""
    file, real_open, owner = tmp_path / "a.txt", os.open, Draft(tmp_path / "a.txt")

    def slow_open(path: Any, *arguments: Any) -> int:
        descriptor = real_open(path, *arguments)
        if Path(path) == owner.path:
            monkeypatch.setattr(os, "open", real_open)
            owner.path.write_text("owner's")
            owner.commit()
        return descriptor

    monkeypatch.setattr(os, "open", slow_open)
    draft = Draft(file)
    draft.path.write_text("ours")
    assert file.read_text() == "owner's"
    draft.commit()
    assert file.read_text() == "ours"


def test_a_lock_goes_with_its_process_and_a_refused_folder_is_not_left_behind(tmp_path):
    folder = tmp_path / "out"
    with locked(folder, "One at a time", "in use", "Wait"):
        assert in_child(lambda: locked(folder, "One at a time", "in use", "Wait").__enter__()) == 2
        (folder / "kept").touch()
    assert os.listdir(folder) == ["kept"]
    with pytest.raises(KeyError), locked(tmp_path / "new", "One at a time", "in use", "Wait"):
        raise KeyError
    assert not (tmp_path / "new").exists()

    def killed() -> None:
        with locked(folder, "One at a time", "in use", "Wait"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL and (folder / ".lock").exists()
    with locked(folder, "One at a time", "in use", "Wait"):
        pass
    assert os.listdir(folder) == ["kept"]


def test_checked_json_shows_every_flipped_bit_and_cut(tmp_path):
    file = tmp_path / "a.json"
    write_checked_json(file, {"n": 12, "x": [1.5, "ä"], "t": (1, 2)})
    assert read_checked_json(file) == {"n": 12, "x": [1.5, "ä"], "t": [1, 2]}
    whole, value = file.read_bytes(), read_checked_json(file)
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with contextlib.suppress(ValueError):
            assert read_checked_json(file) == value  # blanks between values, which mean nothing
    for length in range(len(whole) - 2):  # the last bytes are the brace and an end of line
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_checked_json(file)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_folder_being_removed_is_whole_or_not_there(tmp_path, at):
    folder = tmp_path / "checkpoint-00000001"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    killed_at(tmp_path, at, lambda: discard(folder))
    assert not folder.exists() or len(os.listdir(folder)) == 3


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("how", ["pieces", "whole", "shard"])
def test_hdf5_on_a_full_disk_is_one_error_and_leaves_nothing(pbmc, tmp_path, capfd, how, share):
    file = tmp_path / "a.h5ad"
    counts = pbmc.X.astype(np.int32)

    def pieces() -> None:
        with H5adWriter(file, pbmc.var, overwrite=True) as writer:
            for start in range(0, 240, 40):
                writer.append(counts[start : start + 40], pbmc.obs.iloc[start : start + 40])

    write = {
        "pieces": pieces,
        "whole": lambda: write_adata(file, pbmc),
        "shard": lambda: write_shard(file, counts, pbmc.obs, pbmc.var, {}, {}),
    }[how]
    write()
    size, old = file.stat().st_size, file.read_bytes()

    def starved() -> None:
        small_files(int(share * size))
        write()

    assert in_child(starved) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and os.strerror(errno.EFBIG) in said
    assert file.read_bytes() == old and os.listdir(tmp_path) == ["a.h5ad"]
    write()
    assert file.read_bytes() == old


def test_an_array_on_a_full_disk_says_why(tmp_path, capfd):
    def starved() -> None:
        small_files(1000)
        write_array(tmp_path / "a.npy", np.arange(10_000))

    assert in_child(starved) == 2 and os.strerror(errno.EFBIG) in capfd.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_full_stdout_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lingshu_cell", "config"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: Files must be")


def test_the_output_may_not_be_a_device(pbmc):
    with pytest.raises(LingshuError, match=r"output must be a file: /dev/null is a device or a pipe"):
        H5adWriter("/dev/null", pbmc.var, overwrite=True)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_table_written_again_later_has_the_same_bytes(tmp_path, monkeypatch):
    written = []
    for hour in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda hour=hour: hour)
        write_folder(tmp_path, {"a.csv.gz": pd.DataFrame({"n": [1]})}, {})
        written.append((tmp_path / "a.csv.gz").read_bytes())
    assert written[0] == written[1]
    assert pd.read_csv(tmp_path / "a.csv.gz")["n"].tolist() == [1]


def test_two_that_write_one_folder_are_refused_and_rests_are_removed(tmp_path):
    out = tmp_path / "out"

    @holding_output
    def write(number: int, out: Path) -> None:
        with pytest.raises(LingshuError, match=r"One folder is written by one process at a time: .*out is in use"):
            again(2, out)
        write_folder(out, {"a.csv": pd.DataFrame({"n": [number]})}, {"b.json": {"n": number}}, {"c.txt": "text"})

    @holding_output
    def again(number: int, out: Path) -> None:
        raise AssertionError

    (out / ".partial").mkdir(parents=True)
    (out / ".partial" / "rest").touch()
    write(1, out=out)
    assert sorted(os.listdir(out)) == ["a.csv", "b.json", "c.txt"]
    assert json.loads((out / "b.json").read_text()) == {"n": 1}


# --- training ---------------------------------------------------------------------------------------------------------


def settings(**more: Any) -> Any:
    return tiny_config(
        network={"gene_width": 4, "width": 8, "feedforward_width": 16},
        training={"steps": 6, "checkpoint_every": 2, "validate_every": 2, "minibatch_size": 8, **more},
    )


def train_again(pbmc: ad.AnnData, run: Path) -> None:
    """Train, or go on, as a user would after a crash."""
    resume = any(run.glob("checkpoint-*"))
    train([pbmc], run, settings(), resume=resume)


def rows_without_seconds(history: Path) -> list[dict[str, str]]:
    with open(history, newline="", encoding="utf-8") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


@pytest.mark.filterwarnings("ignore:Cells without any counts")
def test_training_goes_on_after_kills_wherever_they_fall(pbmc, tmp_path):
    wanted = tmp_path / "wanted"
    train([pbmc], wanted, settings())
    expected = load_checkpoint(wanted).manifest["checksum"]
    rng = np.random.default_rng(0)
    n_killed = 0
    for trial in range(3):
        run = tmp_path / f"run-{trial}"
        run.mkdir()
        for _ in range(2):
            n_killed += killed_at(run, int(rng.integers(1, 80)), lambda run=run: train_again(pbmc, run)) == -9
            for checkpoint in run.glob("checkpoint-*"):
                loaded = load_checkpoint(checkpoint)
                for name in loaded.manifest["files"]:
                    loaded.tensors(name.removesuffix(".safetensors"))
        train_again(pbmc, run)
        assert load_checkpoint(run).manifest["checksum"] == expected
        assert {file.name for file in run.iterdir()} == {file.name for file in wanted.iterdir()}
        rows, others = (rows_without_seconds(f / "history.csv") for f in (run, wanted))
        assert rows == others
    assert n_killed >= 3


@pytest.mark.filterwarnings("ignore:Cells without any counts")
def test_broken_rows_of_the_history_are_told_and_left_out(pbmc, tmp_path):
    run = tmp_path / "run"
    train([pbmc], run, settings(steps=2))
    history = run / "history.csv"
    whole = history.read_text()
    history.write_text(whole + "4,12.5")  # a full disk ended the row
    with pytest.warns(UserWarning, match=r"history\.csv: 1 broken rows were left out"):
        train([pbmc], run, settings(steps=2), resume=True)
    assert history.read_text() == whole


# --- an unfinished store ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose preparation was killed when some shards were made."""
    for at in range(110, 20, -10):
        store = tmp_path_factory.mktemp("unfinished") / "store"
        store.mkdir()
        code = killed_at(store, at, lambda store=store: prepare(files, store, cells_per_shard=SHARD))
        if code == -9 and (store / WORK / "journal.json").exists() and len(list(store.glob("shards/*.h5ad"))) > 1:
            return store
    raise AssertionError


def test_a_damaged_unfinished_store_is_refused_or_mended(files, undisturbed, unfinished, tmp_path):
    rng, outcomes = np.random.default_rng(0), {"refused": 0, "mended": 0}
    expected = open_store(undisturbed).fingerprint
    files_there = sorted(path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file())
    for number, file in enumerate(files_there):
        content = (unfinished / file).read_bytes()
        if not content:
            continue
        bit = int(rng.integers(8 * len(content)))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged = bytes(flipped) if number % 2 else content[: len(content) // 2]
        store = tmp_path / "store"
        shutil.copytree(unfinished, store)
        (store / file).write_bytes(damaged)
        try:
            prepare(files, store, cells_per_shard=SHARD)
            assert open_store(store, verify=True).fingerprint == expected, file
            outcomes["mended"] += 1
        except LingshuError as error:
            assert "An unfinished store must be whole" in str(error), file
            outcomes["refused"] += 1
        shutil.rmtree(store)
    assert min(outcomes.values()) >= 1


def test_a_finished_store_that_lost_a_shard_is_not_up_to_date(files, undisturbed, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(undisturbed, store)
    shard = next(store.glob("shards/*.h5ad"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(LingshuError, match=r"A store must be whole: .*bytes"):
        prepare(files, store, cells_per_shard=SHARD)


# --- signals ----------------------------------------------------------------------------------------------------------


def exit_code_of(interrupted: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command whose work is replaced, and leave the handler of SIGTERM as it was."""
    monkeypatch.setattr("lingshu_cell.model.run_info", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["info", "run"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return ended.value.code


def test_sigterm_removes_what_is_unfinished(tmp_path, monkeypatch, capfd):
    def interrupted(run: Path) -> None:
        write_atomically(tmp_path / "a.txt", lambda draft: os.kill(os.getpid(), signal.SIGTERM))

    assert exit_code_of(interrupted, monkeypatch) == 143
    assert capfd.readouterr().err.strip() == "stopped by SIGTERM"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_hdf5_writes_waits_for_it(pbmc, tmp_path, capfd, monkeypatch, number):
    """Raised in the file that HDF5 writes through, an exception would end in a segmentation fault."""

    def stopped() -> None:
        def write(sink: Any, data: Any) -> int:
            events.append("write")
            if len(events) == 2:
                os.kill(os.getpid(), number)
            return real_write(sink, data)

        signal.signal(signal.SIGTERM, cli._terminate)
        events, real_write = [], hdf5_output._Sink.write
        monkeypatch.setattr(hdf5_output._Sink, "write", write)
        try:
            write_adata(tmp_path / "a.h5ad", pbmc)
        except (KeyboardInterrupt, cli._Terminated):
            os._exit(17 if len(events) > 3 else 18)  # it went on writing until the block was done

    assert in_child(stopped) == 17 and not capfd.readouterr().err
    assert not os.listdir(tmp_path)


def test_ctrl_c_is_one_line_from_the_first_moment_on(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as a launcher starts them
    try:
        for seconds in (0.01, 0.05, 0.1, 0.15):  # while it imports; later ones are the campaign's
            command = [
                sys.executable,
                "-m",
                "lingshu_cell",
                "train",
                str(pbmc3k_path()),
                "--out",
                str(tmp_path / "run"),
            ]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=120)
            assert (process.returncode, said.splitlines()[-1]) == (130, "stopped by Ctrl-C"), said
            assert "Traceback" not in said
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("stop", "said", "code"),
    [(KeyboardInterrupt, "stopped by Ctrl-C", 130), (cli._Terminated, "stopped by SIGTERM", 143)],
)
def test_a_stop_that_a_library_took_for_damage_is_still_a_stop(monkeypatch, capfd, stop, said, code):
    def interrupted(run: Path) -> None:
        try:
            try:
                raise stop
            except BaseException as error:
                raise SystemError("returned a result with an exception set") from error  # as h5py's lock does
        except Exception as error:
            raise LingshuError("The data file must be whole", f"a.h5ad is damaged ({error})", "Copy it again") from None

    assert exit_code_of(interrupted, monkeypatch) == code
    assert capfd.readouterr().err.strip() == said
