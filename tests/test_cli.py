"""The command line, run from a shell on real cells: results, exit codes, one line for every mistake, Ctrl-C, resume."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import real_cells

from lingshu_cell import __version__, cli
from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import load_config
from lingshu_cell.errors import LingshuError

QUICK = {
    "network.width": 32, "network.gene_width": 8, "network.n_blocks": 1, "network.feedforward_width": 32,
    "training.minibatch_size": 32, "training.warmup_steps": 5, "training.validate_every": 5,
    "training.checkpoint_every": 10, "training.device": "cpu", "generation.tile_size": 16,
}  # fmt: skip
STEPS = 20


def quick(steps: int) -> list[str]:
    return [word for key, value in {**QUICK, "training.steps": steps}.items() for word in ("--set", f"{key}={value}")]


def lingshu(*words: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lingshu_cell", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(*words: object, cwd: Path, code: int = 0) -> tuple[str, str]:
    """Run a command to its end; gives stdout and stderr."""
    process = lingshu(*words, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


@pytest.fixture
def main(capsys, monkeypatch, workplace):
    """Call the program in this process, for mistakes that need no shell; gives the exit code and what it printed."""
    monkeypatch.chdir(workplace)
    logger, show = logging.getLogger("lingshu_cell"), warnings.showwarning
    handlers, level = list(logger.handlers), logger.level

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return int(end.value.code), printed.out, printed.err

    yield call
    logger.handlers, warnings.showwarning = handlers, show
    logger.setLevel(level)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with 300 training cells, 160 held-out cells, other data, and a run trained by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    cells = real_cells(460, 2000)
    cells.obs_names = [f"cell-{i}" for i in range(cells.n_obs)]
    rows = np.random.default_rng(0).permutation(cells.n_obs)
    cells[rows[:300]].copy().write_h5ad(folder / "cells.h5ad")
    cells[rows[300:]].copy().write_h5ad(folder / "heldout.h5ad")
    log = cells[rows[:50]].copy()
    log.X = log.X.astype(np.float32).log1p()
    log.write_h5ad(folder / "log.h5ad")
    (folder / "text.h5ad").write_text("no cells here")
    out, err = run("train", "cells.h5ad", "--out", "run", *quick(STEPS), "--json", cwd=folder)
    (folder / "train.json").write_text(out)
    (folder / "train.err").write_text(err)
    return folder


def test_train_tells_one_object_and_progress_apart(workplace):
    told = json.loads((workplace / "train.json").read_text())
    assert set(told) == {
        "run", "preset", "step", "steps", "interrupted", "validation_nelbo_nats_per_cell", "condition_keys", "notes",
        "seconds",
    }  # fmt: skip
    assert (told["run"], told["step"], told["steps"], told["interrupted"]) == ("run", STEPS, STEPS, False)
    assert told["condition_keys"] == ["cell_type"] and told["validation_nelbo_nats_per_cell"] > 0
    progress = (workplace / "train.err").read_text()
    assert "conditioned on cell_type" in progress and f"step {STEPS} of {STEPS}" in progress
    assert "cells/s" in progress and "left" in progress


def test_generate_writes_what_was_asked_for(workplace):
    words = ("generate", "run", "--n", 40, "--steps", 8, "--schedule", "geometric", "--seed", 3)
    words += ("--condition", "cell_type=B cells")
    told = json.loads(run(*words, "--out", "b.h5ad", "--json", cwd=workplace)[0])
    assert told.pop("seconds") > 0
    assert told == {
        "out": "b.h5ad", "n_cells": 40, "n_genes": 2000, "condition": {"cell_type": "B cells"}, "steps": 8,
        "schedule": "geometric", "seed": 3,
    }  # fmt: skip
    made = ad.read_h5ad(workplace / "b.h5ad")
    assert made.shape == (40, 2000) and (made.obs["cell_type"] == "B cells").all()
    assert made.X.dtype == np.int32 and made.X.sum() > 0
    assert list(made.var_names) == list(ad.read_h5ad(workplace / "cells.h5ad").var_names)


def test_python_generates_the_same_cells(workplace):
    from lingshu_cell import LingshuCell

    out, _ = run("generate", "run", "--n", 20, "--steps", 4, "--out", "again.h5ad", cwd=workplace)
    assert "again.h5ad: 20 cells x 2,000 genes" in out
    made = LingshuCell.load(workplace / "run", device="cpu").generate(20, steps=4)
    assert (ad.read_h5ad(workplace / "again.h5ad").X != made.X).nnz == 0


def test_evaluate_and_report(workplace):
    run("generate", "run", "--n", 120, "--steps", 8, "--out", "generated.h5ad", cwd=workplace)
    words = ("--real", "heldout.h5ad", "--generated", "generated.h5ad", "--training", "cells.h5ad", "--run", "run")
    out, _ = run("evaluate", *words, "--out", "judged", "--splits", 1, "--json", cwd=workplace)
    told = json.loads(out)
    assert told["metrics"] == json.loads((workplace / "judged" / "metrics.json").read_text())
    for entry in told["metrics"].values():
        assert {"value", "real_vs_real", "better", "unit"} <= set(entry)
    assert told["metrics"]["gene_mean_pearson"]["value"] > 0.8
    assert told["metrics"]["nelbo_nats_per_cell"]["value"] > 0
    page = json.loads(run("report", "judged", "--json", cwd=workplace)[0])["report"]
    assert "<html" in (workplace / page).read_text(encoding="utf-8")
    assert (workplace / "judged" / "history.csv").read_bytes() == (workplace / "run" / "history.csv").read_bytes()


def test_info_says_what_the_model_is(main):
    code, out, _ = main("info", "run", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["step"] == STEPS and facts["finished"] and facts["n_genes"] == 2000
    assert "B cells" in facts["conditions"]["cell_type"] and facts["config"]["training"]["steps"] == STEPS
    code, text, _ = main("info", "run")
    assert code == 0 and f"step {STEPS} of {STEPS}" in text and "2,000" in text


def test_ctrl_c_saves_and_resume_completes(workplace):
    steps = 120
    words = ("train", "cells.h5ad", "--out", "stopped")
    process = lingshu(*words, *quick(steps), cwd=workplace)
    history = workplace / "stopped" / "history.csv"
    deadline = time.monotonic() + 120
    while not list(history.parent.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # it holds its run folder meanwhile
    try:
        _, err = run(*words, "--resume", cwd=workplace, code=2)
        assert "error: One run folder belongs to one training at a time: stopped is in use." in err
        _, err = run(*words, *quick(steps), cwd=workplace, code=2)
        assert "error: A new run needs a new folder: stopped exists. Pass --resume, or another --out." in err
    finally:
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "go on with --resume" in out
    stopped_at = load_checkpoint(workplace / "stopped").step
    assert 10 <= stopped_at < steps and not list((workplace / "stopped").glob(".*.tmp"))
    load_checkpoint(workplace / "stopped").tensors("weights")
    out, _ = run(*words, "--resume", "--json", cwd=workplace)  # the settings are those of the run
    told = json.loads(out)
    assert told["step"] == told["steps"] == steps and not told["interrupted"]
    rows = [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]
    assert rows == list(range(5, steps + 1, 5))


def test_ctrl_c_while_generating_leaves_no_file(workplace):
    process = lingshu("generate", "run", "--n", 500_000, "--out", "never.h5ad", cwd=workplace)
    deadline = time.monotonic() + 120
    while not (workplace / "never.h5ad.tmp").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(1)  # let it compute
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "stopped by Ctrl-C" and out == ""
    assert not list(workplace.glob("never*"))


MISTAKES = {
    "no such file": (["train", "nope.h5ad", "--out", "x"], "error: The data file must exist: there is no nope.h5ad."),
    "no h5ad": (["train", "text.h5ad", "--out", "x"], "error: The data file must be an AnnData (.h5ad or .zarr): text"),
    "log-normalised": (["train", "log.h5ad", "--out", "x"], "error: Counts must be integers: X looks log-normalised"),
    "unknown key": (
        ["train", "cells.h5ad", "--out", "x", "--set", "training.stepz=3"],
        "error: Every setting must be known: 'training.stepz'.",
    ),
    "unknown section": (
        ["train", "cells.h5ad", "--out", "x", "--set", "trainin.steps=3"],
        "error: Every setting must be known: 'trainin'.",
    ),
    "value out of range": (
        ["train", "cells.h5ad", "--out", "x", "--set", "training.steps=0"],
        "error: Every setting must have a valid value: training.steps = 0",
    ),
    "no setting": (["train", "cells.h5ad", "--out", "x", "--set", "steps"], "error: A setting must read section.key="),
    "no preset": (["train", "cells.h5ad", "--out", "x", "--preset", "big"], "error: The preset must exist: 'big'."),
    "no config file": (
        ["train", "cells.h5ad", "--out", "x", "--config", "no.toml"],
        "error: The configuration must be",
    ),
    "no such column": (
        ["train", "cells.h5ad", "--out", "x", "--condition-key", "donor"],
        "error: Keys must be obs columns: there is no 'donor' (1). Available: 'cell_type' (1).",
    ),
    "conditions and none": (
        ["train", "cells.h5ad", "--out", "x", "--condition-key", "cell_type", "--no-conditions"],
        "error: Conditions are given or not",
    ),
    "nothing to resume": (["train", "cells.h5ad", "--out", "new", "--resume"], "error: --resume needs a run to go on"),
    "other preset": (
        ["train", "cells.h5ad", "--out", "run", "--resume", "--preset", "paper"],
        "error: A resumed run keeps its preset: it has 'small', not 'paper'.",
    ),
    "other settings": (
        ["train", "cells.h5ad", "--out", "run", "--resume", "--set", "training.steps=500"],
        "error: A resumed run needs the data and settings it began with: changed: 'training.steps' (1).",
    ),
    "other data": (
        ["train", "heldout.h5ad", "--out", "run", "--resume"],
        "error: A resumed run needs the data and settings it began with: changed: 'the data' (1).",
    ),
    "run exists": (["train", "cells.h5ad", "--out", "run"], "error: A new run needs a new folder: run exists."),
    "no run": (["generate", "nowhere", "--n", "3", "--out", "x.h5ad"], "error: A run folder must hold a checkpoint"),
    "unknown condition": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--condition", "donor=A"],
        "error: Conditions must be those of the model: 'donor' (1) is not one of its fields.",
    ),
    "unknown label": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--condition", "cell_type=Neuron"],
        "error: Conditions must be among those the model was trained on: cell_type has no 'Neuron' (1).",
    ),
    "no pair": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--condition", "B cells"],
        "error: A condition must read KEY=VALUE: 'B cells'.",
    ),
    "given twice": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--condition", "cell_type=A", "--condition", "cell_type=B"],
        "error: A condition has one value: cell_type is given twice.",
    ),
    "no cells": (["generate", "run", "--n", "0", "--out", "x.h5ad"], "error: Invalid value for '--n'"),
    "too many steps": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--steps", "99999"],
        "error: The number of steps must lie between 1 and the number of genes",
    ),
    "output exists": (["generate", "run", "--n", "3", "--out", "cells.h5ad"], "error: The output must not exist yet"),
    "no schedule": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--schedule", "linear"],
        "error: The schedule must exist: 'linear'.",
    ),
    "no device": (
        ["generate", "run", "--n", "3", "--out", "x.h5ad", "--device", "abacus"],
        "error: The device must be usable: 'abacus'.",
    ),
    "no evaluation": (["report", "run"], "error: "),
    "no option": (["train", "cells.h5ad", "--out", "x", "--sett", "a"], "error: No such option: --sett"),
    "no command": (["trian"], "error: No such command 'trian'"),
    "no argument": (["train"], "error: Missing argument 'DATA.h5ad…'"),
    "no out": (["train", "cells.h5ad"], "error: Missing option '--out'"),
    "demo into a folder of one's own": (["demo", "--out", ".", "--overwrite"], "error: The demo needs a new folder: ."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(main, mistake, workplace):
    words, expected = MISTAKES[mistake]
    before = sorted(workplace.rglob("*"))
    code, out, err = main(*words)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(expected) and err.splitlines()[-1] == lines[0]
    assert set(sorted(workplace.rglob("*"))) - set(before) <= {workplace / "x", workplace / "run" / ".lock"}
    assert not (workplace / "x").exists() or not any((workplace / "x").iterdir())


def test_a_mistake_from_a_shell_leaves_code_2_and_one_line(workplace):
    out, err = run("train", "log.h5ad", "--out", "y", "--no-conditions", cwd=workplace, code=2)
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: Counts must be integers")


def damaged_by(cause):
    """What readers make of an error of the library that reads."""
    try:
        try:
            raise cause
        except KeyError as error:
            raise LingshuError("The file must be whole", str(error), "Write it again") from error
    except LingshuError as error:
        return error


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            OSError(28, "No space left on device"),
            2,
            "error: Files must be readable and the disk must have space: [Errno 28]",
        ),
        (MemoryError(), 1, "error: Memory must suffice: it ran out."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
            1,
            "error: Memory must suffice",
        ),
        (
            damaged_by(KeyError("Unable to synchronously open object (memory allocation failed for chunk)")),
            1,
            "error: Memory must suffice: 'Unable to synchronously open object (memory allocation failed for chunk)'.",
        ),
        (damaged_by(KeyError("X")), 2, "error: The file must be whole: 'X'."),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_trouble_with_the_machine_is_one_line(main, monkeypatch, error, code, expected):
    def fail(run: Path) -> None:
        raise error

    monkeypatch.setattr("lingshu_cell.model.run_info", fail)
    found, out, err = main("info", "run")
    assert found == code and out == "" and len(err.splitlines()) == 1 and err.startswith(expected)


def test_faults_of_the_program_keep_their_traceback(monkeypatch, workplace):
    def fail(run: Path) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("lingshu_cell.model.run_info", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["info", "run"])


def test_printed_configuration_reads_back_the_same(main, tmp_path):
    for preset in ("small", "paper", "paper-s32"):
        code, out, _ = main("config", "--preset", preset, "--set", "training.steps=77", "--set", 'data.layer="a b"')
        (tmp_path / "my.toml").write_text(out)
        assert code == 0 and tomllib.loads(out)["training"]["steps"] == 77
        read = load_config(None, tmp_path / "my.toml")
        assert read == load_config(preset, settings=["training.steps=77", 'data.layer="a b"'])
        assert "condition_keys" not in read.data.model_fields_set  # so cell_type may still be found by itself
    code, out, _ = main("config", "--json")
    assert code == 0 and json.loads(out) == load_config("small").model_dump(mode="json")


def test_a_preset_in_a_file_is_meant_and_not_contradicted(main, tmp_path):
    (tmp_path / "my.toml").write_text('preset = "paper"\n[training]\nsteps = 5\n')
    code, out, _ = main("config", "--config", tmp_path / "my.toml", "--json")
    read = json.loads(out)
    assert code == 0 and read["network"]["kind"] == "transformer" and read["training"]["steps"] == 5
    code, _, err = main("config", "--config", tmp_path / "my.toml", "--preset", "small")
    assert code == 2 and err.startswith("error: There is one preset: 'small' asked for, 'paper' in")


def test_help_and_version_come_at_once(workplace):
    started = time.monotonic()
    out, _ = run("--help", cwd=workplace)
    seconds = time.monotonic() - started
    for command in ("train", "generate", "evaluate", "report", "info", "config", "demo"):
        assert command in out
    assert run("--version", cwd=workplace)[0] == f"lingshu-cell {__version__}\n"
    code = "import sys, lingshu_cell.cli; print({'torch', 'anndata', 'scanpy', 'pandas', 'numpy'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == "set()\n"
    assert seconds < 5  # below 1 s on an idle machine


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "report", "info", "config", "demo"])
def test_every_help_has_an_example(main, command):
    code, out, _ = main(command, "--help")
    assert code == 0 and "Examples" in out and out.count(f"lingshu {command}") > 1
