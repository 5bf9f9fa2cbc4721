"""On a CUDA device: the mathematics of the CPU, bf16 that learns, cells that do not depend on where they are made.

``make gpu`` runs it; without a device every test is skipped.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import tiny_config
from scipy import sparse

from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.config import load_config
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, write_embeddings
from lingshu_cell.data.tokenizer import encode, token_midpoints
from lingshu_cell.diffusion.loss import nll_per_hidden_share
from lingshu_cell.generate import generate, load_model, steering_of
from lingshu_cell.network.denoiser import build_denoiser
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.set_denoiser import ConditionSizes
from lingshu_cell.tokens import MASK_TOKEN
from lingshu_cell.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Cells without any counts"),
]
PRESETS = ("small", "paper")


def denoiser(preset: str, n_genes: int) -> torch.nn.Module:
    network = tiny_config(preset).network
    return build_denoiser(network, n_genes, ConditionSizes((3,)), torch.from_numpy(token_midpoints()), seed=0)


def half_masked(pbmc: ad.AnnData) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of 16 cells, the same with about half of the genes hidden, and a condition of each."""
    x_0_BG = torch.from_numpy(encode(pbmc.X[:16].toarray().astype(np.int32)))
    hidden_BG = torch.rand(x_0_BG.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return x_0_BG, torch.where(hidden_BG, MASK_TOKEN, x_0_BG).to(x_0_BG.dtype), torch.arange(16)[:, None] % 3


@pytest.mark.parametrize("preset", PRESETS)
def test_likelihoods_gradients_and_probabilities_are_those_of_the_cpu(preset, pbmc):
    x_0_BG, x_t_BG, condition_BC = half_masked(pbmc)
    found = []
    for device in ("cpu", "cuda"):
        network = denoiser(preset, pbmc.n_vars).to(device).eval()
        x_0, x_t, condition = x_0_BG.to(device), x_t_BG.to(device), condition_BC.to(device)
        answer = network(x_t, condition)
        nll_B = answer.nll(x_0, x_t == MASK_TOKEN)
        nll_B.sum().backward()
        norms = torch.stack([p.grad.double().norm() for p in network.parameters() if p.grad is not None])
        log_p_MV = answer.log_probabilities(Positions.where(x_t == MASK_TOKEN))
        found.append([value.detach().cpu() for value in (nll_B, norms, log_p_MV)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_changes_the_likelihood_by_less_than_a_percent(preset, pbmc):
    x_0_BG, _, condition_BC = (value.to("cuda") for value in half_masked(pbmc))
    network = denoiser(preset, pbmc.n_vars).to("cuda").eval()
    nll = []
    for precise in (True, False):
        generator = torch.Generator("cuda").manual_seed(0)
        visible_B = torch.full((16,), 0.5, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=not precise):
            nll.append(nll_per_hidden_share(network, x_0_BG, condition_BC, visible_B, generator).mean().item())
    assert nll[1] == pytest.approx(nll[0], rel=0.01) and nll[1] != nll[0]


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("preset", PRESETS)
def test_training_learns_and_generates_whole_cells(preset, precision, pbmc, tmp_path):
    many_masks = {"masking": "uniform", "steps": 60, "validate_every": 60, "checkpoint_every": 60}
    learnt = {}
    for name, rate in (("unlearnt", 1e-12), ("learnt", 3e-3)):
        rates = {"peak_learning_rate": rate, "final_learning_rate": rate / 10}
        config = tiny_config(preset, training={**many_masks, **rates, "precision": precision, "device": "cuda"})
        train([pbmc], tmp_path / name, config)
        learnt[name] = load_checkpoint(tmp_path / name).manifest["validation_nelbo_nats_per_cell"]
    # An untrained `small` starts at what its genes show, and knows most of what 60 steps can tell.
    assert learnt["learnt"] < (0.998 if preset == "small" else 0.99) * learnt["unlearnt"]
    cells = generate(load_model(tmp_path / "learnt", "cuda"), 20)
    assert sparse.issparse(cells.X) and cells.X.dtype == np.int32 and cells.X.min() >= 0
    assert cells.shape == (20, pbmc.n_vars) and (cells.X.sum(1) > 0).all()


def test_a_run_trained_on_the_cpu_generates_the_same_cells_on_the_gpu(trained_run):
    on_cpu, on_gpu = (generate(load_model(trained_run, device), 24).X.toarray() for device in ("cpu", "cuda"))
    # The noise is the same; a value differs only where rounding moves a probability across a uniform draw.
    assert (on_cpu != on_gpu).mean() < 0.01


def test_minibatch_size_does_not_change_a_cell_on_the_gpu(trained_run):
    model = load_model(trained_run, "cuda")
    few, many = (generate(model, 24, minibatch_size=size).X.toarray() for size in (8, 24))
    np.testing.assert_array_equal(few, many)


def test_a_resumed_run_goes_on_on_the_gpu(pbmc, tmp_path):
    settings = {"device": "cuda", "steps": 20, "checkpoint_every": 5}

    def stop(progress):
        if progress.step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([pbmc], tmp_path / "run", tiny_config(training=settings), on_progress=stop)
    result = train([pbmc], tmp_path / "run", tiny_config(training=settings), resume=True)
    assert result.step == 20 and not result.interrupted


SPLIT = """
perturbation_key = "drug"
control = "none"
identity_key = "cell_type"
[held_out]
pairs = [{ cell_type = "B cells", drug = "ACTB" }]
[validation]
pairs = [{ cell_type = "NK cells", drug = "ACTB" }]
"""


def test_perturbations_are_learnt_and_asked_for_as_on_the_cpu(pbmc, tmp_path):
    cells, rng = pbmc.copy(), np.random.default_rng(0)
    drug = rng.choice(["none", "ACTB", "B2M"], cells.n_obs)
    cells.obs["drug"], cells.obs["dose"] = drug, np.where(drug == "none", np.nan, rng.choice([1.0, 10.0], cells.n_obs))
    (tmp_path / "split.toml").write_text(SPLIT, encoding="utf-8")
    vectors = rng.normal(size=(3, 4)).astype(np.float32)
    write_embeddings(GeneEmbeddings.of(["ACTB", "B2M", "CD74"], vectors, "a test"), tmp_path / "embeddings.npz")
    told = {
        "perturbation_key": "drug", "control": "none", "dose_key": "dose", "split": str(tmp_path / "split.toml"),
        "embeddings": [str(tmp_path / "embeddings.npz")], "depth": True,
    }  # fmt: skip
    train([cells], tmp_path / "run", tiny_config(data=told, training={"device": "cuda"}))
    context = cells[drug == "none"].copy()
    asked = (
        {"condition": {"cell_type": "B cells", "drug": "ACTB"}, "dose": 5.0, "guidance": {"guidance_scale": 1.5}},
        {"condition": {"cell_type": "B cells", "drug": "CD74"}, "dose": 5.0, "unseen": "embedding", "guidance": {}},
        {"condition": {"drug": "B2M"}, "dose": 1.0, "context": context, "guidance": {"guidance_space": "logits"}},
    )
    for wish in asked:
        made = []
        for device in ("cpu", "cuda"):
            model = load_model(tmp_path / "run", device)
            rest = {key: value for key, value in wish.items() if key != "guidance"}
            made.append(generate(model, 24, steering=steering_of(model, **wish["guidance"]), **rest).X.toarray())
        assert (made[0] != made[1]).mean() < 0.01


def test_paper_network_takes_a_bf16_step_at_full_length():
    network = load_config("paper").network
    denoise = build_denoiser(network, 18_080, ConditionSizes(), torch.from_numpy(token_midpoints()), seed=0).to("cuda")
    x_0_BG = torch.randint(0, 3, (2, 18_080), dtype=torch.int16, device="cuda")
    condition_B0 = torch.zeros(2, 0, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        nll_B = denoise(torch.full_like(x_0_BG, MASK_TOKEN), condition_B0).nll(x_0_BG, x_0_BG >= 0)
    nll_B.mean().backward()
    # Fresh weights answer nearly uniformly over 281 tokens.
    assert nll_B.mean().item() / 18_080 == pytest.approx(np.log(281), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in denoise.parameters() if p.grad is not None)


def test_benchmark_step_runs_on_the_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from paper_step import Case, measure

    for training in (True, False):
        measured = measure(Case("small", "bf16", "cuda", training, n_cells=8, repeats=1, n_genes=2_000))
        assert measured["seconds"] > 0 and measured["device_peak_memory_gib"] > 0
        assert measured["gflop"] == pytest.approx(measured["gflop_counted_by_torch"], rel=0.1)
