"""Labels come apart into perturbations and nothing else, and doses are numbers above 0."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingshu_cell.data.condition_labels import canonical_name
from lingshu_cell.data.de_tables import DE_COLUMNS, silenced_genes
from lingshu_cell.data.perturbations import PerturbationVocabulary, check_log_doses
from lingshu_cell.errors import LingshuError
from lingshu_cell.perturbation_effects import Screen

names = st.text(
    st.characters(codec="utf-8", exclude_characters="+()[]{}", exclude_categories=("Z", "C")), min_size=1
).filter(lambda name: name.strip() == name and name != "control")


@given(st.sets(names, min_size=1, max_size=6), st.data())
def test_any_combination_comes_apart_into_its_parts(singles, data):
    parts = data.draw(st.permutations(sorted(singles)))[: data.draw(st.integers(1, 3))]
    vocabulary = PerturbationVocabulary.from_labels(["control", *singles], "control")
    assert vocabulary.names == ("control", *sorted(singles))
    label = "+".join(parts)
    assert sorted(vocabulary.parts(label)) == sorted(parts)
    applied = vocabulary.encode([label, "control", *parts])
    assert applied.dtype == np.float32
    np.testing.assert_array_equal(applied[0], applied[2:].sum(0))
    assert applied[1].tolist() == [1] + [0] * len(singles)
    assert PerturbationVocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_parts_known_from_combinations_alone_are_known():
    vocabulary = PerturbationVocabulary.from_labels(["ctrl", "B+A", "B+C"], "ctrl")
    assert vocabulary.names == ("ctrl", "A", "B", "C")
    np.testing.assert_array_equal(vocabulary.encode(["A+C"]), [[0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("label", "separator", "parts"),
    [
        ("A + B", "+", ["A", "B"]),
        ("A+ctrl", "+", ["A"]),
        ("ctrl+A", "+", ["A"]),
        ("A_B", "_", ["A", "B"]),
        ("A+B", "", ["A+B"]),
        ("A+B", "_", ["A+B"]),
        ("A::B", "::", ["A", "B"]),
        ("ctrl", "+", ["ctrl"]),
        ("A B", "+", ["A B"]),
        ("Na+", "+", ["Na+"]),
        ("Na++A", "+", ["Na++A"]),
        ("(+)-JQ1", "+", ["(+)-JQ1"]),
        ("(+)-JQ1+A", "+", ["(+)-JQ1", "A"]),
        ("A+Verapamil [(R)+(S)]", "+", ["A", "Verapamil [(R)+(S)]"]),
        ("(A+B)", "+", ["(A+B)"]),
        ("1)A+B", "+", ["1)A+B"]),
        ("A+ctrl+ctrl", "+", ["A"]),
    ],
)
def test_separators(label, separator, parts):
    vocabulary = PerturbationVocabulary.from_labels(["ctrl", "A"], "ctrl", separator)
    assert vocabulary.parts(label) == parts


def test_a_control_label_with_the_separator_in_it_is_never_taken_apart():
    vocabulary = PerturbationVocabulary.from_labels(["non+targeting", "A"], "non+targeting")
    assert vocabulary.names == ("non+targeting", "A")
    assert vocabulary.encode(["non+targeting"]).tolist() == [[1, 0]]


def test_every_reader_of_labels_takes_them_apart_in_the_same_way():
    """Splits, baselines, prior effects and DE tables read what the vocabulary of training reads."""
    for label in ("B+A", "A+ctrl", "Na+", "(+)-JQ1+A", "ctrl", "A+"):
        parts = PerturbationVocabulary(("ctrl",)).parts(label)
        assert canonical_name(label, "+", "ctrl") == "+".join(parts)
        screen = Screen(None, "ctrl", "+", {})
        assert screen.parts(label, set(parts)) == parts
        assert screen.parts(label, set()) == [label]
    table = pd.DataFrame(columns=DE_COLUMNS)
    assert silenced_genes(table, "(+)-JQ1+A", ["A", "(+)-JQ1"]) == ("(+)-JQ1", "A")


def test_new_names_stand_behind_the_known_ones_and_known_ones_are_not_doubled():
    vocabulary = PerturbationVocabulary(("ctrl", "B"), "+").extended(["A", "B", "A"])
    assert vocabulary.names == ("ctrl", "B", "A")
    assert vocabulary.encode(["A+B"]).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("labels", "rule", "finding", "remedy"),
    [
        (["A", "B"], "Control cells must be there", "no cell is labelled 'ctrl'", "Labels: 'A', 'B' (2)"),
        (["ctrl", "A", " "], "Every cell needs a perturbation label", "some are ' '",
         "Name what was done, or leave them out"),
        (["ctrl", ""], "Every cell needs a perturbation label", "some are ''", None),
        (["ctrl"], "There must be perturbed cells", "every cell is labelled 'ctrl'", "Check data.control"),
        (["ctrl", "A+A"], "A combination must join different perturbations",
         "'A+A' taken apart at '+' gives 'A', 'A' (2)",
         "Mend the label, or set combination_separator to what joins them (empty: labels stay whole)"),
        (["ctrl", "ctrl+ctrl"], "A combination must join different perturbations",
         "'ctrl+ctrl' taken apart at '+' gives 'ctrl', 'ctrl' (2)", None),
        (["ctrl", "A", "Lopinavir+Ritonavir", "A+B"],
         "A combination must have a part that is also in another label; otherwise it may be one name",
         "joined by '+', with no part in any other label: 'Lopinavir+Ritonavir' (1)",
         'Set data.combination_separator="" if labels are names, or to another sign that joins yours'),
    ],
)  # fmt: skip
def test_labels_that_make_no_sense_are_refused(labels, rule, finding, remedy):
    with pytest.raises(LingshuError) as caught:
        PerturbationVocabulary.from_labels(labels, "ctrl")
    assert caught.value.rule == rule
    assert finding is None or caught.value.finding == finding
    assert remedy is None or caught.value.remedy == remedy


def test_unknown_perturbations_are_listed_at_most_five():
    vocabulary = PerturbationVocabulary(("ctrl", "A", "B"), "+")
    with pytest.raises(LingshuError) as caught:
        vocabulary.encode(["A+X1", "X2", "X1", *(f"Y{i}" for i in range(5))])
    assert caught.value.rule == "Perturbations must be among those the model knows"
    assert caught.value.finding == "it does not know 'X1', 'X2', 'Y0', 'Y1', 'Y2', … (7)"
    assert caught.value.remedy == "Known: 'ctrl', 'A', 'B' (3); others need an embedding, see --unseen"


@pytest.mark.parametrize(
    ("doses", "finding"),
    [
        (np.array([1.0, 0.0, np.nan]), "2 of 3 perturbed cells have '0.0', 'nan' (2)"),
        (np.array([-1.0, np.inf, 2.0]), "2 of 3 perturbed cells have '-1.0', 'inf' (2)"),
        (np.array(["high", "2", "low"], dtype=object), "2 of 3 perturbed cells have 'high', 'low' (2)"),
        (np.array([pd.NA, 1.0], dtype=object), "1 of 2 perturbed cells have '<NA>' (1)"),
    ],
    ids=str,
)
def test_doses_that_are_none_are_refused(doses, finding):
    with pytest.raises(LingshuError) as caught:
        check_log_doses(doses)
    assert caught.value.rule == "A dose must be a number above 0 in every perturbed cell"
    assert caught.value.finding == finding
    assert caught.value.remedy == "Give every perturbed cell its dose in one unit; control cells may lack it"


def test_doses_written_as_text_are_read():
    np.testing.assert_allclose(check_log_doses(np.array(["1", "10"], dtype=object)), [0, np.log(10)])
