"""The report page: what it says, what it refuses, and that no name can break out of it."""

import base64
import hashlib
import io
import json
import re
import shutil
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from evaluation_example import MARKERS, N_PER_SIDE, example_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lingshu_cell import figures
from lingshu_cell.errors import LingshuError
from lingshu_cell.evaluation_folder import read_evaluation
from lingshu_cell.judgement import MARKS, OTHER_GROUP, group_rows, judge, number, verdict
from lingshu_cell.metrics.catalogue import CATALOGUE
from lingshu_cell.report import write_report

HOSTILE = ('<script>alert("x")</script>', '"><img src=x onerror="alert(1)">', "{{ 7*7 }}</style>", "$\\frac{1}$&amp;'")


class Page(HTMLParser):
    """The elements, attributes and text that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words, self.inside = Counter(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader reads."""
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> Path:
    return example_folder(tmp_path_factory, shuffle=True)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    return example_folder(tmp_path_factory, shuffle=False)


@pytest.fixture(scope="module")
def page(shuffled) -> str:
    return write_report(shuffled).read_text(encoding="utf-8")


@pytest.fixture
def folder(shuffled, tmp_path) -> Path:
    return Path(shutil.copytree(shuffled, tmp_path / "out"))


def edit_table(path: Path, change) -> None:
    change(pd.read_csv(path, keep_default_na=False)).to_csv(path, index=False)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_page_is_fast_small_and_self_contained(shuffled):
    start = time.process_time()
    path = write_report(shuffled)
    assert time.process_time() - start < 15
    assert path == shuffled / "report.html"
    assert path.stat().st_size < 5e6
    assert [p.name for p in shuffled.iterdir() if "report" in p.name] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    loading = [v for _, name, v in Page(text).attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loading and all(value.startswith(("data:", "#")) for value in loading)
    assert not re.search(r"url\((?!#)|@import", text)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://", without_namespaces)


def test_security_policy_allows_the_one_script_and_nothing_else(page):
    policy = next(v for _, name, v in Page(page).attributes if name == "content" and "default-src" in v)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert Page(page).tags["script"] == 1


def test_page_shows_the_numbers_of_the_evaluation(page, shuffled):
    text = Page(page).text
    metrics = json.loads((shuffled / "metrics.json").read_text())
    for name in ("gene_mean_pearson", "classifier_auc_random_forest", "sd_log_umi_ratio", "zero_fraction"):
        assert number(metrics[name]["value"]) in text and number(metrics[name]["real_vs_real"]) in text
        assert metrics[name].get("description", "") in text
    assert f"{N_PER_SIDE} generated cells beside {N_PER_SIDE} held-out real cells" in text
    shares = pd.read_csv(shuffled / "proportions.csv")
    for row in shares.itertuples():
        assert row.cell_type in text and f"{row.real * 100:.1f} %" in text and f"{row.generated * 100:.1f} %" in text
    assert all(gene in text for gene in MARKERS)
    assert "Not measured: Needs the model that made the cells." in text
    assert (
        "lingshu generate RUN --n 300 --out generated.h5ad --steps 64 --seed 3 --condition 'cell_type=B cells'" in text
    )
    assert "Made by: preset small · trained for 1200 steps · cosine schedule · 64 sampling steps · seed 3" in text
    assert "lingshu evaluate --real 'held out.h5ad' --generated generated.h5ad --seed 0 --out out" in text


def test_pictures_are_whole_and_their_ids_unique(page):
    images = [v for tag, name, v in Page(page).attributes if (tag, name) == ("img", "src")]
    assert len(images) == 2 + 2 * len(MARKERS) == len(set(images))
    for image in images:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.split(",", 1)[1]))).convert("RGBA"))
        assert pixels[..., 3].max() > 150 and (pixels[..., 3] == 0).mean() > 0.3  # dots on a transparent ground
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6 + 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    ids = Counter(v for _, name, v in Page(page).attributes if name == "id")
    assert not [name for name, n in ids.items() if n > 1]
    assert "var(--real)" in page and "#2f6db3" not in "".join(drawings)


def test_same_folder_gives_the_same_page(page, shuffled):
    assert write_report(shuffled).read_text(encoding="utf-8") == page


def test_verdict_tells_real_cells_from_shuffled_ones(shuffled, untouched):
    bad = verdict(judge(read_evaluation(shuffled).metrics))
    good = verdict(judge(read_evaluation(untouched).metrics))
    assert bad.level == "Recognised almost always" and bad.tone == "off"
    assert any("too alike in total counts" in sentence for sentence in bad.sentences)
    assert any("more than 99 % of cases" in sentence for sentence in bad.sentences)
    assert good.level == "Indistinguishable" and good.tone == "good" and not good.by_mark["off"]


@pytest.mark.parametrize(
    ("name", "value", "reference", "mark"),
    [
        ("classifier_auc_random_forest", 0.54, 0.5, "good"),
        ("classifier_auc_random_forest", 0.64, 0.5, "close"),
        ("classifier_auc_random_forest", 0.66, 0.5, "off"),
        ("gene_mean_pearson", 0.9951, 0.999, "good"),
        ("gene_mean_pearson", 0.97, 0.999, "off"),
        ("sd_log_umi_ratio", 0.86, 1.0, "good"),
        ("sd_log_umi_ratio", 1.29, 1.0, "close"),
        ("sd_log_umi_ratio", 1.31, 1.0, "off"),
        ("zero_fraction", 0.915, 0.92, "good"),
        ("zero_fraction", 0.88, 0.92, "off"),
        ("nelbo_nats_per_cell", 2900.0, 2900.0, None),
        ("somebody_elses_metric", 108.0, 100.0, "good"),
        ("somebody_elses_metric", 131.0, 100.0, "off"),
    ],
)
def test_marks_follow_the_stated_tolerances(name, value, reference, mark):
    better = CATALOGUE[name].better if name in CATALOGUE else "lower"
    (row,) = judge({name: {"value": value, "real_vs_real": reference, "better": better}})
    assert row.mark == mark


def test_tolerance_between_real_and_shuffled_needs_a_floor():
    entry = {"value": 0.02, "real_vs_real": -0.001, "better": "lower"}
    assert judge({"mmd2": entry})[0].mark is None
    assert "no shuffled floor" in judge({"mmd2": entry})[0].rule
    assert judge({"mmd2": {**entry, "shuffled": 0.5}})[0].mark == "good"
    assert judge({"mmd2": {**entry, "shuffled": 0.15}})[0].mark == "close"
    assert judge({"mmd2": {**entry, "shuffled": 0.05}})[0].mark == "off"


def test_spread_of_real_against_real_widens_the_tolerance():
    entry = {"value": 0.6, "real_vs_real": 0.5, "better": "lower"}
    assert judge({"classifier_auc_logistic": entry})[0].mark == "close"
    row = judge({"classifier_auc_logistic": {**entry, "real_vs_real_sd": 0.06}})[0]
    assert row.mark == "good" and "2 × spread" in row.rule
    depth = {"value": 0.572, "real_vs_real": 0.994, "real_vs_real_sd": 0.109, "better": "closer_to_real"}
    assert judge({"sd_log_umi_ratio": depth})[0].mark == "off", "a wide spread must not excuse a plain failure"


def test_a_test_that_separates_real_from_real_is_not_judged():
    rows = judge({"classifier_auc_random_forest": {"value": 0.99, "real_vs_real": 0.98, "better": "lower"}})
    assert rows[0].mark is None and "unfit" in rows[0].rule
    assert verdict(rows).level == "No verdict"


def test_the_strongest_classifier_decides():
    weak = {"value": 0.52, "real_vs_real": 0.5, "better": "lower"}
    names = [f"classifier_auc_{name}" for name in ("random_forest", "random_forest_all_cells", "logistic")]
    assert verdict(judge(dict.fromkeys(names, weak))).level == "Indistinguishable"
    for name in names:
        found = verdict(judge({**dict.fromkeys(names, weak), name: {**weak, "value": 0.9}}))
        assert found.level == "Clearly distinguishable" and any("AUC 0.900" in sentence for sentence in found.sentences)


def test_no_classifier_no_level():
    assert verdict(judge({"ilisi": {"value": 0.9, "real_vs_real": 0.9, "better": "higher"}})).level == "Not tested"


@given(
    name=st.sampled_from(sorted(CATALOGUE)),
    reference=st.floats(-2, 2),
    shuffled=st.none() | st.floats(-2, 2),
    steps=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    sign=st.sampled_from([-1, 1]),
)
def test_a_worse_value_never_gets_a_better_mark(name, reference, shuffled, steps, sign):
    better = CATALOGUE[name].better
    direction = {"higher": -1, "lower": 1}.get(better, sign)
    entry = {"real_vs_real": reference, "shuffled": shuffled, "better": better}
    marks = [judge({name: {**entry, "value": reference + direction * step}})[0] for step in sorted(steps)]
    if None not in (marks[0].mark, marks[1].mark):
        assert MARKS.index(marks[0].mark) <= MARKS.index(marks[1].mark)
        assert marks[0].severity <= marks[1].severity
    if marks[0].position is not None and marks[1].position is not None:
        assert marks[0].position >= marks[1].position


def test_value_as_good_as_real_is_good_for_every_metric_of_the_catalogue():
    def ideal(better: str) -> dict:
        return {"value": 0.5, "real_vs_real": 0.5, "shuffled": 0.9 if better == "lower" else 0.1, "better": better}

    metrics = {name: ideal(info.better) for name, info in CATALOGUE.items()}
    rows = judge(metrics)
    assert {row.name for row in rows} == set(CATALOGUE)
    assert not [row.name for row in rows if row.group == OTHER_GROUP], "a metric has no place in metric_guide.toml"
    assert {row.mark for row in rows if not row.name.startswith("nelbo")} == {"good"}
    assert sum(len(group["rows"]) for group in group_rows(rows)) == len(rows)


def test_hostile_names_stay_text(folder):
    def names(table: pd.DataFrame) -> pd.DataFrame:
        for column in ("cell_type", "predicted_cell_type"):
            if column in table:
                table.loc[: len(HOSTILE) - 1, column] = HOSTILE[: len(table)]
        if "gene" in table:
            extreme = (table["mean_lognorm_generated"] - table["mean_lognorm_real"]).abs().nlargest(len(HOSTILE)).index
            table.loc[extreme, "gene"] = HOSTILE
        return table.rename(columns={"gene:CD3D": f"gene:{HOSTILE[0]}", "gene:LYZ": f"gene:{HOSTILE[1]}"})

    for name in ("cells.csv.gz", "proportions.csv", "genes.csv.gz"):
        edit_table(folder / name, names)
    edit_table(folder / "history.csv", lambda table: table.rename(columns={"loss": f"loss{HOSTILE[1]}"}))
    bad = {h: {"value": 2.0, "real_vs_real": 1.0, "better": h, "unit": h, "description": h} for h in HOSTILE}
    bad |= {f"{h}2": {"value": None, "real_vs_real": None, "why": h} for h in HOSTILE}
    edit_json(folder / "metrics.json", lambda content: {**content, **bad})
    edit_json(
        folder / "facts.json",
        lambda content: {
            **content,
            HOSTILE[0]: HOSTILE[1],
            "files": {"real": {"name": HOSTILE[0]}, "generated": {"name": HOSTILE[1]}},
            "provenance": {"preset": HOSTILE[0], "condition": {HOSTILE[1]: HOSTILE[0]}, "list": list(HOSTILE)},
        },
    )
    text = write_report(folder, title=HOSTILE[1]).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["script"] == 1 and page.tags["style"] == 1 + text.count("<svg")
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert all(v.startswith("data:") for tag, name, v in page.attributes if (tag, name) == ("img", "src"))
    read = page.text
    assert all(h in read for h in HOSTILE), "the names must be shown as they are"


def test_title_and_missing_history_and_types(folder):
    (folder / "history.csv").unlink()
    (folder / "proportions.csv").unlink()
    edit_table(folder / "cells.csv.gz", lambda table: table.assign(cell_type="", predicted_cell_type=""))
    text = write_report(folder, title="Lung & liver").read_text(encoding="utf-8")
    assert "<title>Lung &amp; liver</title>" in text and 'id="training"' not in text
    assert "carry no cell types" in text and "No cell types are known" in text


def test_cells_without_a_place_on_the_map_are_left_out(folder):
    edit_table(folder / "cells.csv.gz", lambda t: t.assign(umap1=[*t["umap1"][:-100], *[""] * 100]))
    assert f"{N_PER_SIDE - 100} cells" in Page(write_report(folder).read_text(encoding="utf-8")).text
    edit_table(folder / "cells.csv.gz", lambda t: t.assign(umap1=np.nan))
    assert "no map coordinates" in write_report(folder).read_text(encoding="utf-8")


def test_many_types_share_a_legend_of_bounded_length(folder):
    edit_table(folder / "cells.csv.gz", lambda t: t.assign(cell_type=[f"type {i % 40}" for i in range(len(t))]))
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "16 rarer types" in text
    colours = figures.type_colours([f"type {i}" for i in range(60)])
    assert len(set(colours.values())) == 60 and all(re.fullmatch("#[0-9a-f]{6}", c) for c in colours.values())


def test_map_paints_each_cell_in_its_colour():
    xy = np.array([[0.0, 0.0], [1.0, 1.0]])
    limits = figures.map_limits(xy)
    assert limits[0] < 0 < 1 < limits[1]
    image = figures.cell_map(xy, ["#ff0000", "#0000ff"], np.empty((0, 2)), limits)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.split(",", 1)[1]))).convert("RGBA")).astype(int)
    half = pixels.shape[0] // 2
    strongest = [part[part[..., 3].argmax() // half, part[..., 3].argmax() % half] for part in
                 (pixels[half:, :half], pixels[:half, half:])]  # fmt: skip
    assert strongest[0][0] > 200 > 50 > strongest[0][2] and strongest[1][2] > 200 > 50 > strongest[1][0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (float("nan"), "–"), (0, "0"), (2197, "2,197"), (0.123456, "0.123"), (0.99931, "0.9993"),
        (-0.0154, "−0.0154"), (12.345, "12.3"), (1234.5, "1,234"), (0.00012, "1.2 × 10⁻⁴"), (3.0, "3"),
        ("cosine", "cosine"), (True, "True"), (np.float64(0.5), "0.500"), (np.int64(7), "7"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_readers(value, text):
    assert number(value) == text


def refusal(folder: Path) -> str:
    with pytest.raises(LingshuError) as caught:
        write_report(folder)
    return str(caught.value)


def test_refuses_a_folder_that_is_not_there(tmp_path):
    said = refusal(tmp_path / "nowhere")
    assert "A report is made from the folder of an evaluation" in said and "does not exist" in said
    assert "Run lingshu evaluate" in said
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_refuses_a_folder_without_the_tables(folder):
    (folder / "metrics.json").unlink()
    (folder / "genes.csv.gz").unlink()
    assert "lacks 'metrics.json', 'genes.csv.gz' (2)" in refusal(folder)


def test_refuses_broken_json_and_leaves_the_old_page_whole(folder):
    before = write_report(folder).read_bytes()
    (folder / "metrics.json").write_text('{"ilisi": {"value": 0.9,}')
    said = refusal(folder)
    assert "metrics.json must be valid JSON" in said and "line 1 column 25" in said and "Run lingshu evaluate" in said
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"ilisi": 0.9}', '{"ilisi": {}}', '{"ilisi": {"value": "0.9"}}'])
def test_refuses_metrics_of_another_form(folder, content):
    (folder / "metrics.json").write_text(content)
    assert "metrics.json" in refusal(folder)


def test_refuses_tables_without_their_columns(folder):
    edit_table(folder / "cells.csv.gz", lambda table: table.drop(columns=["umap1", "source"]))
    said = refusal(folder)
    assert "cells.csv.gz must have the columns source, cell_type" in said and "'source', 'umap1' (2)" in said


def test_refuses_text_among_numbers(folder):
    edit_table(folder / "cells.csv.gz", lambda table: table.assign(**{"total_counts": "many", "gene:CD3D": "high"}))
    assert "text was found in 'total_counts', 'gene:CD3D' (2)" in refusal(folder)


def test_refuses_one_sided_tables(folder):
    edit_table(folder / "cells.csv.gz", lambda table: table[table["source"] == "real"])
    assert "cells.csv.gz must hold real and generated cells: none are 'generated' (1)" in refusal(folder)


def test_refuses_a_table_that_cannot_be_read(folder):
    (folder / "genes.csv.gz").write_bytes(b"not gzip")
    assert "genes.csv.gz must be a table of comma-separated values" in refusal(folder)
