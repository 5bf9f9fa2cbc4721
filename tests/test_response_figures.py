"""Pictures of responses: they show the numbers they were given, and the section reads what an evaluation wrote."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from lingshu_cell.errors import LingshuError
from lingshu_cell.metrics.differential import differential_tables, write_differential
from lingshu_cell.response_figures import (
    calibration_slope,
    dot_plot,
    fold_changes,
    ranked_conditions,
    standalone,
    top_genes,
    volcano,
)
from lingshu_cell.response_section import read_responses, response_section, write_differential_figures

pytest.importorskip("matplotlib")
pytest.importorskip("pdex")
GENES = [f"gene{i}" for i in range(80)]


def counts(seed: int, strength: float, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Poisson cells of two perturbations and controls; ``strength`` scales one true effect."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    profile, effects = np.exp(fixed.normal(0, 1, 80)), fixed.normal(0, 1, (2, 80)) * (fixed.random((2, 80)) < 0.4)
    means = [profile, *(profile * np.exp(strength * effect) for effect in effects)]
    drawn = [rng.poisson(3000 * mean / mean.sum(), size=(n, 80)) for mean in means]
    return np.concatenate(drawn), np.repeat(["control", "A", "B & <C>"], n)


def tables(seed: int, strength: float) -> dict[str, pd.DataFrame]:
    matrix, labels = counts(seed, strength)
    return differential_tables(sparse.csr_matrix(matrix), labels, "control", GENES)


@pytest.fixture(scope="module")
def measured() -> dict[str, pd.DataFrame]:
    return tables(1, 1.0)


def texts(svg: str) -> list[str]:
    root = ET.fromstring(svg)  # well-formed, whatever names hold
    return [text for node in root.iter() if node.tag.endswith("}text") and (text := "".join(node.itertext()).strip())]


def picture(svg: str) -> str:
    assert svg.startswith("<svg") and 'role="img"' in svg and "var(--ink-soft)" in svg and len(svg) < 250_000
    return svg


def test_volcano_names_the_most_significant_genes_and_counts_both_sides(measured):
    table = measured["A"]
    shown = texts(picture(volcano(table, "volcano A", n_labels=6)))
    named = [text for text in shown if text.startswith("gene")]
    significant = table[table["fdr"] < 0.05]
    assert len(named) == 6 and set(named) <= set(significant["gene"])
    assert table["gene"].iloc[0] in named
    change = significant["log2_fold_change"]
    assert {f"{(change > 0).sum()} up", f"{(change < 0).sum()} down"} <= set(shown)
    sides = table.set_index("gene").loc[named, "log2_fold_change"] > 0
    assert sides.sum() >= 3 and (~sides).sum() >= 3


def test_volcano_without_any_effect_names_nothing(measured):
    table = measured["A"].assign(fdr=1.0, log2_fold_change=0.0)
    shown = texts(picture(volcano(table, "nothing")))
    assert "0 up" in shown and not [text for text in shown if text.startswith("gene")]


def test_volcano_takes_fdr_of_zero(measured):
    table = measured["A"].copy()
    table.loc[:3, "fdr"] = 0.0
    assert "nan" not in volcano(table, "zero").lower().replace("dominant", "")


def test_dot_plot_shows_conditions_and_the_genes_that_respond(measured):
    genes = top_genes(measured, 10)
    assert len(genes) == 10 and len(set(genes)) == 10
    for table in measured.values():
        assert table["gene"].iloc[0] in genes  # each condition's best gene has its place
    rises = np.mean([table.set_index("gene").loc[genes, "log2_fold_change"] for table in measured.values()], axis=0)
    assert np.all(np.diff(rises) <= 1e-9)
    shown = texts(picture(dot_plot(measured, "dots", n_genes=10)))
    assert {"A", "B & <C>", *genes} <= set(shown)
    assert top_genes({"A": measured["A"].assign(fdr=1.0)}, 5) == []
    picture(dot_plot({"A": measured["A"].assign(fdr=1.0)}, "no genes"))


def test_dot_plot_draws_one_dot_per_gene_and_condition(measured):
    svg = dot_plot(measured, "dots", genes=GENES[:7])
    assert len(re.findall(r"<use ", svg.split('id="dots-axes_2"')[0])) >= 2 * 7


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_slope_finds_the_strength_of_the_prediction(measured, strength):
    slope = calibration_slope(measured["A"], tables(2, strength)["A"])
    assert slope == pytest.approx(strength, abs=0.08)
    shown = texts(picture(fold_changes(measured["A"], tables(2, strength)["A"], f"scatter {strength}")))
    assert f"slope {slope:.2f}" in shown


def test_slope_is_none_without_changed_genes(measured):
    nothing = measured["A"].assign(fdr=1.0)
    assert calibration_slope(nothing, nothing) is None
    assert not [text for text in texts(fold_changes(nothing, nothing, "no change")) if text.startswith("slope")]


def test_genes_are_matched_by_name(measured):
    shuffled = measured["A"].sample(frac=1, random_state=0)
    assert calibration_slope(measured["A"], shuffled) == pytest.approx(1.0)


def test_ranking_puts_the_worst_at_the_top_and_shortens_long_lists():
    values = np.array([0.9, np.nan, 0.1, 0.5])
    labels = ["good", "unknown", "bad", "middling"]
    shown = texts(picture(ranked_conditions(labels, values, values, "r", "rank", lower_is_better=False)))
    assert [text for text in shown if text in labels] == ["bad", "middling", "good"]
    shown = texts(ranked_conditions(labels, values, None, "error", "rank", lower_is_better=True))
    assert [text for text in shown if text in labels] == ["good", "middling", "bad"]
    many = [f"c{i}" for i in range(50)]
    shown = texts(ranked_conditions(many, np.arange(50.0), None, "r", "many", lower_is_better=False))
    kept = [text for text in shown if text in many]
    assert kept == [*many[:15], *many[-15:]] and "… 20 more …" in shown


def test_standalone_pictures_need_no_page(measured):
    text = standalone(volcano(measured["A"], "alone"))
    assert text.startswith("<?xml") and "var(" not in text and 'fill="#ffffff"' in text
    ET.fromstring(text.encode())


@pytest.fixture
def evaluation(tmp_path, measured):
    """A folder as an evaluation of responses and two runs of ``lingshu de`` leave it."""
    import anndata as ad

    for name, seed, strength in (("de_real", 1, 1.0), ("de_predicted", 2, 0.6)):
        matrix, labels = counts(seed, strength)
        obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
        adata = ad.AnnData(sparse.csr_matrix(matrix.astype(np.int32)), obs, pd.DataFrame(index=GENES))
        write_differential(adata, tmp_path / name, perturbation_key="perturbation", control="control")
    conditions = {
        "identity": ["", ""],
        "perturbation": ["A", "B & <C>"],
        "pearson_delta": [0.8, 0.6],
        "ceiling_pearson_delta": [0.95, 0.9],
        "lfc_slope": [0.61, np.nan],
    }
    pd.DataFrame(conditions).to_csv(tmp_path / "conditions.csv", index=False)
    record = {"settings": {"control": "control", "perturbation_key": "perturbation"}}
    (tmp_path / "responses.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path


def test_section_has_ranking_dots_scatter_and_volcano_worst_first(evaluation):
    section = response_section(evaluation)
    titles = [title for title, _, _ in section]
    assert titles == [
        "Conditions ranked: Pearson correlation of the change from control",
        "Conditions ranked: slope of predicted on measured log fold change",
        "Genes that respond",
        "Fold changes: B & <C>",
        "Differential expression: B & <C>",
        "Fold changes: A",
        "Differential expression: A",
    ]
    for figure in section:
        picture(figure.svg)
        ET.fromstring(figure.svg)
        assert figure.caption
    by_title = {figure.title: figure for figure in section}
    assert "slope 0.61" in texts(by_title["Fold changes: A"].svg)  # the evaluation's own slope
    assert "conditions.csv" in by_title["Fold changes: A"].caption
    assert "total least squares" in by_title["Fold changes: B & <C>"].caption
    assert "Mann-Whitney" in by_title["Genes that respond"].caption
    assert "control 'control'" in section[0].caption and "Blue strokes" in section[0].caption
    assert {"A, measured", "A, predicted"} <= set(texts(by_title["Genes that respond"].svg))


def test_section_without_tables_ranks_only(evaluation):
    import shutil

    shutil.rmtree(evaluation / "de_real")
    assert [figure.title.split(":")[0] for figure in response_section(evaluation)] == ["Conditions ranked"] * 2


def test_a_broken_folder_is_refused(evaluation):
    table, record = read_responses(evaluation)
    assert table["condition"].tolist() == ["A", "B & <C>"] and record["settings"]["control"] == "control"
    with pytest.raises(LingshuError, match=r"DE tables must be whole"):
        response_section(evaluation, measured=evaluation / "none")
    pd.DataFrame({"perturbation": ["A"]}).to_csv(evaluation / "conditions.csv")
    with pytest.raises(LingshuError, match=r"must name its conditions: there is no 'identity' \(1\)"):
        response_section(evaluation)
    (evaluation / "responses.json").unlink()
    with pytest.raises(LingshuError, match="An evaluation of responses must be whole"):
        response_section(evaluation)


def test_pictures_are_written_beside_their_tables(evaluation):
    files = write_differential_figures(evaluation / "de_real")
    assert [file.name for file in files] == ["A.volcano.svg", "B_C.volcano.svg", "dot_plot.svg"]
    assert all(file.read_text(encoding="utf-8").startswith("<?xml") for file in files)
