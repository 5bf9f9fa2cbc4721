"""Training learns, repeats itself bit for bit, survives interruption, and stops when it diverges.

``python tests/test_train.py`` writes the golden losses anew; only when the method changes on purpose, with the reason.
"""

import csv
import json
import math
import os
import platform
import signal
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import real_cells, tiny_config

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import Config
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.training_set import assemble
from lingshu_cell.diffusion.loss import validation_nelbo
from lingshu_cell.ema import gamma_of
from lingshu_cell.errors import LingshuError
from lingshu_cell.history import lock_run
from lingshu_cell.train import Progress, TrainingResult, learning_rate, pick_device, train, with_steps

GOLDEN = Path(__file__).parent / "golden"
# fp32 sums round differently with other vector units, thread counts and torch versions: about 1e-6 a step, grown by
# 20 optimiser steps (Adam divides by small second moments) to about 1e-4; a change of the method moves losses by more.
GOLDEN_TOLERANCE = 2e-3
TENSOR_FILES = ("weights", "buffers", "ema_0.05", "ema_0.10", "optimizer", "data")


def history(run: Path) -> list[dict[str, str]]:
    """Rows of history.csv without the time they took."""
    with open(run / "history.csv", newline="", encoding="utf-8") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def interrupt_at(step: int):
    """Send this process a real Ctrl-C after an optimiser step."""
    return lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.step == step else None


def state(run: Path) -> dict[str, bytes]:
    checkpoint = load_checkpoint(run)
    return {
        f"{file}/{name}": value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for file in TENSOR_FILES
        for name, value in checkpoint.tensors(file).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert history(one) == history(other)
    assert load_checkpoint(one).manifest == load_checkpoint(other).manifest


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_and_resumed_run_is_the_undisturbed_one_bit_for_bit(pbmc, tmp_path, preset, precision):
    config = tiny_config(preset, training={"precision": precision})
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert train([pbmc], whole, config) == TrainingResult(whole, 20, 20, _validation(whole), False, _notes(whole))
    first = train([pbmc], pieces, config, on_progress=interrupt_at(10))
    assert (first.step, first.interrupted) == (10, True)
    assert load_checkpoint(pieces).step == 10
    second = train([pbmc], pieces, config, resume=True, on_progress=interrupt_at(13))
    assert (second.step, second.interrupted) == (13, True)
    third = train([pbmc], pieces, config, resume=True)
    assert (third.step, third.interrupted) == (20, False)
    assert_same_run(whole, pieces)


def _validation(run: Path) -> float:
    return load_checkpoint(run).manifest["validation_nelbo_nats_per_cell"]


def _notes(run: Path) -> tuple[str, ...]:
    return tuple(load_checkpoint(run).manifest["notes"])


def test_killed_run_goes_on_from_its_last_checkpoint_and_drops_later_history(pbmc, tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 17:
            raise Killed

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train([pbmc], whole, tiny_config())
    with pytest.raises(Killed):
        train([pbmc], killed, tiny_config(), on_progress=kill)
    assert load_checkpoint(killed).step == 10
    assert [row["step"] for row in history(killed)] == ["5", "10", "15"]
    train([pbmc], killed, tiny_config(), resume=True)
    assert_same_run(whole, killed)


def test_resuming_a_finished_run_changes_nothing(pbmc, tmp_path):
    train([pbmc], tmp_path / "run", tiny_config())
    before, rows = state(tmp_path / "run"), history(tmp_path / "run")
    result = train([pbmc], tmp_path / "run", tiny_config(), resume=True)
    assert (result.step, result.interrupted) == (20, False)
    assert (state(tmp_path / "run"), history(tmp_path / "run")) == (before, rows)


def test_different_seeds_train_differently(pbmc, tmp_path):
    train([pbmc], tmp_path / "a", tiny_config(training={"steps": 2}))
    train([pbmc], tmp_path / "b", tiny_config(training={"steps": 2, "seed": 1}))
    assert state(tmp_path / "a")["weights/head.gene_GE"] != state(tmp_path / "b")["weights/head.gene_GE"]


def test_signals_are_given_back_after_training(pbmc, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train([pbmc], tmp_path / "run", tiny_config(), on_progress=interrupt_at(1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_ctrl_c_stops_at_once(pbmc, tmp_path):
    def twice(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train([pbmc], tmp_path / "run", tiny_config(), on_progress=twice)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"seed": 5}}, "training.seed"),
        ({"training": {"steps": 30}}, "training.steps"),
        ({"network": {"width": 24}}, "network"),
        ({"data": {"split_seed": 3}}, "data"),
    ],
)
def test_resuming_under_other_settings_is_refused(trained_run, pbmc, change, named):
    with pytest.raises(LingshuError, match=rf"data and settings it began with: changed: '{named}'"):
        train([pbmc], trained_run, tiny_config(**change), resume=True)


def test_resuming_on_other_data_is_refused(trained_run, pbmc):
    other = pbmc.copy()
    other.X[0, 0] += 1
    with pytest.raises(LingshuError, match="changed: 'the data'"):
        train([other], trained_run, tiny_config(), resume=True)


def test_outputs_that_exist_and_runs_that_do_not_are_refused(trained_run, pbmc, tmp_path):
    with pytest.raises(
        LingshuError, match=r"A new run needs a new folder: .* exists\. Pass --resume, or another --out"
    ):
        train([pbmc], trained_run, tiny_config())
    with pytest.raises(LingshuError, match=r"--resume needs a run to go on with: .* does not exist"):
        train([pbmc], tmp_path / "absent", tiny_config(), resume=True)


def test_refused_data_leave_no_folder_behind(pbmc, tmp_path):
    broken = pbmc.copy()
    broken.X = broken.X.astype("float32") * 0.5
    with pytest.raises(LingshuError, match="integers"):
        train([broken], tmp_path / "run", tiny_config("small"))
    assert not (tmp_path / "run").exists()


def test_two_trainings_in_one_folder_are_refused(pbmc, tmp_path):
    (tmp_path / "run").mkdir()
    with lock_run(tmp_path / "run"), pytest.raises(LingshuError, match=r"one training at a time: .* is in use"):
        train([pbmc], tmp_path / "run", tiny_config(), resume=True)


def test_absurd_learning_rate_stops_with_a_message_and_the_last_checkpoint_stays(pbmc, tmp_path):
    config = tiny_config(training={"peak_learning_rate": 1e6, "warmup_steps": 8, "checkpoint_every": 1, "steps": 200})
    with pytest.raises(
        LingshuError, match=r"Training must stay finite: at step \d+ the loss is .* nats per cell"
    ) as caught:
        train([pbmc], tmp_path / "run", config)
    saved = load_checkpoint(tmp_path / "run")
    assert f"The checkpoint of step {saved.step} is whole; lower training.peak_learning_rate" in str(caught.value)
    for file in TENSOR_FILES:
        assert saved.tensors(file)


def test_divergence_before_any_checkpoint_does_not_promise_one(pbmc, tmp_path):
    with pytest.raises(
        LingshuError, match=r"must stay finite: .*No checkpoint was saved; lower training\.peak_learning_rate"
    ):
        train(
            [pbmc], tmp_path / "run", tiny_config(training={"peak_learning_rate": 1e8, "warmup_steps": 0, "steps": 200})
        )


@pytest.mark.parametrize("every", [1, 2])
def test_saved_averages_are_those_of_the_weights_along_the_run(pbmc, tmp_path, every):
    run, trajectory = tmp_path / "run", []

    def record(progress: Progress) -> None:
        trajectory.append(load_checkpoint(run).tensors("weights")["feature_in.bias"].double())

    train(
        [pbmc], run, tiny_config(training={"steps": 8, "checkpoint_every": 1, "ema_every": every}), on_progress=record
    )
    seen = np.arange(every, 9, every)
    for sigma_rel in (0.05, 0.10):
        power = gamma_of(sigma_rel) + 1
        share = torch.from_numpy((seen / 8) ** power - ((seen - every) / 8) ** power)
        explicit = share @ torch.stack(trajectory)[seen - 1]
        average = load_checkpoint(run).tensors(f"ema_{sigma_rel:.2f}")["feature_in.bias"]
        torch.testing.assert_close(average.double(), explicit, rtol=1e-5, atol=1e-7)
    assert (trajectory[-1] - trajectory[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("n_cells", "perturbation_key", "steps"),
    [(10, None, 300), (3200, None, 1000), (1_000_000, None, 4000), (3200, "drug", 300), (12_800, "drug", 500)],
)
def test_steps_are_passes_over_the_cells_and_fewer_with_perturbations(n_cells, perturbation_key, steps):
    control = None if perturbation_key is None else "none"
    config = tiny_config(
        data={"perturbation_key": perturbation_key, "control": control},
        training={"steps": "auto", "minibatch_size": 128},
    )
    assert with_steps(config, n_cells).training.steps == steps
    assert with_steps(tiny_config(training={"steps": 7}), n_cells).training.steps == 7


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    settings = tiny_config(
        training={"steps": 110, "warmup_steps": 10, "peak_learning_rate": 1.0, "final_learning_rate": 0.1}
    ).training
    assert [learning_rate(step, settings) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, settings) == pytest.approx(0.55)
    assert learning_rate(35, settings) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(110, settings) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "gpu", ""])
def test_unusable_device_is_refused(name):
    with pytest.raises(LingshuError, match=f"The device must be usable: '{name}'"):
        pick_device(name)


def test_manifest_says_what_the_model_is(trained_run, pbmc):
    manifest = load_checkpoint(trained_run).manifest
    assert Config.model_validate(manifest["config"]) == tiny_config()
    assert manifest["genes"]["names"] == list(pbmc.var_names)
    assert manifest["data_fingerprints"] == [read_counts(pbmc).fingerprint]
    assert manifest["conditions"] == {"cell_type": sorted(pbmc.obs["cell_type"].unique())}
    assert (manifest["n_training_cells"], manifest["n_validation_cells"]) == (192, 48)
    assert manifest["versions"].keys() >= {"torch", "lingshu-cell"}
    assert "licence" in manifest


def test_validation_cells_come_from_all_parts_of_a_sorted_file(tmp_path, monkeypatch):
    """Files are often sorted by cell type or donor, and only some hundred held-out cells are scored."""
    adata = real_cells(2600, 10, least_detected=1000)
    adata = adata[np.argsort(adata.obs["cell_type"].astype(str), kind="stable")].copy()
    scored: list[int] = []

    def watched(denoise, x_0_BG, conditions, *rest):
        scored.extend(conditions.category_BC[:, 0].tolist())
        return validation_nelbo(denoise, x_0_BG, conditions, *rest)

    monkeypatch.setattr("lingshu_cell.train.validation_nelbo", watched)
    config = tiny_config(data={"validation_fraction": 0.5}, training={"steps": 1, "minibatch_size": 256})
    train([adata], tmp_path / "run", config)
    assert len(scored) <= 512
    shares = adata.obs["cell_type"].astype(str).value_counts(normalize=True).sort_index()
    scored_shares = np.bincount(scored, minlength=len(shares) + 1)[1:] / len(scored)
    np.testing.assert_allclose(scored_shares, shares, atol=0.05)


def test_training_on_real_cells_beats_the_marginals_of_every_gene(tmp_path):
    adata = real_cells(900, 150, least_detected=200)
    config = tiny_config(
        data={"condition_keys": []},
        network={"gene_width": 32, "width": 64, "n_blocks": 2, "feedforward_width": 128},
        training={"steps": 150, "minibatch_size": 64, "warmup_steps": 20, "peak_learning_rate": 5e-3,
                  "validate_every": 1000, "checkpoint_every": 1000},
    )  # fmt: skip
    result = train([adata], tmp_path / "run", config)
    baseline = marginal_nll(adata, config)
    print(f"{result.validation_nelbo:.2f} nats per cell, marginals {baseline:.2f}")
    assert result.validation_nelbo < 0.95 * baseline


def test_papers_network_learns_from_scratch_that_most_counts_are_zero(tmp_path):
    config = tiny_config("paper", training={"steps": 60, "peak_learning_rate": 5e-3, "warmup_steps": 10})
    result = train([real_cells(240, 150)], tmp_path / "run", config)
    assert result.validation_nelbo < 0.1 * 150 * math.log(281), "a uniform guess over the tokens costs log 281 a gene"


def marginal_nll(adata: ad.AnnData, config: Config) -> float:
    """Held-out nats per cell when every gene is drawn from its own token frequencies (with one pseudo-cell)."""
    cells = assemble([read_counts(adata)], **config.data.assembly())
    counts_GV = cells.token_counts()
    overall_V = counts_GV.sum(0) + 0.01
    p_GV = counts_GV + overall_V / overall_V.sum()
    p_GV = p_GV / p_GV.sum(1, keepdims=True)
    held_out = cells.rows(cells.validation).tokens_BG
    return float(-np.log(p_GV[np.arange(held_out.shape[1]), held_out]).sum(1).mean())


def golden_run(preset: str, run: Path) -> dict[str, list[float]]:
    """Losses of 20 steps on 240 real cells × 150 genes."""
    smooth: list[float] = []
    config = tiny_config(preset, training={"validate_every": 1, "precision": "fp32"})
    train([real_cells(240, 150)], run, config, on_progress=lambda progress: smooth.append(progress.loss))
    rows = history(run)
    raw = [smooth[0]] + [(now - 0.98 * before) / 0.02 for before, now in pairwise(smooth)]
    return {
        "loss_nats_per_cell": raw,
        "validation_nelbo_nats_per_cell": [float(row["validation_nelbo"]) for row in rows],
        "gradient_norm": [float(row["gradient_norm"]) for row in rows],
    }


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_golden_losses_of_20_steps(preset, tmp_path):
    golden = json.loads((GOLDEN / f"losses_{preset}.json").read_text(encoding="utf-8"))
    for name, values in golden_run(preset, tmp_path / "run").items():
        assert len(values) == 20
        np.testing.assert_allclose(values, golden[name], rtol=GOLDEN_TOLERANCE, err_msg=name)


def write_golden(preset: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses: dict[str, Any] = golden_run(preset, Path(folder) / "run")
    how = {
        "how": "python tests/test_train.py: 20 steps, conftest.tiny_config, conftest.real_cells(240, 150), fp32, CPU",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "tolerance": GOLDEN_TOLERANCE,
    }
    text = json.dumps(how | losses, indent=1)
    (GOLDEN / f"losses_{preset}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for one in sys.argv[1:] or ("small", "paper"):
        write_golden(one)
