"""Effects are measured with honest noise, shrunk by it, and predicted without a look at the condition itself."""

import json
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from lingshu_cell.data.condition_labels import canonical_name
from lingshu_cell.data.effects import Effects, GroupSums, effects_of_sums, shrink
from lingshu_cell.data.embedding_sources import from_gene_sets, from_network
from lingshu_cell.data.gene_embeddings import GeneEmbeddings, concatenate
from lingshu_cell.data.gene_sets import read_edges, read_gmt
from lingshu_cell.data.prior_effects import PriorEffects, prior_effects
from lingshu_cell.errors import LingshuError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
N_GENES = 60


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("shared data absent")
    return SHARED / name


def labels(adata: ad.AnnData, key: str) -> np.ndarray:
    return adata.obs[key].astype(str).to_numpy()


def measure_effects(counts, perturbations, identities, control) -> Effects:
    """Measure effects in cells given as arrays, in two pieces."""
    owners = [""] * len(perturbations) if identities is None else identities
    labels_of_cells = list(zip(map(str, owners), map(str, perturbations), strict=True))
    keys = sorted(set(labels_of_cells))
    group = np.array([keys.index(key) for key in labels_of_cells])
    sums = GroupSums(len(keys), counts.shape[1])
    for part in np.array_split(np.arange(len(group)), 2):
        sums.add(counts[part], group[part])
    return effects_of_sums(sums, keys, control)


def prior_of(counts, perturbations, identities=None, *, control, separator="+", **options) -> PriorEffects:
    """Measure effects and learn from them; as in training, A+B is B+A, and A+control is A."""
    spelt = [canonical_name(str(label), separator, control) for label in perturbations]
    measured = measure_effects(counts, spelt, identities, control)
    return prior_effects(measured, control=control, separator=separator, **options)


@pytest.fixture(scope="module")
def kang() -> ad.AnnData:
    """A third of the cells and the genes seen in 1 % of them, to be quick."""
    adata = ad.read_h5ad(shared("kang_ifnb.h5ad"))[::3]
    return adata[:, np.asarray((adata.X > 0).mean(axis=0)).ravel() > 0.01].copy()


@pytest.fixture(scope="module")
def papalexi() -> ad.AnnData:
    return ad.read_h5ad(shared("papalexi_eccite_299g.h5ad"))


def screen(
    names: list[str], effect_of: dict[str, np.ndarray], identities: tuple[str, ...] = ("",), n: int = 300, seed: int = 0
) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Poisson cells of different depth: expected log fold changes are known."""
    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(0, 1, N_GENES))
    blocks, perturbations, owners = [], [], []
    for identity in identities:
        for name in ["control", *names]:
            profile = rate * np.exp(
                sum((effect_of[part] for part in name.split("+") if part in effect_of), np.zeros(1))
            )
            depth = generator.lognormal(5, 0.4, n)
            blocks.append(generator.poisson(depth[:, None] * profile / rate.sum()))
            perturbations += [name] * n
            owners += [identity] * n
    return sparse.csr_matrix(np.vstack(blocks)), perturbations, owners


@pytest.fixture(scope="module")
def families() -> tuple[dict[str, np.ndarray], GeneEmbeddings]:
    """Twelve perturbations of three kinds; embeddings know the kind and a little noise; a thirteenth is never seen."""
    generator = np.random.default_rng(1)
    kinds = [np.where(np.arange(N_GENES) // 10 == k, 1.2, 0.0) * (-1) ** k for k in range(3)]
    effects = {f"P{i}": kinds[i % 3] * generator.uniform(0.7, 1.3) for i in range(13)}
    vectors = np.eye(3)[[i % 3 for i in range(13)]] + 0.1 * generator.standard_normal((13, 3))
    others = generator.standard_normal((30, 3))
    emb = GeneEmbeddings.of([*effects, *(f"other{i}" for i in range(30))], np.vstack([vectors, others]), "made up")
    return effects, emb


@pytest.fixture(scope="module")
def fitted(families) -> PriorEffects:
    effects, emb = families
    counts, perturbations, _ = screen([f"P{i}" for i in range(12)], effects)
    return prior_of(counts, perturbations, control="control", embeddings=emb)


# --- measuring and shrinking ----------------------------------------------------------------------------------------


def test_effects_are_found_within_their_noise():
    effect = np.zeros(N_GENES)
    effect[:10], effect[10:20] = 1.0, -1.0
    effect -= np.log((np.exp(np.random.default_rng(0).normal(0, 1, N_GENES)) * np.exp(effect)).sum())
    effect += np.log(np.exp(np.random.default_rng(0).normal(0, 1, N_GENES)).sum())  # relative to the total
    counts, perturbations, _ = screen(["A"], {"A": effect}, n=800)
    found = measure_effects(counts, perturbations, None, "control")
    z = (found.delta[0].astype(float) - effect) / np.sqrt(found.variance[0].astype(float))
    assert abs(z.mean()) < 0.5 and 0.7 < z.std() < 1.3
    assert found.n_cells[0] == pytest.approx(400) and found.identities == ("",) and found.perturbations == ("A",)


def test_stated_noise_is_that_between_halves_of_real_cells(kang):
    """Controls against controls: no effect, so Δ² must be about the stated variance, and no more."""
    control = kang[(labels(kang, "perturbation") == "control") & (labels(kang, "cell_type") == "CD4 T cells")]
    half = np.random.default_rng(0).permutation(control.n_obs) % 2
    found = measure_effects(control.X, ["control" if one else "mock" for one in half], None, "control")
    total = np.asarray(control.X.sum(axis=0)).ravel()
    z = found.delta[0].astype(float) / np.sqrt(found.variance[0].astype(float))
    above = total > found.pseudocount * total.sum()
    assert above.sum() > 1000
    assert 0.85 < np.sqrt((z[above] ** 2).mean()) < 1.1
    assert np.sqrt((z[~above & (total > 0)] ** 2).mean()) < 0.6, "below ε, noise is that of ε: nothing is made of it"
    shrunk = shrink(found.delta[0], found.variance[0])
    assert (shrunk**2).sum() < 0.01 * (found.delta[0].astype(float) ** 2).sum()


def test_noise_shrinks_to_nothing_and_strong_effects_stay():
    generator = np.random.default_rng(0)
    variance = generator.uniform(0.01, 0.5, 5000)
    noise = generator.normal(0, np.sqrt(variance))
    assert (shrink(noise, variance) ** 2).sum() < 0.01 * (noise**2).sum()
    truth = np.zeros(5000)
    truth[:100] = generator.choice([-3.0, 3.0], 100)
    variance[:100] = 0.05
    found = shrink(truth + noise * (truth == 0), variance)
    assert (np.abs(found[:100]) > 0.9 * 3).all()
    assert (found[100:] ** 2).sum() < 0.02 * (noise[100:] ** 2).sum()
    assert not shrink(np.zeros(10), np.ones(10)).any()


def test_shrinking_makes_predictions_better_on_average():
    generator = np.random.default_rng(3)
    truth = np.where(generator.random(4000) < 0.1, generator.normal(0, 1, 4000), 0)
    variance = generator.uniform(0.02, 0.3, 4000)
    measured = truth + generator.normal(0, np.sqrt(variance))
    found = shrink(measured, variance)
    assert ((found - truth) ** 2).mean() < 0.3 * ((measured - truth) ** 2).mean()
    assert (found * truth).sum() / (found**2).sum() == pytest.approx(1, abs=0.1)  # slope: calibrated


def test_input_that_cannot_be_measured_is_refused():
    counts = sparse.csr_matrix(np.ones((3, 2), dtype=np.int32))
    with pytest.raises(LingshuError, match=r"no cell is 'ctrl'. Labels: 'A', 'control' \(2\)"):
        measure_effects(counts, ["A", "A", "control"], None, "ctrl")
    with pytest.raises(LingshuError, match="every cell is 'control'"):
        measure_effects(counts, ["control"] * 3, None, "control")
    with pytest.raises(LingshuError, match="all counts are 0"):
        measure_effects(counts * 0, ["A", "A", "control"], None, "control")


def test_identities_without_control_are_told_and_still_predicted():
    effect = np.where(np.arange(N_GENES) < 10, 1.0, 0.0)
    counts, perturbations, owners = screen(["A"], {"A": effect}, ("x", "y", "z"))
    kept = np.array([not (p == "control" and o == "z") for p, o in zip(perturbations, owners, strict=True)])
    chosen = [(p, o) for p, o, k in zip(perturbations, owners, kept, strict=True) if k]
    with pytest.warns(UserWarning, match=r"without control cells: 'z' \(1\)"):
        prior = prior_of(counts[kept], *map(list, zip(*chosen, strict=True)), control="control")
    delta, found = prior.measured_effects()
    assert prior.conditions == (("x", "A"), ("y", "A"), ("z", "A")) and found.tolist() == [True, True, False]
    assert not delta[2].any() and np.corrcoef(delta[0], effect)[0, 1] > 0.9
    answers = [prior.predict("A", owner) for owner in "xyz"]
    assert [one.source for one in answers] == [f"other identities: {n}" for n in (1, 1, 2)]
    assert np.corrcoef(answers[2].delta, effect)[0, 1] > 0.9


# --- predicting from other identities -------------------------------------------------------------------------------


def test_held_out_cell_types_are_predicted_with_the_right_strength(kang):
    perturbations, types = labels(kang, "perturbation"), labels(kang, "cell_type")
    truth = measure_effects(kang.X, perturbations, types, "control")
    slopes, correlations = [], []
    for held in ("B cells", "CD4 T cells", "FCGR3A+ Monocytes", "NK cells"):
        kept = (types != held) | (perturbations == "control")
        prior = prior_of(kang.X[kept], perturbations[kept], types[kept], control="control")
        answer = prior.predict("IFNB", held)
        assert answer.source == "other identities: 7" and answer.found
        c = truth.identities.index(held)
        measured = truth.delta[c].astype(float)
        weight = 1 / (truth.variance[c].astype(float) + (measured**2).mean())
        slopes.append((weight * answer.delta * measured).sum() / (weight * answer.delta**2).sum())
        correlations.append(np.corrcoef(np.sqrt(weight) * answer.delta, np.sqrt(weight) * measured)[0, 1])
        assert answer.confidence == pytest.approx(correlations[-1], abs=0.4)
    assert np.mean(correlations) > 0.58 and 0.9 < np.mean(slopes) < 1.15


def test_similar_identities_weigh_more(kang):
    perturbations, types = labels(kang, "perturbation"), labels(kang, "cell_type")
    kept = (types != "CD14+ Monocytes") & (types != "Megakaryocytes")
    prior = prior_of(kang.X[kept], perturbations[kept], types[kept], control="control")
    profile = kang.X[(types == "CD14+ Monocytes") & (perturbations == "control")].sum(axis=0)
    blind, seeing = prior.predict("IFNB"), prior.predict("IFNB", control_profile=profile)
    named = prior.predict("IFNB", "never heard of")
    np.testing.assert_array_equal(blind.delta, named.delta)
    truth = measure_effects(kang.X, perturbations, types, "control")
    c = truth.identities.index("CD14+ Monocytes")
    error = [((one.delta - truth.delta[c].astype(float)) ** 2).mean() for one in (blind, seeing)]
    assert error[1] < 0.97 * error[0]
    with pytest.raises(LingshuError, match=r"3 values for \d+ genes"):
        prior.predict("IFNB", control_profile=np.ones(3))


def test_the_condition_itself_is_never_looked_at():
    effect = {name: np.random.default_rng(i).normal(0, 0.5, N_GENES) for i, name in enumerate("AB")}
    counts, perturbations, owners = screen(["A", "B"], effect, ("x", "y", "z"), n=100)
    before = prior_of(counts, perturbations, owners, control="control")
    own = np.array([(p, o) == ("A", "y") for p, o in zip(perturbations, owners, strict=True)])
    turned = counts.toarray()
    turned[own] = turned[own][:, ::-1]  # other genes, the same totals
    after = prior_of(sparse.csr_matrix(turned), perturbations, owners, control="control")
    same, other = ([prior.predict("A", o).delta for prior in (before, after)] for o in ("y", "x"))
    np.testing.assert_array_equal(*same)
    assert np.abs(other[0] - other[1]).max() > 0.1


def test_weights_of_other_identities_are_those_of_kriging():
    """Of independent identities the best is the mean by precision; of a copy, the copy; their noise decides between."""
    from lingshu_cell.data.prior_effects import _kriging_weights

    apart = np.full((3, 3), 1e3)
    np.fill_diagonal(apart, 0)
    n_cells = np.array([1e9, 1e9, 50.0])  # variances 1, 1 and 2 in units of the kernel
    np.testing.assert_allclose(_kriging_weights(apart, None, n_cells), np.array([2, 2, 1]) / 5, atol=1e-6)
    np.testing.assert_allclose(_kriging_weights(apart, np.full(3, 1e3), n_cells), np.array([2, 2, 1]) / 5, atol=1e-6)
    np.testing.assert_allclose(_kriging_weights(apart, np.array([0, 1e3, 1e3]), n_cells), [1, 0, 0], atol=1e-6)
    line = np.abs(np.subtract.outer([0.0, 1.0, 3.0], [0.0, 1.0, 3.0]))
    weights = _kriging_weights(line, np.array([0.5, 0.5, 2.5]), np.full(3, 200.0))
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > weights[2] and weights[1] > weights[2]


def donors(share: float, n: int, seed: int = 0) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Six donors whose genes start apart, Poisson cells: a drug takes ``share`` of what sets each apart, and has an
    effect of its own on all.
    """
    generator = np.random.default_rng(seed)
    base, effect = generator.normal(0, 1, N_GENES), generator.normal(0, 0.5, N_GENES)
    blocks, perturbations, owners = [], [], []
    for donor in "abcdef":
        apart = generator.normal(0, 0.7, N_GENES)
        for label, log_rate in (("control", base + apart), ("drug", base + effect + (1 - share) * apart)):
            rate = np.exp(log_rate)
            blocks.append(generator.poisson(200 * rate / rate.sum(), (n, N_GENES)))
            perturbations += [label] * n
            owners += [donor] * n
    return sparse.csr_matrix(np.vstack(blocks)), perturbations, owners


def test_donors_that_converge_are_found_to_and_foretold_better():
    counts, perturbations, owners = donors(0.6, 300)
    prior = prior_of(counts, perturbations, owners, control="control")
    assert prior.convergence == pytest.approx(0.6, abs=0.1)
    of_f = np.array(owners) == "f"
    unseen = ~(of_f & (np.array(perturbations) == "drug"))
    kept = [[x for x, keep in zip(values, unseen, strict=True) if keep] for values in (perturbations, owners)]
    held_out = prior_of(counts[unseen], *kept, control="control")
    assert held_out.convergence == pytest.approx(0.6, abs=0.12)
    truth = prior.measured_effects()[0][prior.conditions.index(("f", "drug"))]
    errors = [
        ((one.predict("drug", "f").delta - truth) ** 2).mean() for one in (held_out, replace(held_out, convergence=0.0))
    ]
    assert errors[0] < 0.5 * errors[1]
    assert "taken off" in held_out.predict("drug", "f").source
    profile = np.asarray(counts[of_f & unseen].sum(0), dtype=float).ravel()
    by_profile = held_out.predict("drug", "somebody new", profile)
    assert np.abs(by_profile.delta - held_out.predict("drug", "f").delta).max() < 0.05
    profile[:5] = np.nan  # not measured in the new donor: it is not taken to be silent there
    lacking, plain = (
        one.predict("drug", "new", profile).delta for one in (held_out, replace(held_out, convergence=0.0))
    )
    np.testing.assert_allclose(lacking[:5], plain[:5], atol=0.1)


@pytest.mark.parametrize("n", [15, 300])
def test_noise_of_control_cells_is_no_convergence(n):
    """What is too high among few control cells by chance comes down under any perturbation."""
    counts, perturbations, owners = donors(0.0, n)
    assert prior_of(counts, perturbations, owners, control="control").convergence < 0.03


def test_cell_types_do_not_become_alike_under_interferon(kang):
    """A third of the shared IFN-beta cells: T cells stay T cells."""
    prior = prior_of(kang.X, labels(kang, "perturbation"), labels(kang, "cell_type"), control="control")
    assert prior.convergence < 0.02


# --- predicting from embeddings -------------------------------------------------------------------------------------


def test_unseen_perturbations_follow_their_embedding(families, fitted):
    effects, emb = families
    answer = fitted.predict("P12", embeddings=emb)
    own = effects["P12"]
    assert answer.source.startswith("ridge on embeddings: R2 out of fold 0.") and answer.found
    assert np.corrcoef(answer.delta, own)[0, 1] > 0.9
    assert fitted.ridge.r2 > 0.7 and answer.confidence > 0.85
    assert 0.7 < np.polyfit(answer.delta, own, 1)[0] < 1.4  # an intercept, as totals shift all genes alike


def test_useless_embeddings_get_little_confidence(families, fitted):
    effects, emb = families
    counts, perturbations, _ = screen([f"P{i}" for i in range(12)], effects)
    shuffled = np.random.default_rng(5).standard_normal(emb.matrix.shape)
    prior = prior_of(
        counts, perturbations, control="control", embeddings=GeneEmbeddings.of(emb.names, shuffled, "noise")
    )
    # Not 0: without a clue it predicts the mean effect, which all three kinds of perturbation share a little of.
    assert prior.ridge.r2 < fitted.ridge.r2 - 0.5
    assert prior.confidence["ridge on embeddings"] < fitted.confidence["ridge on embeddings"] - 0.3


def test_the_ridge_never_sees_the_own_fold(families):
    effects, emb = families
    counts, perturbations, _ = screen([f"P{i}" for i in range(12)], effects)
    before = prior_of(counts, perturbations, control="control", embeddings=emb)
    own = np.array(perturbations) == "P4"
    turned = counts.toarray()
    turned[own] = turned[own][:, ::-1]
    after = prior_of(sparse.csr_matrix(turned), perturbations, control="control", embeddings=emb)
    np.testing.assert_array_equal(before.predict("P4").delta, after.predict("P4").delta)
    assert np.abs(before.predict("P1").delta - after.predict("P1").delta).max() > 0.01
    weights = before.ridge.out_of_fold
    assert not np.diag(weights).any()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_what_a_gene_does_to_itself_is_not_carried_over(families):
    effects, emb = families
    names = [f"P{i}" for i in range(13)] + [f"other{i}" for i in range(N_GENES - 13)]
    own = {name: effect - 2 * (np.arange(N_GENES) == names.index(name)) for name, effect in effects.items()}
    counts, perturbations, _ = screen([f"P{i}" for i in range(12)], own)
    plain, aware = (
        prior_of(counts, perturbations, control="control", embeddings=emb, gene_names=genes) for genes in ((), names)
    )
    before, after = (prior.predict("P12", embeddings=emb).delta for prior in (plain, aware))
    assert before[12] > -1 and after[12] == pytest.approx(-2, abs=0.5)
    assert aware.ridge.r2 > plain.ridge.r2
    # P12 is of the kind of P0, P3, P6, P9: they must not hand down what was done to themselves
    truth = effects["P12"][[0, 3, 6, 9]]
    assert np.abs(after[[0, 3, 6, 9]] - truth).mean() < np.abs(before[[0, 3, 6, 9]] - truth).mean()
    with pytest.raises(LingshuError, match="2 names for 60 genes"):
        prior_of(counts, perturbations, control="control", gene_names=["a", "b"])


def test_networks_and_pathways_beat_the_mean_on_a_real_screen(papalexi):
    links = read_edges(shared("priors/networks/string_interactome_human_symbols.tsv.gz"))
    sets = read_gmt(shared("priors/genesets/msigdb_c2.reactome.v2025.1.Hs.symbols.gmt.gz"))
    emb = concatenate([from_network(links.first, links.second, links.sign, 64), from_gene_sets(sets, 64)])
    perturbations = labels(papalexi, "perturbation")
    prior = prior_of(papalexi.X, perturbations, control="control", embeddings=emb, gene_names=list(papalexi.var_names))
    effects = prior.ridge.effects.astype(float)
    mean = np.stack([np.delete(effects, p, axis=0).mean(axis=0) for p in range(len(effects))])
    r2_mean = 1 - ((mean - effects) ** 2).sum() / (effects**2).sum()
    assert prior.ridge.r2 > 0.2 > 0.12 > r2_mean
    jak1, far = (prior.predict(name, embeddings=emb) for name in ("JAK1", "TOR1A"))  # neither was perturbed
    stat1 = list(papalexi.var_names).index("STAT1")
    assert jak1.delta[stat1] < -0.2 < -0.1 < far.delta[stat1]
    unknown = prior.predict("MARCH8", embeddings=emb)  # in the screen, but in neither source under that name
    assert not unknown.found and not unknown.delta.any() and unknown.source == "none"


# --- policy ---------------------------------------------------------------------------------------------------------


def test_combinations_are_sums_unless_measured_elsewhere():
    effect = {name: np.random.default_rng(i).normal(0, 0.5, N_GENES) for i, name in enumerate("AB")}
    counts, perturbations, owners = screen(["A", "B", "A+B"], effect, ("x", "y"), n=200)
    prior = prior_of(counts, perturbations, owners, control="control")
    assert prior.predict("B+A", "x").source == "other identities: 1"
    assert prior.predict("A+control", "x").source == "other identities: 1"
    one = np.array([o == "x" and p != "A+B" for p, o in zip(perturbations, owners, strict=True)])
    alone = prior_of(counts[one], np.array(perturbations)[one], np.array(owners)[one], control="control")
    answer = alone.predict("A+B", "x")
    assert answer.source == "sum of parts: A (measured), B (measured)"
    assert np.corrcoef(answer.delta, effect["A"] + effect["B"])[0, 1] > 0.9
    assert alone.predict("A+B", "z").source == "sum of parts: A (other identities: 1), B (other identities: 1)"
    missing = alone.predict("A+C", "x")
    assert not missing.found and missing.confidence == 0 and not missing.delta.any()
    never = prior_of(counts[one], np.array(perturbations)[one], None, control="control", separator="")
    assert never.predict("A+B").source == "none"


def test_control_has_no_effect_and_the_unknown_none_that_is_known(families, fitted):
    _, emb = families
    control = fitted.predict("control")
    assert control.found and not control.delta.any() and control.confidence == 1
    for answer in (fitted.predict("P12"), fitted.predict("NOSUCH", embeddings=emb)):
        assert not answer.found and answer.source == "none" and answer.confidence == 0
    with pytest.raises(LingshuError, match="must be those used in training: made up has checksum"):
        fitted.predict("P12", embeddings=GeneEmbeddings.of(emb.names, emb.matrix * 2, "made up"))


def test_embeddings_that_fit_nothing_are_refused_and_few_give_no_ridge(families):
    effects, emb = families
    counts, perturbations, _ = screen(["P0", "P1"], effects, n=50)
    strange = GeneEmbeddings.of(["u", "v"], np.eye(2), "strange")
    with pytest.raises(LingshuError, match=r"none of 'P0', 'P1' \(2\) is in strange \(u, v, …\)"):
        prior_of(counts, perturbations, control="control", embeddings=strange)
    few = prior_of(counts, perturbations, control="control", embeddings=emb)
    assert few.ridge is None and few.predict("P12", embeddings=emb).source == "none"
    with pytest.raises(LingshuError, match="2 folds or more: got 1"):
        prior_of(counts, perturbations, control="control", folds=1)


def test_a_checkpoint_brings_everything_back(families, fitted):
    _, emb = families
    arrays, about = fitted.to_arrays()
    again = PriorEffects.from_arrays(arrays, json.loads(json.dumps(about)))
    for name in ("P3", "P12", "P1+P2", "P1+P12"):
        one, other = (prior.predict(name, embeddings=emb) for prior in (fitted, again))
        np.testing.assert_array_equal(one.delta, other.delta)
        assert (one.source, one.confidence, one.found) == (other.source, other.confidence, other.found)
    assert all(isinstance(array, np.ndarray) and array.dtype.kind == "f" for array in arrays.values())
    plain = PriorEffects.from_arrays(*prior_of(*screen(["A"], {}, n=20)[:2], control="control").to_arrays())
    assert plain.ridge is None and plain.conditions == (("", "A"),)
