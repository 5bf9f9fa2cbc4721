"""The set denoiser reads visible genes as a set, hears its conditions, and cannot see what is hidden."""

import pytest
import torch
from conftest import TINY_SET
from torch import Tensor

from lingshu_cell.data.tokenizer import token_midpoints
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.set_denoiser import SetDenoiser
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

N_GENES, CONDITIONS = 30, (3, 4)
PER_GENE = ("detection_G", "mean_log_G", "detection_weight_G", "log_weight_G", "head.gene_GE", "head.gate_bias_G",
            "head.small_bias_GJ", "head.small_bias_GK", "head.tail_bias_GJ", "head.power_bias_G",
            "head.log_mean_G")  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(sizes: tuple[int, ...] = CONDITIONS, shake: float = 0.2, dropout: float = 0.0) -> SetDenoiser:
    """A tiny network; ``shake`` is noise on every weight, so that parts that start at zero matter."""
    midpoints = torch.from_numpy(token_midpoints())
    settings = TINY_SET | {"n_blocks": 2, "n_small_values": 8, "dropout": dropout}
    network = SetDenoiser(N_GENES, sizes, midpoints, **settings, generator=rng())
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(100 + i)) * shake)
        network.detection_G.copy_(torch.rand(N_GENES, generator=rng(1)))
        network.mean_log_G.copy_(torch.rand(N_GENES, generator=rng(2)))
    return network.eval()


def tokens(n_cells: int = 3, seed: int = 1) -> Tensor:
    """Mostly small counts, some large, half of the genes hidden."""
    small = torch.randint(0, 4, (n_cells, N_GENES), generator=rng(seed))
    large = torch.randint(0, N_EXPRESSION_TOKENS, (n_cells, N_GENES), generator=rng(seed + 1))
    x_BG = torch.where(torch.rand(small.shape, generator=rng(seed + 2)) < 0.1, large, small)
    return torch.where(torch.rand(small.shape, generator=rng(seed + 3)) < 0.5, x_BG, MASK_TOKEN)


@torch.no_grad()
def log_p(network: SetDenoiser, x_BG: Tensor, condition_BC: Tensor | None = None) -> Tensor:
    condition_BC = torch.ones(len(x_BG), len(CONDITIONS), dtype=torch.int64) if condition_BC is None else condition_BC
    everywhere = Positions.where(torch.ones_like(x_BG, dtype=torch.bool))
    return network(x_BG, condition_BC).log_probabilities(everywhere).view(*x_BG.shape, -1)


def test_renaming_genes_renames_the_answers():
    network, x_BG = make(), tokens()
    before = log_p(network, x_BG)
    order = torch.randperm(N_GENES, generator=rng(5))
    renamed = {name: value[order] if name in PER_GENE else value for name, value in network.state_dict().items()}
    network.load_state_dict(renamed)
    torch.testing.assert_close(log_p(network, x_BG[:, order]), before[:, order], rtol=1e-4, atol=1e-4)


def test_every_visible_gene_and_its_count_matter_to_every_gene():
    network = make()
    x_BG = tokens(1)
    before = log_p(network, x_BG)
    for gene in torch.nonzero(x_BG[0] != MASK_TOKEN)[:, 0][:6]:
        for token in (0, 1, 5, 200, MASK_TOKEN):
            if token != x_BG[0, gene]:
                changed = x_BG.clone()
                changed[0, gene] = token
                assert ((log_p(network, changed) - before).abs().amax(-1) > 1e-5).all()


def test_a_visible_zero_is_evidence_and_a_hidden_gene_is_none():
    network = make()
    hidden = torch.full((1, N_GENES), MASK_TOKEN)
    zero = hidden.clone()
    zero[0, 4] = 0
    assert (log_p(network, zero) - log_p(network, hidden)).abs().max() > 1e-3


def test_what_a_hidden_gene_held_cannot_leak_into_its_answer():
    """The answer is a function of x_t: gradients of the loss are the same whatever the encoder could have peeked at."""
    network, x_t_BG = make(), torch.full((2, N_GENES), MASK_TOKEN)
    first, second = (tokens(2, seed) % N_EXPRESSION_TOKENS for seed in (11, 12))
    distribution = network(x_t_BG, torch.ones(2, 2, dtype=torch.int64))
    scored_BG = torch.ones_like(x_t_BG, dtype=torch.bool)
    log_p_BGV = log_p(network, x_t_BG)
    for x_0_BG in (first, second):
        expected = -log_p_BGV.gather(2, x_0_BG[..., None])[..., 0].sum(1)
        torch.testing.assert_close(distribution.nll(x_0_BG, scored_BG), expected, rtol=1e-5, atol=1e-4)


def test_each_condition_changes_the_output_even_when_every_gene_is_hidden():
    network = make()
    for x_BG in (tokens(1), torch.full((1, N_GENES), MASK_TOKEN)):
        outputs = [log_p(network, x_BG, torch.tensor([[i, j]])) for i in range(3) for j in range(4)]
        for i, one in enumerate(outputs):
            for other in outputs[:i]:
                assert (one - other).abs().max() > 1e-3


def test_unknown_is_index_0_of_every_field_and_fields_do_not_share_rows():
    network = make()
    network(tokens(1), torch.tensor([[0, 2]])).nll(
        torch.zeros(1, N_GENES).long(), torch.ones(1, N_GENES).bool()
    ).sum().backward()
    touched = network.condition.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [True, False, False, False, False, True, False]


def test_untrained_network_gives_every_cell_nearly_the_same_whatever_is_visible_or_wanted():
    outputs = log_p(make(shake=0.0), tokens(3), torch.tensor([[0, 0], [1, 2], [2, 3]])).exp()
    assert (outputs - outputs.mean(0)).abs().max() < 0.05


def test_a_network_without_conditions_works():
    network = make(sizes=())
    assert log_p(network, tokens(2), torch.zeros(2, 0, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("visible", [0, 1, N_GENES], ids=["none visible", "one visible", "all visible"])
def test_answers_are_finite_at_both_ends_of_the_process(visible):
    x_BG = torch.full((2, N_GENES), MASK_TOKEN)
    x_BG[0, :visible], x_BG[1, :visible] = 0, 280
    assert log_p(make(), x_BG).isfinite().all()


def test_cells_of_a_minibatch_do_not_see_each_other():
    network, x_BG = make(), tokens(3)
    alone = torch.cat([log_p(network, x_BG[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(log_p(network, x_BG), alone, rtol=1e-4, atol=1e-5)


def test_integer_dtype_of_the_tokens_does_not_matter():
    network = make()
    assert torch.equal(log_p(network, tokens()), log_p(network, tokens().short()))


def test_dropout_acts_in_training_only():
    network, x_BG = make(dropout=0.5), tokens()
    assert torch.equal(log_p(network, x_BG), log_p(network, x_BG))
    network.train()
    assert not torch.equal(log_p(network, x_BG), log_p(network, x_BG))


def test_initial_weights_come_from_the_generator():
    torch.manual_seed(5)
    one = make(shake=0.0)
    torch.manual_seed(6)
    for name, value in make(shake=0.0).state_dict().items():
        assert torch.equal(value, one.state_dict()[name]), name
