"""Forecasts follow from a real measurement, agree with what then happens, and refuse what the machine has not."""

import json
import re
from dataclasses import replace

import pytest
from conftest import real_cells, tiny_config

from lingshu_cell import planner
from lingshu_cell.calibration import GenerationCost, OutOfMemory, TrainingCost, measure_generation, measure_training
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import generate_file, load_model
from lingshu_cell.planner import GIB, check, find_minibatch_size, forecast_generation, forecast_training
from lingshu_cell.train import train

TRAINING = TrainingCost(
    n_training_cells=1000, n_modelled_genes=100, n_parameters=10**6, start_seconds=5.0, step_seconds=0.5,
    validation_seconds=2.0, checkpoint_seconds=1.0, curve_seconds=0.25, peak_bytes=GIB, device_bytes=None,
    checkpoint_bytes=20 * 10**6, keeps_best=False,
)  # fmt: skip
GENERATION = GenerationCost(
    start_seconds=3.0, cell_seconds=0.01, cell_bytes=500.0, file_bytes=10_000.0, counts_per_cell=1_000.0,
    peak_bytes=GIB // 2, device_bytes=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def cells_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("planned") / "cells.h5ad"
    real_cells(240, 150).write_h5ad(path)
    return path


def test_training_is_foretold(cells_file, tmp_path):
    config = tiny_config()  # 20 steps, a checkpoint every 10
    cost = measure_training([cells_file], config, tmp_path / "scratch")
    forecast = forecast_training(cost, config)
    assert not list(tmp_path.iterdir())
    train([cells_file], tmp_path / "run", config)
    assert cost.n_training_cells == 192
    kept = sum(f.stat().st_size for d in (tmp_path / "run").glob("checkpoint-*") for f in d.iterdir())
    assert abs(forecast.kept_bytes / kept - 1) < 0.02
    assert 2**27 < cost.peak_bytes < 2**31 and cost.step_seconds > 0


def test_generation_is_foretold(trained_run, tmp_path):
    cost = measure_generation(trained_run, "cpu", {"steps": 4}, tmp_path / "scratch")
    n = 2_000
    path = generate_file(load_model(trained_run), n, tmp_path / "cells.h5ad", steps=4)
    assert abs(forecast_generation(cost, n).disk_bytes / path.stat().st_size - 1) < 0.3
    assert cost.cell_seconds > 0 and [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_memory_that_does_not_suffice_ends_the_measurement_alone(cells_file, tmp_path):
    with pytest.raises(OutOfMemory):
        measure_training([cells_file], tiny_config(), tmp_path / "scratch", most_bytes=1 << 28)
    assert not list(tmp_path.iterdir())


def test_what_a_measurement_refuses_is_said_here(tmp_path):
    with pytest.raises(LingshuError, match="The data file must exist"):
        measure_training([tmp_path / "no.h5ad"], tiny_config(), tmp_path / "scratch")


def test_parts_of_training_add_up():
    config = tiny_config(training={"steps": 100, "validate_every": 30, "checkpoint_every": 50})
    forecast = forecast_training(TRAINING, config)
    assert forecast.seconds == 5 + 100 * 0.5 + 4 * 2 + 2 * 1 + 0.25
    assert (forecast.disk_bytes, forecast.kept_bytes) == (40 * 10**6, 40 * 10**6)
    assert forecast.sizes["steps"] == 100
    long = tiny_config(training={"steps": 4000, "minibatch_size": 32, "checkpoint_every": 1000, "max_seconds": 60})
    limited = forecast_training(replace(TRAINING, keeps_best=True), long, n_processes=3)
    assert limited.seconds == 5 + 60 + 0.25 * 320 / 16  # 4,000 · 32 / 400 cells for the curve
    assert (limited.disk_bytes, limited.kept_bytes) == (80 * 10**6, 60 * 10**6)
    assert limited.memory_bytes == 3 * GIB


def test_parts_of_generation_add_up():
    one = forecast_generation(GENERATION, 10_000)
    assert one.seconds == 3 + 100 and one.disk_bytes == 5_010_000 and one.sizes["files"] == 1
    assert one.memory_bytes == GIB // 2 + 10_000 * 400
    shards = forecast_generation(GENERATION, 10_000, shard_cells=2_048)
    assert shards.disk_bytes == 5_050_000 and shards.sizes["files"] == 5
    assert shards.memory_bytes == GIB // 2 + 2_048 * 1_000 * 24


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"memory_bytes": 10**16}, "Memory must suffice: about 9,313,225.7 GiB will be needed"),
        ({"disk_bytes": 10**18}, "The disk must have space: about 931,322,574.6 GiB will be needed"),
    ],
)
def test_what_the_machine_has_not_is_refused_in_one_line(tmp_path, changed, words):
    forecast = forecast_generation(GENERATION, 1)
    check(forecast, tmp_path / "a" / "b" / "cells.h5ad")
    with pytest.raises(LingshuError, match=re.escape(words)):
        check(replace(forecast, **changed), tmp_path / "cells.h5ad")


def test_the_minibatch_is_halved_until_it_fits(monkeypatch, tmp_path):
    tried = []

    def measured(sources, config, folder, most_bytes):
        tried.append((config.training.minibatch_size, config.training.microbatch_size))
        if config.training.minibatch_size > 64:
            raise OutOfMemory
        return replace(TRAINING, peak_bytes=config.training.minibatch_size << 30)

    monkeypatch.setattr(planner, "measure_training", measured)
    monkeypatch.setattr(planner, "available_memory", lambda: 40 * GIB)
    auto = tiny_config(training={"minibatch_size": "auto"})
    notes: list[str] = []
    found = find_minibatch_size([], tmp_path / "run", auto, notes.append)
    assert tried == [(128, 128), (64, 64), (32, 32)]
    assert found.training.minibatch_size == 32 and found.training.microbatch_size == "auto"
    assert notes == ["minibatches of 32 cells, as memory does not suffice for 128"]
    monkeypatch.setattr(planner, "available_memory", lambda: GIB)
    with pytest.raises(LingshuError, match="Memory must suffice: it ran out with minibatches of 8 cells"):
        find_minibatch_size([], tmp_path / "run", auto)


def test_training_itself_wants_a_number(pbmc, tmp_path):
    with pytest.raises(LingshuError, match="The minibatch size must be a number here"):
        train([pbmc], tmp_path / "run", tiny_config(training={"minibatch_size": "auto"}))


def test_the_command_foretells_and_writes_nothing(cells_file, tmp_path, capsys):
    from lingshu_cell.cli import main

    words = ["--set", "network.width=16", "--set", "network.gene_width=8"]
    with pytest.raises(SystemExit) as end:
        main(["train", str(cells_file), "--out", str(tmp_path / "run"), "--dry-run", "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and told["what"] == "training" and not list(tmp_path.iterdir())
    assert told["config"]["training"]["steps"] == told["sizes"]["steps"] == 300
