"""A training with a time limit ends in time, with the learning rate of an end, and counts as finished."""

import csv
import itertools

import pytest
from conftest import tiny_config

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.errors import LingshuError
from lingshu_cell.model import run_info
from lingshu_cell.train import learning_rate, train

LIMIT = 1.5
ENDLESS = {"steps": 1_000_000, "warmup_steps": 5, "validate_every": 1_000_000, "checkpoint_every": 1_000_000}

pytestmark = pytest.mark.filterwarnings("ignore:Cells without any counts")


@pytest.fixture(scope="module")
def timed_run(pbmc, tmp_path_factory):
    """A run whose clock moves by a thirtieth of the limit each time it is looked at, so once a step."""
    run, seen, ticks = tmp_path_factory.mktemp("timed") / "run", [], itertools.count()
    config = tiny_config(training={**ENDLESS, "max_seconds": LIMIT})
    result = train([pbmc], run, config, on_progress=seen.append, clock=lambda: next(ticks) * LIMIT / 30)
    return run, result, seen


def test_training_ends_when_the_time_is_over(timed_run):
    run, result, seen = timed_run
    assert not result.interrupted and result.validation_nelbo is not None
    assert result.step == 30 and seen[-1].seconds_left == 0
    assert all(progress.seconds_left <= LIMIT for progress in seen)
    assert load_checkpoint(run).manifest["seconds"] == pytest.approx(LIMIT, abs=0.2) and run_info(run)["finished"]


def test_the_clock_is_that_of_the_machine_where_none_is_given(pbmc, tmp_path):
    result = train([pbmc], tmp_path / "run", tiny_config(training={**ENDLESS, "max_seconds": 0.5}))
    assert 0 < result.step < 1_000_000 and not result.interrupted
    assert load_checkpoint(tmp_path / "run").manifest["seconds"] >= 0.5


def test_learning_rate_of_the_last_step_is_near_the_final_one(timed_run):
    run, _, _ = timed_run
    training = tiny_config().training
    with open(run / "history.csv", newline="", encoding="utf-8") as stream:
        last = float(list(csv.DictReader(stream))[-1]["learning_rate"])
    assert training.final_learning_rate <= last < 0.2 * training.peak_learning_rate


def test_resuming_after_the_time_changes_nothing(timed_run, pbmc):
    run, result, _ = timed_run
    before = load_checkpoint(run).manifest
    again = train([pbmc], run, tiny_config(training={**ENDLESS, "max_seconds": LIMIT}), resume=True)
    assert again.step == result.step and not again.interrupted and load_checkpoint(run).manifest == before


def test_steps_still_end_a_run_that_has_time_left(pbmc, tmp_path):
    config = tiny_config(training={"steps": 4, "max_seconds": 1000.0})
    assert train([pbmc], tmp_path / "run", config).step == 4


def test_seconds_are_those_of_the_clock_that_is_given(pbmc, tmp_path):
    ticks = iter(range(1_000))
    config = tiny_config(training={**ENDLESS, "max_seconds": 7.0})
    assert train([pbmc], tmp_path / "run", config, clock=lambda: float(next(ticks))).step == 7


def test_learning_rate_follows_whichever_is_further_on():
    settings = tiny_config(training={"steps": 105, "warmup_steps": 5}).training
    assert learning_rate(55, settings) == learning_rate(5, settings, share_of_time=0.5)
    assert learning_rate(55, settings, share_of_time=0.2) == learning_rate(55, settings)
    assert learning_rate(5, settings, share_of_time=1.0) == pytest.approx(settings.final_learning_rate)


def test_a_time_limit_is_more_than_nothing():
    with pytest.raises(LingshuError, match=r"training.max_seconds = 0.* greater than 0"):
        tiny_config(training={"max_seconds": 0})
