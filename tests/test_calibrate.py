"""Guidance fitted to the size of measured effects."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from lingshu_cell.calibrate import calibrate, fit_scale
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, write_embeddings
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import load_model, steering_of
from lingshu_cell.guidance_store import GUIDANCE_NAME, Calibration, load_calibration, save_calibration
from lingshu_cell.model import LingshuCell

TINY = {
    "data.perturbation_key": "gene",
    "data.control": "none",
    "data.min_cells_per_gene": 1,
    "network.gene_width": 8,
    "network.width": 32,
    "network.n_blocks": 1,
    "network.feedforward_width": 32,
    "training.steps": 60,
    "training.minibatch_size": 32,
    "generation.steps": 8,
    "generation.tile_size": 16,
}


@pytest.mark.parametrize(
    ("scales", "slopes", "expected"),
    [
        ((0.5, 1.0, 2.0), (0.4, 0.8, 1.6), 1.25),
        ((1.0, 2.0), (1.0, 2.0), 1.0),
        ((0.5, 1.0, 2.0), (0.6, 0.5, 1.4), 1.5),  # a dip is noise: the slope is made to rise
        ((0.5, 1.0), (0.2, 0.7), 1.0),  # never reached: the strongest that was tried, not an extrapolation
        ((0.5, 1.0), (1.3, 2.0), 0.5),
    ],
)
def test_the_scale_is_where_the_slope_crosses_one(scales, slopes, expected):
    assert fit_scale(scales, slopes) == pytest.approx(expected)


def calibration(step: int = 7) -> Calibration:
    return Calibration(1.4, "log-mean", step, (1.0, 2.0), (0.8, 1.3), ("A / g1",), "f" * 64)


def test_a_calibration_is_read_back_and_only_for_its_checkpoint(tmp_path):
    save_calibration(tmp_path, calibration())
    assert load_calibration(tmp_path, 7) == calibration()
    assert load_calibration(tmp_path, 8) is None
    assert load_calibration(tmp_path / "elsewhere", 7) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scale": 1}', "{", json.dumps({"scale": "1", "scales": []})])
def test_a_broken_calibration_is_refused(tmp_path, text):
    (tmp_path / GUIDANCE_NAME).write_text(text)
    with pytest.raises(LingshuError, match=r"guidance\.json must be as lingshu calibrate wrote it"):
        load_calibration(tmp_path, 7)


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """Three types of cells; perturbation g1 triples genes 0-19 in all of them."""
    rng = np.random.default_rng(0)
    parts = []
    for t, name in enumerate("ABC"):
        for label in ("none", "g1"):
            mean = np.full(60, 2.0) + np.roll(np.repeat([6.0, 0.0, 0.0], 20), 20 * t)
            mean[:20] *= 3.0 if label == "g1" else 1.0
            obs = pd.DataFrame({"cell_type": name, "gene": label}, index=[f"{name}{label}{i}" for i in range(120)])
            parts.append(ad.AnnData(sparse.csr_matrix(rng.poisson(mean, (120, 60)).astype(np.int32)), obs=obs))
    adata = ad.concat(parts)
    adata.var_names = [f"gene{i}" for i in range(60)]
    return adata


@pytest.fixture(scope="module")
def run(screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    held_out = (screen.obs["cell_type"] == "C") & (screen.obs["gene"] == "g1")
    LingshuCell.train(screen[~held_out].copy(), out=folder / "run", settings=TINY, condition_keys=["cell_type"])
    return folder / "run"


def test_calibration_of_a_trained_model_is_used_by_generation(run, screen):
    validation = screen[screen.obs["cell_type"] == "C"].copy()
    found = calibrate(run, validation, scales=(0.5, 1.5), n_cells=60)
    assert found.conditions == ("C / g1",) and found.slopes[0] < found.slopes[1]
    assert 0.5 <= found.scale <= 1.5
    model = load_model(run)
    assert steering_of(model).guidance_scale == found.scale
    assert steering_of(model, guidance_scale=1.0).guidance_scale == 1.0
    said = LingshuCell.load(run).generate(2, condition={"cell_type": "C", "gene": "g1"}).uns["lingshu_cell"]
    assert said["perturbation"]["guidance_scale"] == found.scale and "guidance_scale" not in said["generation"]
    fitted = f"guidance {found.scale:.3g} in log-mean, fitted by lingshu calibrate"
    assert fitted in said["perturbation"]["notes"]
    control = LingshuCell.load(run).generate(2, condition={"cell_type": "C", "gene": "none"}).uns["lingshu_cell"]
    assert fitted not in control["perturbation"]["notes"]
    (run / GUIDANCE_NAME).unlink()
    assert steering_of(load_model(run)).guidance_scale == 1.0


@pytest.mark.parametrize(
    ("choose", "scales", "words"),
    [
        ("trained", (0.5, 1.5), "conditions that were not trained"),
        ("controls", (0.5, 1.5), "Calibration needs perturbed cells"),
        ("held out", (1.0,), "two or more, rising"),
        ("held out", (2.0, 1.0), "two or more, rising"),
    ],
)
def test_calibration_refuses_what_it_cannot_use(run, screen, choose, scales, words):
    obs = screen.obs
    chosen = {
        "trained": obs["cell_type"] == "A",
        "controls": obs["gene"] == "none",
        "held out": obs["cell_type"] == "C",
    }[choose]
    with pytest.raises(LingshuError, match=words):
        calibrate(run, screen[chosen].copy(), scales=scales)


def test_targets_never_trained_are_calibrated_by_their_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    parts = []
    first_of = {"none": None, "g1": 0, "g2": 0, "g3": 0, "g4": 30, "g5": 30, "g6": 30, "g7": 0}
    for label, first in first_of.items():
        mean = np.full(60, 4.0)
        if first is not None:
            mean[first : first + 20] *= 3.0
        counts = sparse.csr_matrix(rng.poisson(mean, (120, 60)).astype(np.int32))
        parts.append(ad.AnnData(counts, obs=pd.DataFrame({"gene": label}, index=[f"{label}-{i}" for i in range(120)])))
    cells = ad.concat(parts)
    cells.var_names = [f"gene{i}" for i in range(60)]
    vectors = np.array([[1, 0], [0.9, 0.1], [1, 0.1], [0, 1], [0.1, 0.9], [0.1, 1], [0.9, 0]], np.float32)
    told = tmp_path / "embeddings.npz"
    write_embeddings(GeneEmbeddings.of([f"g{i}" for i in range(1, 8)], vectors, "a test"), told)
    trained = cells[~cells.obs["gene"].isin(["g6", "g7"])].copy()
    LingshuCell.train(trained, out=tmp_path / "run", settings={**TINY, "data.embeddings": [str(told)]})
    validation = cells[cells.obs["gene"].isin(["none", "g6", "g7"])].copy()
    with pytest.raises(LingshuError, match="--unseen embedding"):
        calibrate(tmp_path / "run", validation, scales=(0.5, 2.0), n_cells=60)
    found = calibrate(tmp_path / "run", validation, scales=(0.5, 2.0), n_cells=60, unseen="embedding")
    assert found.conditions == ("g6", "g7") and 0.2 < found.slopes[0] < found.slopes[1] - 0.5
