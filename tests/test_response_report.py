"""The page of responses: it says what the evaluation found, refuses what does not fit, and no name can break out of it.

``golden/responses`` holds two evaluations of real glioblastoma cells under panobinostat (GSE148842, three donors, 300
genes) as this package wrote them: ``ours`` is a trained model's prediction, ``additive`` the baseline's.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_report import HOSTILE, Page
from test_report_browser import CHROMIUM, attribute, run, visit

from lingshu_cell.errors import LingshuError
from lingshu_cell.judgement import number
from lingshu_cell.report import write_report
from lingshu_cell.response_judgement import direction, effect_size, relative, response_verdict, within

pytest.importorskip("matplotlib")
GOLDEN = Path(__file__).resolve().parent / "golden" / "responses"
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
MARKS = ("good", "close", "off")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "ours", tmp_path / "ours"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    copy = shutil.copytree(GOLDEN / "ours", tmp_path_factory.mktemp("page") / "ours")
    return write_report(copy, baseline=GOLDEN / "additive").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((GOLDEN / "ours" / "responses.json").read_text())


def edit(folder: Path, change) -> Path:
    """Change the record of a folder in place."""
    path = folder / "responses.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def text_of(folder: Path, **options) -> str:
    return Page(write_report(folder, **options).read_text(encoding="utf-8")).text


def section(page: str, name: str) -> str:
    return Page(re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL).group(0)).text


def test_verdict_answers_what_a_user_asks(page, record):
    said, summary = section(page, "verdict"), record["summary"]
    assert "Direction mostly wrong, effect size too weak" in said
    pearson, slope = summary["pearson_delta"], summary["lfc_slope"]
    assert f"correlate at {number(pearson['mean'])} (Pearson-Δ, mean of 3 conditions)" in said
    assert f"other real cells of the same conditions reach {number(pearson['ceiling_mean'])}" in said
    assert f"{number(slope['pooled'])} (1 is right; other real cells {number(slope['ceiling_pooled'])})" in said
    assert "114 % as far from the measured ones as control cells do (energy distance; other real cells 0 %)" in said
    assert "In 0.0 % of the genes generated control cells differ from real ones" in said
    assert "Cells with condition = ctrl of the same donor. They are real cells, for the prediction too." in said
    assert "Truth and prediction have different ones (200 and 200 cells per identity)." in said
    score = record["cell_eval"]["average_score"]["average"]
    assert f"Average score {number(score)} against the baseline additive; 0 is no better, 1 perfect" in said
    assert "left out: PDS, Spearman #DEG" in said
    assert "Made by: preset small · trained for 600 steps · optimal schedule · 32 sampling steps · guidance 1" in page


def test_tiles_stand_beside_ceiling_and_baseline(page, record):
    said = section(page, "verdict")
    theirs = json.loads((GOLDEN / "additive" / "responses.json").read_text())
    for part, name in (("summary", "pearson_delta"), ("summary", "mae_log1p"), ("summary", "e_distance")):
        ours, other = record[part][name], theirs[part][name]
        numbers = [number(x) for x in (ours["mean"], ours["ceiling_mean"], other["mean"])]
        assert "{} real cells {} baseline {}".format(*numbers) in said
    means = [record["cell_eval"]["mean"], record["cell_eval"]["ceiling_mean"], theirs["cell_eval"]["mean"]]
    assert "{} real cells {} baseline {}".format(*(number(found["des"]) for found in means)) in said


def test_conditions_are_ranked_worst_first_beside_their_ceilings(page):
    said = section(page, "conditions")
    table = pd.read_csv(GOLDEN / "ours" / "conditions.csv")
    order = (table["pearson_delta"] / table["ceiling_pearson_delta"]).sort_values().index
    assert [said.index(f"{name} panobinostat") for name in table["identity"][order]] == sorted(
        said.index(f"{name} panobinostat") for name in table["identity"]
    )
    for row in table.itertuples():
        for value, ceiling in ((row.pearson_delta, row.ceiling_pearson_delta), (row.lfc_slope, row.ceiling_lfc_slope)):
            assert re.search(rf"{number(value)} (good |close |off )?real {number(ceiling)}", said)
        assert f"{row.n_de_predicted} measured {row.n_de_real}" in said
    about = "(condition = panobinostat, donor = PW030)"
    assert f"{about}: expected effect from other identities: 4; confidence 0.41" in said


def test_notes_of_the_file_stand_at_their_own_condition(folder):
    edit(folder, lambda r: r["provenance"]["condition"].update(donor="PW036"))
    part = re.search(r'id="conditions".*?</section>', _page(folder), re.DOTALL).group(0)
    noted = [row for row in re.findall(r"<tr>.*?</tr>", part, re.DOTALL) if "confidence 0.41" in row]
    assert len(noted) == 1 and "PW036" in noted[0]


def _page(folder: Path, **options) -> str:
    return write_report(folder, **options).read_text(encoding="utf-8")


def test_every_measurement_has_its_meaning_and_both_conventions_of_pds(page, record):
    said = section(page, "measurements")
    for name in ("mean", "ceiling_mean"):
        for value in record["cell_eval"][name].values():
            assert value is None or number(value) in said
    assert all(number(value) in said for value in record["cell_eval2"]["overall"].values())
    assert "PDS, cell-eval's: 1 − rank / N" in said and "PDS, the preprint's: 1 − 2 · rank / N" in said
    labels = ("DES", "MAE", "Spearman #DEG", "Spearman LFC", "AUPRC", "Direction reach", "Slope, pooled")
    assert all(label in said for label in labels)
    notes = section(page, "notes")
    assert all(" ".join(note.split()) in notes for note in [*record["notes"], *record["library_warnings"]])


def test_the_guide_explains_every_measured_number(record):
    from lingshu_cell.metrics.cell_eval import SEVEN
    from lingshu_cell.metrics.cell_eval2 import SIX
    from lingshu_cell.response_report import _guide

    guide = {entry["key"]: {metric["name"] for metric in entry["metric"]} for entry in _guide()}
    assert guide["cell_eval"] == {*SEVEN, "pds_paper"} and guide["cell_eval2"] == set(SIX)
    left_out = {"lfc_slope_strength", "lfc_slope_genes"}  # of use only beside a single slope, in conditions.csv
    assert guide["summary"] | guide["truth"] == set(record["summary"]) - left_out | {"lfc_slope_pooled"}


def test_provenance_names_versions_files_and_the_way_back(page, record):
    said = section(page, "provenance")
    for name in ("cell-eval", "cell-eval2", "pdex", "lingshu-cell"):
        assert f"versions › {name} {record['versions'][name]}" in said
    assert record["files"]["real"]["fingerprint"] in said and "seconds › cell_eval" in said
    labels = "--perturbation-key condition --control ctrl --identity-key donor"
    assert f"lingshu evaluate --real gbm_heldout.h5ad --generated gbm_ours.h5ad {labels} --seed 0 --out ours" in said
    assert f"lingshu de gbm_ours.h5ad --controls gbm_heldout.h5ad {labels} --out ours/de_predicted" in said


def test_pictures_say_once_which_control_and_test(page):
    shown = Page(page)
    assert shown.tags["figure"] == 2 + 1 + 2 * 2  # rankings, dots, and of two conditions with tables both pictures
    assert section(page, "pictures").count("Mann-Whitney") == 1
    ids = [value for _, name, value in shown.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_page_is_self_contained_and_allows_one_script(page):
    loading = [v for _, name, v in Page(page).attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loading and all(value.startswith(("data:", "#")) for value in loading)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert Page(page).tags["script"] == 1 and "default-src 'none'" in page and len(page) < 1e6


def test_hostile_names_stay_text(folder):
    names = dict(zip(("PW032", "PW036", "PW040"), HOSTILE, strict=False))
    table = pd.read_csv(folder / "conditions.csv")
    table.assign(identity=table["identity"].map(names), perturbation=HOSTILE[3]).to_csv(
        folder / "conditions.csv", index=False
    )

    def rename(record):
        record["controls"] = {names[name]: found for name, found in record["controls"].items()}
        record["settings"] |= {"control": HOSTILE[0], "perturbation_key": HOSTILE[1], "identity_key": HOSTILE[2]}
        record["notes"].append(HOSTILE[0])
        record["library_warnings"].append(HOSTILE[1])
        record["provenance"] |= {"condition": {HOSTILE[0]: HOSTILE[1]}, "preset": HOSTILE[2]}
        record["provenance"]["perturbation"]["notes"] = [HOSTILE[1]]
        record["files"]["predicted"]["source"] = HOSTILE[3]

    text = _page(edit(folder, rename), title=HOSTILE[1])
    shown = Page(text)
    assert shown.tags["script"] == 1 and shown.tags["style"] == 1 + text.count("<svg")
    assert not [a for a in shown.attributes if a[1].startswith("on")] and shown.tags["img"] == 0
    assert all(name in shown.text for name in HOSTILE)


@pytest.mark.parametrize("prefix", ["", "ceiling_"])
def test_without_libraries_ceiling_or_baseline_the_page_says_less(folder, prefix):
    def strip(record):
        record["cell_eval"] = record["cell_eval2"] = record["provenance"] = None
        if prefix:
            for found in record["summary"].values():
                for key in [key for key in found if key.startswith(prefix)]:
                    del found[key]

    table = pd.read_csv(folder / "conditions.csv")
    gone = [c for c in table if "cell_eval" in c or (prefix and c.startswith(prefix))]
    table.drop(columns=gone).to_csv(folder / "conditions.csv", index=False)
    for part in ("de_real", "de_predicted"):
        shutil.rmtree(folder / part)
    said = text_of(edit(folder, strip))
    assert "Not measured: no evaluation of a baseline was given" in said and "seven metrics" not in said
    assert ("No verdict: no ceiling was measured" in said) == bool(prefix)
    assert "unknown: the predicted file does not say" in said and "run lingshu de into this folder" in said


def test_weak_responses_and_small_conditions_are_not_judged(folder):
    table = pd.read_csv(folder / "conditions.csv")
    table.loc[table["identity"] == "PW032", "ceiling_pearson_delta"] = 0.1
    table.loc[table["identity"] == "PW036", table.columns[4:]] = np.nan
    table.to_csv(folder / "conditions.csv", index=False)
    said = section(_page(folder), "conditions")
    assert said.index("PW040 panobinostat") < said.index("PW032 panobinostat") < said.index("PW036 panobinostat")
    assert "real cells hardly respond: not judged" in said and "too few cells to be judged" in said


def test_many_conditions_are_folded_and_bounded(folder):
    table = pd.read_csv(folder / "conditions.csv")
    many = pd.concat([table.assign(perturbation=f"drug {i}") for i in range(400)])
    many.to_csv(folder / "conditions.csv", index=False)
    page = _page(folder)
    assert Page(page).tags["details"] == 1
    assert "960 better conditions" in page and "200 more are in conditions.csv" in page
    assert len(page) < 3e6


def refusal(folder: Path, **options) -> str:
    with pytest.raises(LingshuError) as caught:
        write_report(folder, **options)
    return str(caught.value)


def test_refuses_what_is_not_whole(folder):
    before = write_report(folder).read_bytes()
    edit(folder, lambda record: record.pop("summary"))
    said = refusal(folder)
    assert "responses.json must be as the evaluation wrote it" in said and "'summary' (1)" in said
    (folder / "responses.json").write_text('{"summary": ')
    assert "An evaluation of responses must be whole" in refusal(folder)
    assert (folder / "report.html").read_bytes() == before


def test_refuses_a_baseline_judged_against_other_cells(folder, tmp_path):
    other = edit(Path(shutil.copytree(GOLDEN / "additive", tmp_path / "b")), lambda r: r["settings"].update(seed=1))
    said = refusal(folder, baseline=other)
    assert "The baseline must be judged against the same cells" in said and "'seed' (1)" in said
    (folder / "responses.json").unlink()
    assert "A baseline can stand beside perturbation responses only" in refusal(folder, baseline=other)


@pytest.mark.parametrize(
    ("value", "ceiling", "words", "mark"),
    [
        (0.86, 0.88, "Direction right", "good"),
        (0.77, 0.88, "Direction nearly right", "good"),
        (0.60, 0.88, "Direction partly right", "close"),
        (0.40, 0.88, "Direction mostly wrong", "off"),
        (-0.5, 0.88, "Direction not predicted", "off"),
        (0.9, 0.1, "No verdict: real cells hardly respond", None),
        (0.9, None, "No verdict: no ceiling was measured", None),
        (None, 0.9, "Not measured", None),
    ],
)
def test_direction_goes_by_the_share_of_the_ceiling(value, ceiling, words, mark):
    assert direction(value, ceiling) == (words, mark)


@pytest.mark.parametrize(
    ("slope", "ceiling", "words", "mark"),
    [
        (1.05, 1.0, "calibrated", "good"),
        (0.8, 1.0, "too weak", "close"),
        (1.5, None, "too strong", "off"),
        (0.99, 0.5, "not known", None),
        (None, 1.0, "not known", None),
    ],
)
def test_effect_size_goes_by_the_slope(slope, ceiling, words, mark):
    assert effect_size(slope, ceiling) == (words, mark)


def test_worse_values_never_get_better_marks():
    values = np.linspace(-1, 1.2, 50)
    for marks in (
        [direction(v, 0.8)[1] for v in values[::-1]],
        [effect_size(1 + v, 1.0)[1] for v in np.linspace(0, 2, 50)],
        [relative(v, 0.8) for v in values[::-1]],
        [relative(v, 0.8, lower_is_better=True) for v in values],
        [within(v, 0.1, 0.3) for v in values],
    ):
        ranks = [MARKS.index(mark) for mark in marks]
        assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2}


def test_verdict_takes_the_tone_of_its_worst_part(record):
    table = pd.read_csv(GOLDEN / "ours" / "conditions.csv")
    good = json.loads(json.dumps(record))
    good["summary"]["pearson_delta"]["mean"] = 0.87
    found = response_verdict(table, good, None, "")
    assert (found.level, found.tone) == ("Direction right, effect size too weak", "off")
    good["summary"]["lfc_slope"]["pooled"] = 1.02
    assert response_verdict(table, good, None, "").level == "Direction right, effect size calibrated"
    good["settings"] |= {"split_controls": False, "use_predicted_controls": True}
    answer = response_verdict(table, good, None, "").answers[3].text
    assert "measured from its own control cells" in answer and "agreement looks better than it is" in answer


def test_a_fresh_evaluation_of_real_cells_gives_a_page(tmp_path):
    """What the evaluation writes today is what the page reads; real cells as the prediction are found right."""
    import anndata as ad

    from lingshu_cell.evaluate_responses import evaluate_responses

    path = SHARED / "gbm_panobinostat_300g.h5ad"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    adata = ad.read_h5ad(path)
    adata.obs = adata.obs.astype(str)
    half = np.random.default_rng(0).random(adata.n_obs) < 0.5
    keys = {"perturbation_key": "condition", "control": "ctrl", "identity_key": "donor"}
    quick = {"use_cell_eval": False, "use_cell_eval2": False}
    evaluate_responses(adata[half].copy(), adata[~half].copy(), tmp_path / "out", **keys, **quick)
    said = text_of(tmp_path / "out")
    assert "Direction right" in said and "effect size calibrated" in said
    assert "5 conditions in 5 identities (donor)" in said


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_fits_a_phone_and_a_desk_in_a_browser(page, tmp_path, width):
    import html

    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<!doctype html><html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px"
        srcdoc="{html.escape(page, quote=True)}"></iframe><script>window.addEventListener("load", function () {{
          var root = document.getElementById("f").contentDocument.documentElement;
          document.documentElement.setAttribute("data-width", root.dataset.width);
        }});</script></body></html>""",
        encoding="utf-8",
    )
    wide, visible = map(int, attribute(run(frame, tmp_path, "--dump-dom").stdout, "data-width").split("/"))
    assert wide == visible and width - 20 <= visible <= width


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_opens_offline_without_requests_or_complaints(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    seen = visit(file, tmp_path)
    assert attribute(seen.dom, "data-requests") == "0" and seen.console == [] and seen.hosts == set()
