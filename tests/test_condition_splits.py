"""Splits by condition: what is held out, few-shot shares, combinations, errors, files, and State's format."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lingshu_cell.commands.split import split, write_parts
from lingshu_cell.data.anndata_io import read_counts, read_obs
from lingshu_cell.data.condition_labels import canonical_name, check_disjoint
from lingshu_cell.data.condition_splits import Condition, ConditionSplit, HeldOut
from lingshu_cell.data.split_files import import_state_toml, parse_split, read_split, to_toml
from lingshu_cell.errors import LingshuError

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
KANG, PAPALEXI = DATA / "kang_ifnb.h5ad", DATA / "papalexi_eccite_299g.h5ad"
KANG_TYPES = (
    "B cells", "CD14+ Monocytes", "CD4 T cells", "CD8 T cells", "Dendritic cells", "FCGR3A+ Monocytes",
    "Megakaryocytes", "NK cells",
)  # fmt: skip
KANG_HEAD = 'perturbation_key = "perturbation"\ncontrol = "control"\nidentity_key = "cell_type"\n'

needs_kang = pytest.mark.skipif(not KANG.is_file(), reason="kang_ifnb is not here")
needs_papalexi = pytest.mark.skipif(not PAPALEXI.is_file(), reason="papalexi_eccite_299g is not here")


@pytest.fixture(scope="module")
def kang() -> pd.DataFrame:
    return read_obs(KANG)


@pytest.fixture(scope="module")
def papalexi() -> pd.DataFrame:
    return read_obs(PAPALEXI)


def table(rows: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Cells of each (cell type, perturbation)."""
    pairs = [pair for pair, n_cells in rows.items() for _ in range(n_cells)]
    frame = pd.DataFrame(pairs, columns=["cell_type", "perturbation"])
    frame.index = [f"cell{i}" for i in range(len(frame))]
    return frame


def small(**changes: object) -> ConditionSplit:
    held_out = HeldOut((Condition(perturbation="A"),))
    return ConditionSplit(**{"perturbation_key": "perturbation", "control": "ctrl", "held_out": held_out, **changes})


SIX = {(t, p): 10 for t in ("B", "T") for p in ("ctrl", "A", "C")}


@needs_kang
@pytest.mark.parametrize("cell_type", KANG_TYPES)
def test_each_kang_cell_type_is_held_out_alone(kang, cell_type, tmp_path):
    file = tmp_path / "split.toml"
    pair = {"cell_type": cell_type, "perturbation": "IFNB"}
    file.write_text(
        KANG_HEAD + "[held_out]\npairs = [{ cell_type = " + json.dumps(cell_type) + ', perturbation = "IFNB" }]'
    )
    parts = read_split(file).assign(kang)
    wanted = np.ones(len(kang), dtype=bool)
    for key, value in pair.items():
        wanted &= (kang[key] == value).to_numpy()
    assert wanted.sum() > 50
    assert (parts == "test").tolist() == wanted.tolist() and not (parts == "validation").any()
    zero_shot = parse_split(
        {"perturbation_key": "perturbation", "control": "control", "identity_key": "cell_type",
         "held_out": {"identities": [cell_type]}}
    )  # fmt: skip
    assert zero_shot.assign(kang).tolist() == parts.tolist()  # Kang has one perturbation
    check_disjoint(kang[parts == "train"], kang[parts == "test"], ["cell_type", "perturbation"], control="control")


@needs_kang
def test_identity_with_controls_held_out_leaves_nothing_of_it(kang):
    held_out = HeldOut((Condition(identity="NK cells"),), controls="held out")
    parts = ConditionSplit("perturbation", "control", "cell_type", held_out).assign(kang)
    assert set(parts[kang["cell_type"] == "NK cells"]) == {"test"}
    assert set(parts[kang["cell_type"] != "NK cells"]) == {"train"}


@needs_papalexi
def test_held_out_targets_of_papalexi(papalexi):
    split = ConditionSplit(
        "perturbation",
        "control",
        held_out=HeldOut(tuple(Condition(perturbation=name) for name in ("STAT1", "IRF1", "BRD4", "SPI1"))),
        validation=HeldOut((Condition(perturbation="STAT2"),)),
    )
    parts = split.assign(papalexi)
    by_part = {part: set(papalexi["perturbation"][parts == part]) for part in ("train", "validation", "test")}
    assert by_part["test"] == {"STAT1", "IRF1", "BRD4", "SPI1"} and by_part["validation"] == {"STAT2"}
    assert len(by_part["train"]) == 21 and "control" in by_part["train"]
    text = split.describe(papalexi)
    assert "test                   4             1,906               0" in text
    assert "test: STAT1 (444 cells)" in text and "validation: STAT2 (661 cells)" in text


@needs_papalexi
def test_few_shot_shares_and_control_shares_of_papalexi(papalexi):
    split = ConditionSplit(
        "perturbation",
        "control",
        "bio_rep",
        held_out=HeldOut((Condition(perturbation="STAT1"),)),
        few_shot=((Condition(perturbation="STAT1"), 0.25), (Condition("rep_1", "STAT1"), 0.5)),
        control_shares=(("validation", 0.1), ("test", 0.3)),
    )
    parts = split.assign(papalexi)
    for replicate in ("rep_1", "rep_2", "rep_3"):
        of_replicate = (papalexi["bio_rep"] == replicate).to_numpy()
        treated = of_replicate & (papalexi["perturbation"] == "STAT1").to_numpy()
        share = 0.5 if replicate == "rep_1" else 0.25
        assert (parts[treated] == "train").sum() == round(share * treated.sum())
        controls = parts[of_replicate & (papalexi["perturbation"] == "control").to_numpy()]
        assert abs((controls == "test").sum() - 0.3 * len(controls)) <= 1
        assert abs((controls == "validation").sum() - 0.1 * len(controls)) <= 1
    assert "in training" in split.describe(papalexi)


@needs_papalexi
def test_draws_depend_on_names_and_seed_alone(papalexi):
    few_shot = ((Condition(perturbation="IRF1"), 0.5),)
    held_out = HeldOut((Condition(perturbation="IRF1"), Condition(perturbation="STAT1")))
    split = ConditionSplit("perturbation", "control", held_out=held_out, few_shot=few_shot)
    parts = pd.Series(split.assign(papalexi), index=papalexi.index)
    shuffled = papalexi.sample(frac=1, random_state=1)
    assert split.assign(shuffled).tolist() == parts[shuffled.index].tolist()
    more = ConditionSplit(
        "perturbation", "control", held_out=held_out, few_shot=(*few_shot, (Condition(perturbation="STAT1"), 0.1))
    ).assign(papalexi)
    of_irf1 = (papalexi["perturbation"] == "IRF1").to_numpy()
    assert more[of_irf1].tolist() == parts[of_irf1].tolist()
    other = ConditionSplit("perturbation", "control", held_out=held_out, few_shot=few_shot, seed=1).assign(papalexi)
    assert (other != parts).any()


NAMES = st.sampled_from(["A", "B", "C", "A+B", "B+A", "A+ctrl", "B+C"])
TYPES = st.sampled_from(["t", "u", "v"])


@st.composite
def cases(draw):
    cells = draw(st.lists(st.tuples(TYPES, NAMES), min_size=1, max_size=40))
    obs = pd.DataFrame([*cells, *[(t, "ctrl") for t in "ttuuvv"]], columns=["cell_type", "perturbation"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    present = st.sampled_from(cells)
    one = present.map(lambda pair: Condition(None, pair[1])) | present.map(lambda pair: Condition(pair[0], None))
    one = one | present.map(lambda pair: Condition(*pair))
    test = draw(st.lists(one, min_size=1, max_size=3, unique=True))
    validation = draw(st.lists(one, max_size=2, unique=True))
    shared = draw(st.lists(st.sampled_from(test), max_size=1))
    return obs, ConditionSplit(
        "perturbation",
        "ctrl",
        "cell_type",
        HeldOut(tuple(test), draw(st.sampled_from(["train", "held out"]))),
        HeldOut(tuple(validation)),
        tuple((condition, 0.4) for condition in shared),
        draw(st.sampled_from([(), (("test", 0.5),)])),
        seed=draw(st.integers(0, 5)),
        allow_in_combinations=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_parts_are_a_partition_and_conditions_stay_apart(case):
    obs, split = case
    try:
        parts = split.assign(obs)
    except LingshuError as error:
        allowed = ("inside a combination", "held out for validation or for test", "Training needs cells")
        assert any(text in str(error) for text in allowed)
        return
    assert set(parts) <= {"train", "validation", "test"} and len(parts) == len(obs)
    names = [canonical_name(name, "+", "ctrl") for name in obs["perturbation"]]
    found = pd.DataFrame({"type": obs["cell_type"].to_numpy(), "name": names, "part": parts})
    found = found[found["name"] != "ctrl"]
    places = found.groupby(["type", "name"])["part"].agg(set)
    few = split.few_shot_conditions(obs)
    assert few <= set(places.index)
    for condition, _ in split.few_shot:
        name = None if condition.perturbation is None else canonical_name(condition.perturbation, "+", "ctrl")
        for (cell_type, perturbation), n_cells in found.groupby(["type", "name"]).size().items():
            if condition.identity in (None, cell_type) and name in (None, perturbation) and n_cells > 1:
                assert (cell_type, perturbation) in few
    assert all(len(where) == 1 for pair, where in places.items() if pair not in few)
    assert all(len(where) == 2 and "train" in where for pair, where in places.items() if pair in few)
    for condition in split.held_out.conditions:
        name = None if condition.perturbation is None else canonical_name(condition.perturbation, "+", "ctrl")
        for (cell_type, perturbation), where in places.items():
            if condition.identity in (None, cell_type) and name in (None, perturbation):
                assert "test" in where
    training = found[found["part"] == "train"]
    if not split.allow_in_combinations and not split.few_shot:
        for condition in split.held_out.conditions:
            if condition.perturbation is not None:
                wanted = set(canonical_name(condition.perturbation, "+", "ctrl").split("+"))
                seen = training[training["type"] == condition.identity] if condition.identity else training
                assert not any(wanted <= set(name.split("+")) for name in seen["name"])
    keys = ["cell_type", "perturbation"]
    check_disjoint(obs[parts == "train"], obs[parts != "train"], keys, control="ctrl", allowed=few)
    if not set(split.held_out.conditions) & set(split.validation.conditions):  # refused in files
        assert in_order(parse_split(tomllib.loads(to_toml(split)))) == in_order(split)
    assert split.summary(obs)[["train", "validation", "test"]].to_numpy().sum() == len(obs)


def in_order(split: ConditionSplit) -> ConditionSplit:
    """The same split with its entries sorted: a file groups them by kind."""

    def by_name(condition: Condition) -> tuple[str, str]:
        return (condition.identity or "", condition.perturbation or "")

    held_out, validation = (
        replace(section, conditions=tuple(sorted(section.conditions, key=by_name)))
        for section in (split.held_out, split.validation)
    )
    few_shot = tuple(sorted(split.few_shot, key=lambda entry: by_name(entry[0])))
    return replace(split, held_out=held_out, validation=validation, few_shot=few_shot)


def test_toml_round_trip_with_awkward_names():
    split = ConditionSplit(
        'pert "x"',
        "ctrl",
        "cell type",
        HeldOut((Condition(perturbation="γ-Oryzanol\t\\"), Condition("T·1", "a'b")), "held out"),
        HeldOut(tuple(Condition(perturbation=f"a rather long name of drug {i}") for i in range(9))),
        ((Condition("T·1", "a'b"), 0.25),),
        (("test", 0.2),),
        3,
        "|",
        True,
    )
    assert parse_split(tomllib.loads(to_toml(split))) == split


def test_combinations_of_held_out_perturbations():
    obs = table({("B", p): 4 for p in ("ctrl", "A", "C", "A+C", "C+D", "ctrl+D")})
    with pytest.raises(
        LingshuError, match=r"inside a combination: 'A\+C' holds 'A' \(1\)\. Hold these combinations out"
    ):
        small().assign(obs)
    both = HeldOut((Condition(perturbation="A"), Condition(perturbation="C+A")))
    parts = small(held_out=both).assign(obs)
    assert set(obs["perturbation"][parts == "test"]) == {"A", "A+C"}
    assert (small(allow_in_combinations=True).assign(obs) == "test").sum() == 4
    pair = small(held_out=HeldOut((Condition(perturbation="A+C"), Condition(perturbation="C+D"))))
    assert "held-out combinations whose every part is trained alone: 'A+C', 'C+D' (2)" in pair.describe(obs)
    spelled = HeldOut((Condition(perturbation="D+ctrl"),))
    assert (small(held_out=spelled, allow_in_combinations=True).assign(obs) == "test").sum() == 4
    assert (small(combination_separator="").assign(obs) == "test").sum() == 4  # labels are opaque names


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"held_out": HeldOut((Condition(perturbation="a"),))}, SIX, "has no 'a' (1). For 'a', did you mean 'A'?"),
        ({"held_out": HeldOut((Condition(perturbation="ctrl"),))}, SIX, "Only perturbations are held out: 'ctrl' is"),
        ({"perturbation_key": "perturbatoin"}, SIX, "there is no 'perturbatoin'. For 'perturbatoin', did you mean"),
        ({"control": "control"}, SIX, "There must be control cells: obs['perturbation'] has no 'control'"),
        (
            {"identity_key": "cell_type"},
            {("B", "ctrl"): 1, ("B", "A"): 2, ("T", "A"): 2},
            "which its responses are measured against: none with obs['perturbation'] == 'ctrl' for 'T' (1)",
        ),
        (
            {"identity_key": "cell_type", "held_out": HeldOut((Condition("B", "C"),))},
            {("B", "ctrl"): 1, ("B", "A"): 2, ("T", "C"): 2},
            "must have cells: no perturbed cell has 'B · C' (1)",
        ),
        (
            {"identity_key": "cell_type", "held_out": HeldOut((Condition("B"),)),
             "validation": HeldOut((Condition("B", "A"),))},
            SIX,
            "held out for validation or for test: every cell of B · A is named by both",
        ),
        ({"few_shot": ((Condition(perturbation="C"), 0.1),)}, SIX, "A few-shot condition must be held out: C is not"),
        ({}, {("B", "A"): 2}, "There must be control cells"),
        ({"control": "A"}, {("B", "A"): 2}, "Only perturbations are held out: 'A' is the control"),
    ],
)  # fmt: skip
def test_refused_on_data(changes, rows, message):
    with pytest.raises(LingshuError) as caught:
        small(**changes).assign(table(rows))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[held_out]\nperturbation = ["A"]', "'perturbation' in split.toml [held_out]. Did you mean 'perturbations'?"),
        ('[hold_out]\nperturbations = ["A"]', "'hold_out' in split.toml. Did you mean 'held_out'?"),
        ('[held_out]\npairs = [{ celltype = "B", perturbation = "A" }]', "Did you mean 'cell_type'?"),
        ('[held_out]\npairs = [{ cell_type = "B" }]', 'Write { cell_type = "…", perturbation = "…" }'),
        ('[held_out]\nperturbations = "A"', "perturbations = 'A' in split.toml [held_out]. Give a list"),
        ("[held_out]\nperturbations = [1]", "Names are text: split.toml [held_out] perturbations has 1 (1)"),
        (
            '[held_out]\nperturbations = ["A", "A"]',
            "An entry is given once: split.toml [held_out] perturbations: A",
        ),
        ('[held_out]\nidentities = ["B"]\ncontrols = "test"', 'Write "train" or "held out"'),
        ('[held_out]\nperturbations = ["A"]\n[few_shot]\nperturbations = ["A"]', "is a table"),
        (
            '[held_out]\nperturbations = ["A"]\n[few_shot]\nperturbations = [{ perturbation = "A", share = 1.0 }]',
            "A share lies between 0 and 1: 1.0 in few_shot.perturbations",
        ),
        ('[held_out]\nperturbations = ["A"]\n[validation]\nperturbations = ["A"]', "named by both: 'A' (1)"),
        ('[held_out]\nperturbations = ["A"]\n[control_shares]\ntest = 0.6\nvalidation = 0.5', "add up to 1 or more"),
        ("", "holds nothing out"),
        ("[held_out", "A split must be a readable TOML file"),
    ],
)
def test_refused_files(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("split.toml").write_text(KANG_HEAD + text)
    with pytest.raises(LingshuError) as caught:
        read_split("split.toml")
    assert message in str(caught.value)


def test_disjointness_is_refused_where_there_is_none():
    obs = table(SIX)
    keys = ["cell_type", "perturbation"]
    is_a = obs["perturbation"] == "A"
    proof = check_disjoint(obs[~is_a], obs[is_a], keys, control="ctrl")
    assert (proof.n_train_conditions, proof.n_test_conditions, proof.n_test_cells) == (2, 2, 20)
    with pytest.raises(LingshuError, match="A cell is in one part only: in both: 'cell0'"):
        check_disjoint(obs, obs[:1], keys, control="ctrl")
    half = obs.iloc[::2], obs.iloc[1::2]
    with pytest.raises(LingshuError, match=r"share no condition: in both: 'B · A', 'B · C', 'T · A', 'T · C' \(4\)"):
        check_disjoint(*half, keys, control="ctrl")
    spelled = obs.assign(perturbation="C+A"), obs.assign(perturbation="A+C").set_index("x" + obs.index)
    with pytest.raises(LingshuError, match=r"'A\+C'"):
        check_disjoint(*spelled, ["perturbation"])


STATE = """
[datasets]
kang = "somewhere/kang"
other = "somewhere/other"
[training]
kang = "train"
other = "train"
[zeroshot]
"kang.NK cells" = "test"
"kang.B cells" = "val"
"other.B cells" = "test"
[fewshot]
[fewshot."kang.CD4 T cells"]
val = ["IFNB"]
test = []
"""


@needs_kang
def test_import_of_states_split(kang, tmp_path):
    file = tmp_path / "state.toml"
    file.write_text(STATE)
    with pytest.raises(LingshuError, match=r"one data set of the file: .* has 'kang', 'other' \(2\)\. Choose one"):
        import_state_toml(file)
    keys = {"perturbation_key": "perturbation", "control": "control"}
    with pytest.warns(UserWarning, match="CD4 T cells: State divides its control cells in proportion"):
        split = import_state_toml(file, dataset="kang", **keys)
    parts = pd.Series(split.assign(kang), index=kang.index)
    assert set(parts[kang["cell_type"] == "NK cells"]) == {"test"}
    assert set(parts[kang["cell_type"] == "B cells"]) == {"validation"}
    treated = (kang["cell_type"] == "CD4 T cells") & (kang["perturbation"] == "IFNB")
    assert set(parts[treated]) == {"validation"} and set(parts[kang["cell_type"] == "CD8 T cells"]) == {"train"}
    file.write_text(STATE.replace("test = []", 'test = ["IFNB"]'))
    with pytest.warns(UserWarning) as caught:
        both = import_state_toml(file, dataset="kang", **keys)
    assert "in val and test in State, here in test only: 'IFNB' (1)" in str(caught[0].message)
    assert Condition("CD4 T cells", "IFNB") in both.held_out.conditions
    file.write_text(STATE.replace('kang = "train"\n', ""))
    with pytest.raises(LingshuError, match="does not list kang, so State leaves them out"):
        import_state_toml(file, dataset="kang")
    file.write_text(STATE.replace('"kang.NK cells" = "test"', 'kang = "test"'))
    with pytest.raises(LingshuError, match="Put the whole name in quotes"):
        import_state_toml(file, dataset="kang")


@needs_papalexi
def test_files_keep_counts_and_obs(tmp_path, capsys):
    source, file = tmp_path / "cells.h5ad", tmp_path / "split.toml"
    whole = ad.read_h5ad(PAPALEXI)[::5].copy()
    whole.layers["twice"] = whole.X * 2
    whole.write_h5ad(source)
    file.write_text(
        'perturbation_key = "perturbation"\ncontrol = "control"\n[held_out]\nperturbations = ["STAT1", "IRF1"]\n'
        '[validation]\nperturbations = ["STAT2"]\n'
        '[few_shot]\nperturbations = [{ perturbation = "IRF1", share = 0.1 }]\n'
    )
    out = tmp_path / "parts"
    split(str(source), file, out=out, json=True)
    given = json.loads(capsys.readouterr().out)
    parts = read_split(file).assign(whole.obs)
    assert given["n_cells"] == {part: int((parts == part).sum()) for part in ("train", "validation", "test")}
    for part, path in given["files"].items():
        made = ad.read_h5ad(path)
        expected = whole[parts == part]
        assert (made.X != expected.X).nnz == 0 and (made.layers["twice"] != expected.layers["twice"]).nnz == 0
        assert made.obs_names.tolist() == expected.obs_names.tolist() and list(made.obs) == list(expected.obs)
        assert (made.obs.astype(str).to_numpy() == expected.obs.astype(str).to_numpy()).all()
        assert read_counts(path).n_cells == given["n_cells"][part]
    assert read_split(out / "split.toml") == read_split(file)
    with pytest.raises(LingshuError, match="Files are not replaced"):
        split(str(source), file, out=out)
    split(str(source), file, out=out, overwrite=True)
    assert "test: STAT1" in capsys.readouterr().out
    broken = np.where(parts == "test", "validation", parts)  # a part that does not follow the split
    broken[np.flatnonzero(parts == "validation")[0]] = "test"
    with pytest.raises(LingshuError, match="Training and test must share no condition"):
        write_parts(str(source), read_split(file), broken, tmp_path / "broken")


@needs_kang
def test_command_line_with_states_file(tmp_path):
    app = typer.Typer()
    app.command()(split)
    state = tmp_path / "state.toml"
    state.write_text('[datasets]\nkang = "x"\n[training]\nkang = "train"\n[zeroshot]\n"kang.B cells" = "test"\n')
    keys = ["--perturbation-key", "perturbation", "--control", "control"]
    run = CliRunner().invoke(app, [str(KANG), "--from-state", str(state), *keys, "--dry-run"])
    assert run.exit_code == 0 and "test: B cells · IFNB (732 cells)" in run.output, run.output
    for words, message in (([], "none is given"), ([str(state), "--from-state", str(state)], "two are given")):
        failed = CliRunner().invoke(app, [str(KANG), *words, "--dry-run"])
        assert isinstance(failed.exception, LingshuError) and message in str(failed.exception)
    failed = CliRunner().invoke(app, [str(KANG), str(state)])
    assert "Name one, or only look with --dry-run" in str(failed.exception)


def test_the_example_of_the_documentation_is_valid():
    text = (Path(__file__).resolve().parents[1] / "docs" / "splits.md").read_text(encoding="utf-8")
    split = parse_split(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    obs = table({(t, p): 10 for t in ("B cells", "NK cells") for p in ("control", "IFNB", "STAT1", "STAT2", "IRF1")})
    obs = pd.concat([obs, table({("B cells", "JAK2"): 3}).set_index(pd.Index(["x", "y", "z"]))])
    counts = split.summary(obs).set_index(["identity", "perturbation"])
    assert counts.loc[("B cells", "IFNB"), ["train", "test"]].tolist() == [1, 9]
    assert counts.loc[("NK cells", "STAT2"), "test"] == 10 and counts.loc[("B cells", "STAT2"), "validation"] == 10
    assert counts.loc[("NK cells", "control"), ["train", "validation", "test"]].tolist() == [7, 1, 2]
