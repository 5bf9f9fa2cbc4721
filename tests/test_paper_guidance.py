"""The paper's network takes a perturbation as one category, and control is what guidance goes away from."""

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, tiny_config

from lingshu_cell.config import load_config
from lingshu_cell.diffusion.guidance import GuidedDenoiser
from lingshu_cell.errors import LingshuError
from lingshu_cell.generate import Steering, TrainedModel, generate, load_model, plan_cells, steering_of
from lingshu_cell.network.distribution import Positions
from lingshu_cell.tokens import MASK_TOKEN
from lingshu_cell.train import train

KANG = SHARED_DATA / "kang_ifnb.h5ad"
pytestmark = pytest.mark.skipif(not KANG.is_file(), reason="the shared data are not here")
DATA = {"condition_keys": ["cell_type"], "perturbation_key": "perturbation", "control": "control"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TrainedModel:
    """Trained until the labels matter, on 120 cells × 64 genes of two types."""
    cells = ad.read_h5ad(KANG)
    groups = cells.obs.groupby(["cell_type", "perturbation"], observed=True).indices
    kept = np.sort(np.concatenate([groups[k, p][:30] for k in ("B cells", "NK cells") for p in ("control", "IFNB")]))
    detected = np.asarray((cells.X > 0).sum(0)).ravel()
    cells = cells[kept, np.sort(np.argsort(-detected, kind="stable")[:128:2])].copy()
    training = {"steps": 60, "peak_learning_rate": 1e-2, "condition_dropout": 0.0, "precision": "fp32",
                "validate_every": 60, "checkpoint_every": 60}  # fmt: skip
    train([cells], tmp_path_factory.mktemp("paper") / "run", tiny_config("paper", data=DATA, training=training))
    return load_model(next(iter(tmp_path_factory.getbasetemp().glob("paper*/run"))))


ASKED = {"cell_type": "B cells", "perturbation": "IFNB"}


def branches(model: TrainedModel, n: int = 3) -> tuple:
    rows = np.repeat(plan_cells(model, n, condition=ASKED).request.rows, n, axis=0)
    return model.conditioner.conditions(rows), model.conditioner.conditions(model.conditioner.as_control(rows))


def half_visible(model: TrainedModel, n: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    x_BG = torch.randint(0, 4, (n, len(model.modelled)), generator=rng)
    return torch.where(torch.rand(x_BG.shape, generator=rng) < 0.5, x_BG, MASK_TOKEN)


def same_counts(one: ad.AnnData, other: ad.AnnData) -> bool:
    return bool((one.X != other.X).nnz == 0)


def test_control_is_a_category_that_control_cells_carry(model):
    asked, control = branches(model)
    field = model.conditioner.perturbation_field
    assert model.conditioner.as_category and asked.perturbation_BP is None
    assert model.conditioner.sizes.categories == model.conditions.sizes and model.conditioner.sizes.perturbations == 0
    labels = model.conditions.fields["perturbation"]
    assert labels[control.category_BC[0, field] - 1] == "control" and labels[asked.category_BC[0, field] - 1] == "IFNB"
    assert (control.category_BC[:, 1 - field] == asked.category_BC[:, 1 - field]).all(), "the identity is told to both"
    assert {"control", "IFNB"} == set(model.conditions.decode(model.condition_rows)["perturbation"].astype(str))


@torch.no_grad()
def test_w_extrapolates_the_logits_exactly(model):
    """a_ref + (w + 1)(a - a_ref), w = scale - 1, for every hidden gene and token."""
    asked, control = branches(model)
    x_BG = half_visible(model)
    positions = Positions.where(x_BG == MASK_TOKEN)
    a, a_ref = (model.network(x_BG, c).log_probabilities(positions).double() for c in (asked, control))
    assert (a - a_ref).abs().max() > 0.02, "the labels matter"
    for w in (-1.0, 0.0, 0.5, 2.0):
        guided = GuidedDenoiser(model.network, control, w + 1, "logits", torch.zeros(281))(x_BG, asked)
        expected = torch.log_softmax(a_ref + (w + 1) * (a - a_ref), 1)
        torch.testing.assert_close(guided.log_probabilities(positions).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["logits", "log-mean"])
def test_0_is_control_and_1_is_conditional(model, space):
    def cells(scale: float, label: str = "IFNB") -> ad.AnnData:
        steering = Steering(guidance_scale=scale, guidance_space=space, guidance_clip=20.0)
        return generate(model, 8, condition=ASKED | {"perturbation": label}, steering=steering)

    plain = generate(model, 8, condition=ASKED)
    control = generate(model, 8, condition=ASKED | {"perturbation": "control"})
    assert same_counts(cells(1), plain) and not same_counts(plain, control)
    assert same_counts(cells(3, "control"), control), "control cells are their own reference"
    assert not same_counts(cells(2), plain)
    if space == "logits":
        at_0 = cells(0)
        assert (at_0.X != control.X).nnz < 0.01 * at_0.X.nnz, "rounding may decide a near tie"
    assert set(cells(0).obs["perturbation"]) == {"IFNB"}


def test_presets_of_the_paper_guide_logits_and_drop_no_condition(model):
    for name in ("paper", "paper-s32"):
        config = load_config(name)
        assert config.training.condition_dropout == 0 and config.generation.guidance_space == "logits"
    steering = steering_of(model, guidance_scale=1.5)
    assert steering.guidance_space == "logits"
    told = generate(model, 2, condition=ASKED, steering=steering).uns["lingshu_cell"]["perturbation"]
    assert (told["guidance_scale"], told["guidance_space"], told["control"]) == (1.5, "logits", "control")


def test_a_clamped_gene_is_there_before_the_first_step(model):
    """The network sees it from the first step on, in both branches of guidance."""
    gene, seen = model.genes.names[model.modelled[5]], []
    network = model.network
    watch = network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][:, 5].clone()))
    steering = steering_of(model, clamp={gene: 1}, guidance_scale=2.0)
    cells = generate(model, 8, condition=ASKED, steering=steering)
    watch.remove()
    assert (cells[:, gene].X.toarray() == 1).all()
    assert len(seen) == 2 * model.config.generation.steps and all((tokens == 1).all() for tokens in seen)


def test_a_combination_never_trained_is_an_unknown_category(model):
    with pytest.raises(LingshuError) as caught:
        generate(model, 2, condition=ASKED | {"perturbation": "IFNB+TNF"})
    assert "IFNB+TNF" in caught.value.finding
