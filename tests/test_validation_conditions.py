"""Validation conditions are measured in training, and the step that foretells them best is what generates."""

import csv
import shutil
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, TINY_SET
from torch import Tensor

from lingshu_cell.checkpoint import BEST_FILE, load_best, load_checkpoint, mark_best, read_best, save_checkpoint
from lingshu_cell.conditioning_of_cells import build_conditioner
from lingshu_cell.config import Config, load_config
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.training_set import assemble
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import load_model
from lingshu_cell.network.distribution import CountDistribution, Positions
from lingshu_cell.train import train
from lingshu_cell.validation_conditions import FILE, ValidationConditions, compare

KANG = SHARED_DATA / "kang_ifnb.h5ad"
pytestmark = pytest.mark.skipif(not KANG.is_file(), reason="the shared data are not here")
SPLIT = """
perturbation_key = "perturbation"
control = "control"
identity_key = "cell_type"
[validation]
pairs = [{ cell_type = "B cells", perturbation = "IFNB" }, { cell_type = "NK cells", perturbation = "IFNB" }]
"""
NAMES = ("B cells / IFNB", "NK cells / IFNB")


@pytest.fixture(scope="module")
def kang() -> ad.AnnData:
    """320 real cells × 300 genes of four types."""
    cells = ad.read_h5ad(KANG)
    groups = cells.obs.groupby(["cell_type", "perturbation"], observed=True).indices
    types = ("B cells", "NK cells", "CD14+ Monocytes", "CD4 T cells")
    kept = np.sort(np.concatenate([groups[kind, p][:40] for kind in types for p in ("control", "IFNB")]))
    detected = np.asarray((cells.X > 0).sum(0)).ravel()
    cells = cells[kept, np.sort(np.argsort(-detected, kind="stable")[:600:2])].copy()
    cells.obs = cells.obs[["cell_type", "perturbation"]]
    return cells


def settings(split: Path | None, **training) -> Config:
    data = {"condition_keys": ["cell_type"], "perturbation_key": "perturbation", "control": "control",
            "split": None if split is None else str(split), "validation_fraction": 0.2}  # fmt: skip
    base = {"steps": 12, "minibatch_size": 32, "warmup_steps": 2, "peak_learning_rate": 1e-2, "validate_every": 4,
            "checkpoint_every": 4, "device": "cpu"}  # fmt: skip
    return load_config(overrides={"data": data, "network": TINY_SET, "training": base | training})


def train_quietly(cells: ad.AnnData, run: Path, config: Config, **options) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cells without any counts")
        train([cells], run, config, **options)
    return run


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validation") / "split.toml"
    path.write_text(SPLIT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(kang, split) -> Path:
    return train_quietly(kang, split.parent / "run", settings(split))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_scores_are_what_they_say():
    measured = np.random.default_rng(0).normal(size=500)
    one = compare(measured, measured)
    assert (one.r, one.slope, one.explained) == pytest.approx((1, 1, 1))
    double = compare(2 * measured, measured)
    assert (double.r, double.slope, double.explained) == pytest.approx((1, 2, 0))
    nothing = compare(np.zeros(500), measured)
    assert (nothing.r, nothing.slope, nothing.explained) == (0, None, pytest.approx(0))
    assert compare(-measured, measured).slope is None
    noisy = measured + np.random.default_rng(1).normal(size=500)
    assert compare(measured, noisy).slope == pytest.approx(1, abs=0.1), "noise of the measurement does not bias it"


def test_history_has_the_scores_of_each_validation(run):
    history, conditions = rows_of(run / "history.csv"), rows_of(run / FILE)
    assert [row["step"] for row in history] == ["4", "8", "12"]
    assert [(row["step"], row["condition"]) for row in conditions] == [(s, n) for s in ("4", "8", "12") for n in NAMES]
    for row in history:
        here = [one for one in conditions if one["step"] == row["step"]]
        for name in ("r", "explained"):
            mean = np.mean([float(one[name]) for one in here])
            assert float(row[f"condition_{name}"]) == pytest.approx(mean)
        slopes = [float(one["slope"]) for one in here if one["slope"]]
        assert float(row["condition_slope"]) == pytest.approx(np.mean(slopes))
        assert float(row["condition_nelbo"]) > 0
    assert float(history[-1]["condition_r"]) > 0.2, "other types tell of the effect"


@pytest.fixture(scope="module")
def judge(kang, split) -> ValidationConditions:
    config = settings(split)
    cells = assemble([read_counts(kang, None, ["cell_type", "perturbation"])], **config.data.assembly())
    return ValidationConditions.of(cells, build_conditioner(cells, config))


def log_mean_of(cells: ad.AnnData, kind: str, label: str) -> np.ndarray:
    chosen = cells[((cells.obs["cell_type"] == kind) & (cells.obs["perturbation"] == label)).to_numpy()].X.toarray()
    return np.log((1e4 * chosen / chosen.sum(1, keepdims=True)).mean(0) + 0.5)


class Told(CountDistribution):
    """States the measured means of the conditions it was asked for."""

    def __init__(self, mean_BG: np.ndarray) -> None:
        self.mean_BG = torch.from_numpy(mean_BG)

    def nll(self, x_0_BG, scored_BG):
        raise NotImplementedError

    def log_probabilities(self, positions):
        raise NotImplementedError

    def log_mean(self, positions: Positions, count_V: Tensor) -> Tensor:
        return self.mean_BG.log()[positions.cell_M, positions.gene_M]


def test_a_denoiser_that_knows_the_means_scores_1(judge, kang):
    """Measured against all control cells of the type, which are not held out; half the fold has slope .5."""
    kinds = {kind: i + 1 for i, kind in enumerate(judge.conditioner.vocabulary.fields["cell_type"])}
    control = judge.conditioner.perturbations.control

    def knowing(share: float):
        def denoise(x_BG, told):
            assert (x_BG == 281).all(), "all genes are hidden"
            means = []
            for category, is_control in zip(told.category_BC[:, 0], told.perturbation_BP[:, 0].bool(), strict=True):
                kind = next(name for name, i in kinds.items() if i == int(category))
                rest, perturbed = (log_mean_of(kang, kind, label) for label in (control, "IFNB"))
                means.append(np.exp(rest if is_control else rest + share * (perturbed - rest)) - 0.5 + 1e-9)
            return Told(np.stack(means))

        return denoise

    assert judge.measured_KG.shape[1] == kang.n_vars
    assert judge.names == NAMES
    for row, kind in enumerate(("B cells", "NK cells")):
        expected = log_mean_of(kang, kind, "IFNB") - log_mean_of(kang, kind, "control")
        np.testing.assert_allclose(judge.measured_KG[row], expected, atol=5e-3)  # counts above 99 are bin middles
    for score in judge.scores(knowing(1.0), torch.device("cpu")):
        assert (score.r, score.slope, score.explained) == pytest.approx((1, 1, 1), abs=0.01)
    for score in judge.scores(knowing(0.5), torch.device("cpu")):
        assert (score.slope, score.explained) == pytest.approx((0.5, 0.75), abs=0.02)


def test_the_effects_expected_of_these_conditions_are_told(judge):
    told = judge.conditioner.conditions(judge.row_KC)
    assert (told.effect.row_B > 0).all()
    assert (judge.conditioner.conditions(judge.conditioner.as_control(judge.row_KC)).effect.row_B == 0).all()


def test_the_best_step_is_kept_and_loaded(run, tmp_path):
    history = rows_of(run / "history.csv")
    best = max(history, key=lambda row: float(row["condition_explained"]))
    said = read_best(run)
    assert said["step"] == int(best["step"]) and said["condition_explained"] == float(best["condition_explained"])
    assert said["conditions"] == list(NAMES)
    model = load_model(run)
    assert model.checkpoint.step == said["step"] and model.curve is not None
    copy = shutil.copytree(run, tmp_path / "run")
    mark_best(copy, 8, {"condition_explained": 1.0})
    assert load_model(copy).checkpoint.step == 8 and load_checkpoint(copy).step == 12
    (copy / BEST_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(LingshuError, match=r"best\.json must say which step is best"):
        load_best(copy)


def test_the_best_checkpoint_is_not_dropped(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"weights": {"w": torch.zeros(1)}}, {})
    mark_best(tmp_path, 1, {"condition_explained": 0.5})
    for step in (3, 4, 5):
        save_checkpoint(tmp_path, step, {"weights": {"w": torch.zeros(1)}}, {})
    assert [int(p.name[-1]) for p in sorted(tmp_path.glob("checkpoint-*"))] == [1, 4, 5]
    assert load_best(tmp_path).step == 1 and load_checkpoint(tmp_path).step == 5


def test_a_resumed_run_measures_what_an_undisturbed_one_does(run, kang, split, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoint-00000012")
    if read_best(copy)["step"] == 12:
        (copy / BEST_FILE).unlink()
    train_quietly(kang, copy, settings(split), resume=True)
    assert rows_of(copy / FILE) == rows_of(run / FILE)
    for one, other in zip(rows_of(copy / "history.csv"), rows_of(run / "history.csv"), strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_a_run_that_ended_before_its_best_step_was_marked_marks_it(run, kang, split, tmp_path):
    """Between the checkpoint of the best step and its mark a run may be killed; deeper cuts fall back to an older."""
    copy, best = shutil.copytree(run, tmp_path / "run"), read_best(run)
    for step in (4, 8, 12):
        if step > best["step"]:
            shutil.rmtree(copy / f"checkpoint-{step:08d}", ignore_errors=True)
    (copy / BEST_FILE).unlink()
    train_quietly(kang, copy, settings(split), resume=True)
    assert read_best(copy) == best
    others = (step for step in (4, 8, 12) if (copy / f"checkpoint-{step:08d}").is_dir() and step != best["step"])
    mark_best(copy, next(others), {"condition_explained": -1.0})
    train_quietly(kang, copy, settings(split), resume=True)
    assert read_best(copy) == best


def test_a_run_that_begins_anew_keeps_no_rows_of_an_older_one(run, kang, split, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in (FILE, "history.csv"):  # left by a run that was killed before its first checkpoint
        shutil.copy(run / name, copy / name)
    train_quietly(kang, copy, settings(split))
    assert rows_of(copy / FILE) == rows_of(run / FILE)


def test_a_broken_row_is_told_and_left_out(run, kang, split, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with open(copy / FILE, "a", encoding="utf-8") as stream:
        stream.write("12,B cells / IFN")  # a full disk ended the row
    with pytest.warns(UserWarning, match=r"conditions\.csv: 1 broken rows were left out"):
        train_quietly(kang, copy, settings(split), resume=True)
    assert rows_of(copy / FILE) == rows_of(run / FILE)


def test_a_flipped_bit_of_best_json_is_seen(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    step = read_best(run)["step"]
    text = (copy / BEST_FILE).read_text(encoding="utf-8")
    (copy / BEST_FILE).write_text(text.replace(f'"step": {step}', '"step": 5'), encoding="utf-8")
    with pytest.raises(LingshuError, match=r"best\.json must say which step is best: .* does not match its checksum"):
        load_best(copy)


def test_without_validation_conditions_nothing_is_measured(kang, tmp_path):
    run = train_quietly(kang, tmp_path / "run", settings(None, steps=4))
    assert not (run / FILE).exists() and not (run / BEST_FILE).exists()
    assert {row["condition_r"] for row in rows_of(run / "history.csv")} == {""}


def test_the_last_step_is_loaded_where_that_is_wished(kang, split, tmp_path):
    run = train_quietly(kang, tmp_path / "run", settings(split, steps=4, keep_best=False))
    assert (run / FILE).is_file() and not (run / BEST_FILE).exists()
