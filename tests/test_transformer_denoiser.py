"""The compressed transformer is the paper's function: equal to embedding, flattening and heads written out densely."""

import pytest
import torch
from torch import Tensor, nn

from lingshu_cell.config import load_config
from lingshu_cell.network.compression import Compressor, GeneGroups
from lingshu_cell.network.distribution import Positions
from lingshu_cell.network.layers import Block
from lingshu_cell.network.transformer_denoiser import TransformerDenoiser
from lingshu_cell.tokens import MASK_TOKEN, N_EXPRESSION_TOKENS

N_GENES, S, D, HEADS, CONDITIONS = 21, 4, 16, 2, (3, 5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(n_genes: int = N_GENES, sizes: tuple[int, ...] = CONDITIONS) -> TransformerDenoiser:
    """A tiny network with weights large enough that everything matters."""
    network = TransformerDenoiser(
        n_genes, sizes, width=D, n_blocks=2, n_heads=HEADS, feedforward_width=24, genes_per_group=S, generator=rng()
    )
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(100 + i)) * 0.2)
    return network.eval()


def tokens(n_cells: int = 3, n_genes: int = N_GENES, seed: int = 1) -> Tensor:
    """Random tokens, half of them hidden."""
    x_BG = torch.randint(0, N_EXPRESSION_TOKENS, (n_cells, n_genes), generator=rng(seed))
    return torch.where(torch.rand(x_BG.shape, generator=rng(seed + 1)) < 0.5, x_BG, MASK_TOKEN)


def conditions(n_cells: int = 3) -> Tensor:
    return torch.stack([torch.arange(n_cells) % size for size in CONDITIONS], dim=1)


@torch.no_grad()
def log_p(network: TransformerDenoiser, x_BG: Tensor, condition_BC: Tensor) -> Tensor:
    everywhere = Positions.where(torch.ones_like(x_BG, dtype=torch.bool))
    return network(x_BG, condition_BC).log_probabilities(everywhere).view(*x_BG.shape, -1)


def naive_rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    return h / (h.pow(2).mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt() * weight


def naive_rope(x_BPHd: Tensor) -> Tensor:
    """Multiply the complex numbers first half + i · second half by e^{i p θ_k}, θ_k = 10000^{-2k/d}."""
    n_positions, half = x_BPHd.shape[1], x_BPHd.shape[3] // 2
    theta = 10_000.0 ** (-torch.arange(half) / half)
    turn_Pk = torch.polar(torch.ones(n_positions, half), torch.arange(n_positions)[:, None] * theta)
    turned = torch.complex(x_BPHd[..., :half], x_BPHd[..., half:]) * turn_Pk[None, :, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def naive_block(h_BPD: Tensor, w: dict[str, Tensor]) -> Tensor:
    normed = naive_rms_norm(h_BPD, w["attention_norm.weight"])
    q, k, v = ((normed @ part.T).unflatten(-1, (HEADS, D // HEADS)) for part in w["attention.qkv.weight"].split(D))
    scores_BHPQ = torch.einsum("bphd,bqhd->bhpq", naive_rope(q), naive_rope(k)) / (D // HEADS) ** 0.5
    mixed_BPD = torch.einsum("bhpq,bqhd->bphd", scores_BHPQ.softmax(-1), v).flatten(2)
    h_BPD = h_BPD + mixed_BPD @ w["attention.out.weight"].T
    normed = naive_rms_norm(h_BPD, w["feedforward_norm.weight"])
    gate, up = normed @ w["feedforward.gate.weight"].T, normed @ w["feedforward.up.weight"].T
    return h_BPD + (gate * torch.sigmoid(gate) * up) @ w["feedforward.down.weight"].T


@torch.no_grad()
def naive_log_p(network: TransformerDenoiser, x_BG: Tensor, condition_BC: Tensor) -> Tensor:
    """The paper's section 2.3 step by step, with every tensor in full."""
    w = network.state_dict()
    n_cells, n_genes = x_BG.shape
    permutation, n_groups = w["groups.permutation_G"], -(-n_genes // S)
    padded = torch.full((n_cells, n_groups * S), MASK_TOKEN)
    padded[:, :n_genes] = x_BG[:, permutation]
    flat = w["embedding.weight"][padded].reshape(n_cells, n_groups, S * D)
    h = flat @ w["compressor.linear.weight"].T
    first = MASK_TOKEN + 1
    for field, size in enumerate(CONDITIONS):
        row = w["embedding.weight"][first + condition_BC[:, field]]
        h = torch.cat([h[:, :field], row[:, None], h[:, field:]], dim=1)
        first += size
    for i in range(2):
        h = naive_block(h, {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")})
    h = naive_rms_norm(h[:, len(CONDITIONS) :], w["norm.weight"])
    genes = (h @ w["decompressor.linear.weight"].T).reshape(n_cells, n_groups * S, D)[:, :n_genes]
    unpermuted = torch.empty_like(genes)
    unpermuted[:, permutation] = genes
    return (unpermuted @ w["decompressor.head.weight"].T).log_softmax(-1)


def test_network_equals_the_naive_dense_computation():
    network, x_BG = make(), tokens()
    torch.testing.assert_close(
        log_p(network, x_BG, conditions()), naive_log_p(network, x_BG, conditions()), rtol=1e-4, atol=1e-4
    )


def test_nll_and_gradients_equal_the_naive_ones():
    network, x_BG = make(), tokens()
    x_0_BG = tokens(seed=9) % N_EXPRESSION_TOKENS
    scored_BG = x_BG == MASK_TOKEN
    nll_B = network(x_BG, conditions()).nll(x_0_BG, scored_BG)
    expected = -(naive_log_p(network, x_BG, conditions()).gather(2, x_0_BG[..., None])[..., 0] * scored_BG).sum(1)
    torch.testing.assert_close(nll_B, expected, rtol=1e-4, atol=1e-3)
    nll_B.sum().backward()
    table = network.embedding.weight
    row, column = int(x_BG[x_BG != MASK_TOKEN][0]), 3
    step = 1e-2
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            table[row, column] += sign * step
            shifted.append(float(network(x_BG, conditions()).nll(x_0_BG, scored_BG).sum()))
            table[row, column] -= sign * step
    assert table.grad[row, column].item() == pytest.approx((shifted[0] - shifted[1]) / (2 * step), rel=0.03, abs=0.02)


def test_embedding_table_trick_equals_embed_flatten_linear():
    compressor, table_TD = Compressor(D, S), torch.randn(300, D, generator=rng())
    x_BPS = torch.randint(0, 300, (3, 5, S), generator=rng(1))
    naive = compressor.linear(table_TD[x_BPS].flatten(2))
    torch.testing.assert_close(compressor(x_BPS, table_TD), naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_genes", "s"), [(21, 4), (20, 4), (3, 8), (1, 1)])
def test_every_gene_sits_in_one_slot_and_the_rest_is_padding(n_genes, s):
    groups = GeneGroups(n_genes, s, rng())
    x_BG = torch.arange(n_genes).expand(2, -1)
    x_BPS = groups.group(x_BG)
    assert x_BPS.shape == (2, -(-n_genes // s), s)
    assert torch.equal(x_BPS.flatten(1)[:, groups.place_G], x_BG)
    assert torch.equal(groups.permutation_G[groups.place_G], torch.arange(n_genes))
    assert (x_BPS.flatten(1)[:, n_genes:] == MASK_TOKEN).all()


def test_permutation_is_random_seeded_and_travels_with_the_weights():
    one, other = GeneGroups(100, 8, rng(1)), GeneGroups(100, 8, rng(2))
    assert torch.equal(one.permutation_G, GeneGroups(100, 8, rng(1)).permutation_G)
    assert not torch.equal(one.permutation_G, other.permutation_G)
    assert not torch.equal(one.permutation_G, torch.arange(100))
    other.load_state_dict(one.state_dict())
    x_BG = torch.arange(100)[None]
    assert torch.equal(one.group(x_BG), other.group(x_BG))
    assert torch.equal(one.place_G, other.place_G)


def test_paper_preset_has_85214080_parameters_in_blocks_and_final_norm():
    sizes = load_config("paper").network
    with torch.device("meta"):
        blocks = [Block(sizes.width, sizes.n_heads, sizes.feedforward_width) for _ in range(sizes.n_blocks)]
        norm = nn.RMSNorm(sizes.width)
    assert len(blocks) == 13
    assert sum(p.numel() for module in (*blocks, norm) for p in module.parameters()) == 85_214_080
    network = make()
    assert isinstance(network.blocks[0], Block)
    assert isinstance(network.norm, nn.RMSNorm)
    assert not [name for name, _ in network.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize(("preset", "s", "n_groups"), [("paper", 8, 2260), ("paper-s32", 32, 565)])
def test_18080_genes_become_2260_or_565_tokens(preset, s, n_groups):
    assert load_config(preset).network.genes_per_group == s
    groups = GeneGroups(18_080, s, rng())
    assert groups.n_groups == n_groups
    assert groups.group(torch.zeros(1, 18_080, dtype=torch.int64)).shape == (1, n_groups, s)


def test_each_condition_changes_the_output_even_when_every_gene_is_hidden():
    network = make()
    for x_BG in (tokens(1), torch.full((1, N_GENES), MASK_TOKEN)):
        outputs = [
            log_p(network, x_BG, torch.tensor([[i, j]])) for i in range(CONDITIONS[0]) for j in range(CONDITIONS[1])
        ]
        for i, one in enumerate(outputs):
            for other in outputs[:i]:
                assert (one - other).abs().max() > 1e-3


def test_unknown_is_a_condition_token_of_its_own_at_index_0():
    network = make()
    condition_BC = torch.tensor([[0, 0]])
    network(tokens(1), condition_BC).nll(torch.zeros(1, N_GENES).long(), torch.ones(1, N_GENES).bool()).sum().backward()
    touched = network.embedding.weight.grad[MASK_TOKEN + 1 :].abs().sum(1) > 0
    assert touched.tolist() == [True, False, False, True, False, False, False, False]


def test_condition_tokens_bypass_the_compressor_and_stay_whatever_is_hidden():
    network, seen = make(), []
    network.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    for x_BG in (tokens(2), torch.full((2, N_GENES), MASK_TOKEN)):
        log_p(network, x_BG, torch.tensor([[1, 2], [1, 2]]))
    rows = network.embedding.weight[[MASK_TOKEN + 1 + 1, MASK_TOKEN + 1 + 3 + 2]]
    for h_BPD in seen:
        assert h_BPD.shape[1] == 2 + -(-N_GENES // S)
        torch.testing.assert_close(h_BPD[:, :2], rows.expand(2, -1, -1))
    assert not torch.equal(seen[0][:, 2:], seen[1][:, 2:])


def test_every_gene_sees_every_other_gene():
    network, x_BG = make(sizes=()), tokens(1)
    none = torch.zeros(1, 0, dtype=torch.int64)
    before = log_p(network, x_BG, none)
    for gene in (0, N_GENES - 1):
        changed = x_BG.clone()
        changed[0, gene] = 7 if x_BG[0, gene] != 7 else 8
        assert ((log_p(network, changed, none) - before).abs().amax(-1) > 1e-5).all()


def test_cells_of_a_minibatch_do_not_see_each_other():
    network, x_BG = make(), tokens(3)
    alone = torch.cat([log_p(network, x_BG[i : i + 1], conditions()[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(log_p(network, x_BG, conditions()), alone, rtol=1e-4, atol=1e-5)


def test_integer_dtype_of_the_tokens_does_not_matter():
    network, x_BG = make(), tokens()
    assert torch.equal(log_p(network, x_BG, conditions()), log_p(network, x_BG.short(), conditions()))


def test_initial_weights_come_from_the_generator():
    sizes = {"width": 16, "n_blocks": 1, "n_heads": 2, "feedforward_width": 16, "genes_per_group": 4}
    torch.manual_seed(5)
    one = TransformerDenoiser(10, (2,), **sizes, generator=rng(3))
    torch.manual_seed(6)
    same, other = (TransformerDenoiser(10, (2,), **sizes, generator=rng(seed)) for seed in (3, 4))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
