"""Settings, splits, arguments of the command line, and outputs that cannot be written."""

# ruff: noqa: E501 - a case is one line
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from malformed.catalogue import Collector
from malformed.examples import tiny
from malformed.harness import ACCEPTED, REFUSED

CASES = Collector()
DATA = "data.h5ad"


def _at(examples: Path) -> None:
    Path(DATA).symlink_to(examples / "cells.h5ad")
    Path("model").symlink_to(examples / "run")


# --- TOML of settings -------------------------------------------------------------------------------------------------


def _toml(text: str | bytes) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        Path("my.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return ["config", "--config", "my.toml"]

    return make


for _what, _expected, _text in (
    ("an empty file", ACCEPTED, ""),
    ("only a comment", ACCEPTED, "# nothing"),
    ("a byte order mark", ACCEPTED, b"\xef\xbb\xbf[training]\nsteps = 3\n"),
    ("lines that end in CR LF", ACCEPTED, b"[training]\r\nsteps = 3\r\n"),
    ("UTF-16", REFUSED, "[training]\nsteps = 3\n".encode("utf-16")),
    ("bytes that are no text", REFUSED, b"[training]\nsteps = \xff\n"),
    ("a zero byte", REFUSED, b"[training]\nsteps = 3\0\n"),
    ("no value", REFUSED, "[training]\nsteps =\n"),
    ("an open bracket", REFUSED, "[training\nsteps = 3\n"),
    ("a duplicated key", REFUSED, "[training]\nsteps = 3\nsteps = 4\n"),
    ("a duplicated section", REFUSED, "[training]\nsteps = 3\n[training]\nseed = 4\n"),
    ("an unknown section", REFUSED, "[trainings]\nsteps = 3\n"),
    ("an unknown key", REFUSED, "[training]\nstep = 3\n"),
    ("a key without its section", REFUSED, "steps = 3\n"),
    ("a section that is a number", REFUSED, "training = 3\n"),
    ("a section that is a list", REFUSED, "[[training]]\nsteps = 3\n"),
    ("a nested section", REFUSED, "[training.more]\nsteps = 3\n"),
    ("text in place of a number", REFUSED, '[training]\nminibatch_size = "many"\n'),
    ("a number in place of text", REFUSED, "[data]\nlayer = 3\n"),
    ("a number in place of a list", REFUSED, "[data]\ncondition_keys = 3\n"),
    ("text in place of a list", REFUSED, '[data]\ncondition_keys = "cell_type"\n'),
    ("a list of lists", REFUSED, '[data]\ncondition_keys = [["a"], ["b"]]\n'),
    ("a date", REFUSED, "[training]\nsteps = 2026-11-25\n"),
    ("a fraction in place of a whole number", REFUSED, "[training]\nminibatch_size = 1.5\n"),
    ("truth in place of a number", REFUSED, "[training]\npeak_learning_rate = [true]\n"),
    ("NaN", REFUSED, "[training]\npeak_learning_rate = nan\n"),
    ("infinity", REFUSED, "[training]\npeak_learning_rate = inf\n"),
    ("an infinite guidance", REFUSED, "[generation]\nguidance_scale = inf\n"),
    ("a NaN share", REFUSED, "[data]\nvalidation_fraction = nan\n"),
    ("NaN betas", REFUSED, "[training]\nbetas = [nan, 0.9]\n"),
    ("betas above 1", REFUSED, "[training]\nbetas = [0.9, 1.5]\n"),
    ("three betas", REFUSED, "[training]\nbetas = [0.9, 0.9, 0.9]\n"),
    ("an average of negative width", REFUSED, "[training]\nema_sigma_rel = [-0.05, 0.1]\n"),
    ("an average of infinite width", REFUSED, "[training]\nema_sigma_rel = [inf, 0.1]\n"),
    ("0 steps", REFUSED, "[training]\nsteps = 0\n"),
    ("-1 steps", REFUSED, "[training]\nsteps = -1\n"),
    ("1e999 steps", REFUSED, "[training]\nsteps = 1e999\n"),
    ("a seed of 2^31", REFUSED, "[training]\nseed = 2147483648\n"),
    ("a number of 5,000 digits", REFUSED, f"[training]\nsteps = {'9' * 5000}\n"),
    ("a number of 100 digits", ACCEPTED, f"[generation]\nsteps = 1.{'9' * 100}\n"),
    ("100,000 open brackets", REFUSED, f"x = {'[' * 100_000}"),
    ("100,000 nested tables", REFUSED, "x = " + "{a=" * 100_000),
    ("100,000 unknown keys", REFUSED, "[training]\n" + "\n".join(f"k{i} = 1" for i in range(100_000))),
    ("a key of 100,000 characters", REFUSED, f"[training]\n{'k' * 100_000} = 1\n"),
    ("a key with terminal escapes", REFUSED, '[training]\n"\\u001b[2J" = 1\n'),
    ("a key with markup", REFUSED, '[training]\n"[red]" = 1\n'),
    ("a width of 10^12", REFUSED, "[network]\nwidth = 1000000000000\n"),
    ("10^9 blocks", REFUSED, "[network]\nn_blocks = 1000000000\n"),
    ("an unknown network", REFUSED, '[network]\nkind = "perceptron"\n'),
    ("a network that is a number", REFUSED, "network = 3\n"),
    ("heads that do not divide the width", REFUSED, '[network]\nkind = "transformer"\nwidth = 30\nn_heads = 7\n'),
    ("keys of another network", REFUSED, '[network]\nkind = "transformer"\ngene_width = 8\n'),
    ("an unknown preset", REFUSED, 'preset = "huge"\n'),
    ("a preset that is a list", REFUSED, 'preset = ["small"]\n'),
    ("a control without a perturbation key", REFUSED, '[data]\ncontrol = "control"\n'),
    ("a perturbation key without a control", REFUSED, '[data]\nperturbation_key = "p"\n'),
    ("a perturbation key that is a condition key", REFUSED,
     '[data]\nperturbation_key = "p"\ncontrol = "c"\ncondition_keys = ["p"]\n'),
    ("condition keys given twice", REFUSED, '[data]\ncondition_keys = ["a", "a"]\n'),
    ("an unknown device", ACCEPTED, '[training]\ndevice = "abacus"\n'),
):  # fmt: skip
    CASES("settings", _what, _expected)(_toml(_text))


def _special_settings(prepare: Callable[[], object]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        prepare()
        return ["config", "--config", "my.toml"]

    return make


def _sparse_file() -> None:
    with open("my.toml", "wb") as stream:
        stream.truncate(1 << 29)


for _what, _prepare in (
    ("no file", lambda: None),
    ("a folder", lambda: Path("my.toml").mkdir()),
    ("a named pipe", lambda: os.mkfifo("my.toml")),
    ("an endless device", lambda: os.symlink("/dev/zero", "my.toml")),
    ("a link to itself", lambda: os.symlink("my.toml", "my.toml")),
    ("a file of 500 MB", _sparse_file),
):
    CASES("settings file", _what, REFUSED)(_special_settings(_prepare))

for _what, _setting in (
    ("empty", ""), ("without a value", "training.steps"), ("without a section", "steps=3"),
    ("of three parts", "training.steps.more=3"), ("of an unknown key", "training.no=3"),
    ("of an empty key", "training.=3"), ("of an empty value", "training.steps="), ("of a negative number", "training.steps=-3"),
    ("of a fraction", "training.steps=1.5"), ("of NaN", "training.weight_decay=nan"), ("of infinity", "training.clip_norm=inf"),
    ("of 1e999", "training.weight_decay=1e999"), ("of words", "training.minibatch_size=many"),
    ("of code", "training.steps=__import__('os').system('touch EXECUTED')"),
    ("of a table", "training.steps={a=1}"), ("of nested brackets", f"training.steps={'[' * 100_000}"),
    ("of 5,000 digits", f"training.steps={'9' * 5000}"), ("of no Unicode", "data.layer=" + os.fsdecode(b"\xff")),
    ("of two lines", "training.steps=3\nseed=4"), ("of a huge minibatch", f"training.minibatch_size={10**12}"),
    ("of a device that is none", "training.device=abacus"), ("of a GPU that is not there", "training.device=cuda:99"),
    ("of a learning rate of 1e300", "training.peak_learning_rate=1e300"),
    ("of a validation share that leaves nothing", "data.validation_fraction=0.999"),
    ("of a gene threshold beyond all cells", "data.min_cells_per_gene=1000000000"),
):  # fmt: skip

    def _set(setting: str) -> Callable[[Path], list[str]]:
        def make(examples: Path) -> list[str]:
            _at(examples)
            return ["train", DATA, "--out", "run", *tiny(), "--set", setting]

        return make

    CASES("--set", _what, REFUSED)(_set(_setting))


# --- splits -----------------------------------------------------------------------------------------------------------

_HEAD = (
    'perturbation_key = "perturbation"\ncontrol = "control"\nidentity_key = "cell_type"\nallow_in_combinations = true\n'
)
_WHOLE = _HEAD + '[held_out]\npairs = [{ cell_type = "B", perturbation = "GENE1" }]\n'


def _split(text: str | bytes) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        _at(examples)
        Path("split.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
        return ["split", DATA, "split.toml", "--out", "parts"]

    return make


for _what, _expected, _text in (
    ("whole", ACCEPTED, _WHOLE),
    ("a byte order mark", ACCEPTED, b"\xef\xbb\xbf" + _WHOLE.encode()),
    ("lines that end in CR LF", ACCEPTED, _WHOLE.replace("\n", "\r\n")),
    ("empty", REFUSED, ""),
    ("no control", REFUSED, 'perturbation_key = "perturbation"\n[held_out]\nperturbations = ["GENE1"]\n'),
    ("nothing held out", REFUSED, _HEAD),
    ("a control that no cell has", REFUSED, _WHOLE.replace('"control"', '"DMSO"')),
    ("a column that is not there", REFUSED, _WHOLE.replace('"perturbation"', '"drug"')),
    ("a pair that no cell has", REFUSED, _WHOLE.replace('"GENE1"', '"GENE9"')),
    ("an identity that no cell has", REFUSED, _WHOLE.replace('"B"', '"Z"')),
    ("control cells held out as a perturbation", REFUSED, _HEAD + '[held_out]\nperturbations = ["control"]\n'),
    ("every identity held out, control cells aside", ACCEPTED, _HEAD + '[held_out]\nidentities = ["B", "T"]\n'),
    ("every perturbation held out", ACCEPTED, _HEAD + '[held_out]\nperturbations = ["GENE1", "GENE2", "GENE1+GENE2"]\n'),
    ("an entry twice", REFUSED, _HEAD + '[held_out]\nperturbations = ["GENE1", "GENE1"]\n'),
    ("an entry in two sections", REFUSED,
     _HEAD + '[held_out]\nperturbations = ["GENE1"]\n[validation]\nperturbations = ["GENE1"]\n'),
    ("identity and perturbation in one column", REFUSED, _WHOLE.replace('"cell_type"', '"perturbation"', 1)),
    ("a list that is text", REFUSED, _HEAD + '[held_out]\nperturbations = "GENE1"\n'),
    ("a list of numbers", REFUSED, _HEAD + "[held_out]\nperturbations = [1, 2]\n"),
    ("a list of lists", REFUSED, _HEAD + '[held_out]\nperturbations = [["GENE1"]]\n'),
    ("pairs of text", REFUSED, _HEAD + '[held_out]\npairs = ["B GENE1"]\n'),
    ("pairs with other keys", REFUSED, _HEAD + '[held_out]\npairs = [{ a = "B", b = "GENE1" }]\n'),
    ("pairs that lack a key", REFUSED, _HEAD + '[held_out]\npairs = [{ cell_type = "B" }]\n'),
    ("pairs of numbers", REFUSED, _HEAD + "[held_out]\npairs = [{ cell_type = 1, perturbation = 2 }]\n"),
    ("identities without their column", REFUSED,
     'perturbation_key = "perturbation"\ncontrol = "control"\n[held_out]\nidentities = ["B"]\n'),
    ("an unknown key", REFUSED, _WHOLE + "[held_outs]\na = 1\n"),
    ("a section that is a list", REFUSED, _HEAD + "held_out = [1]\n"),
    ("a control that is a list", REFUSED, _WHOLE.replace('"control"', '["control"]')),
    ("a control that is empty", REFUSED, _WHOLE.replace('"control"', '""')),
    ("a negative seed", REFUSED, "seed = -1\n" + _WHOLE),
    ("a seed of text", REFUSED, 'seed = "one"\n' + _WHOLE),
    ("a seed that is true", REFUSED, "seed = true\n" + _WHOLE),
    ("a seed of 40 digits", ACCEPTED, f"seed = {'9' * 40}\n" + _WHOLE),
    ("a share of 2", REFUSED, _HEAD + "[control_shares]\ntest = 2.0\n"),
    ("a share of NaN", REFUSED, _HEAD + "[control_shares]\ntest = nan\n"),
    ("shares of 1 in all", REFUSED, _HEAD + "[control_shares]\ntest = 0.5\nvalidation = 0.5\n"),
    ("a share of an unknown part", REFUSED, _HEAD + "[control_shares]\ntrain = 0.5\n"),
    ("a few-shot share of 0", REFUSED,
     _WHOLE + '[few_shot]\npairs = [{ cell_type = "B", perturbation = "GENE1", share = 0 }]\n'),
    ("a few-shot share of text", REFUSED,
     _WHOLE + '[few_shot]\npairs = [{ cell_type = "B", perturbation = "GENE1", share = "half" }]\n'),
    ("few-shot without a share", REFUSED, _WHOLE + '[few_shot]\npairs = [{ cell_type = "B", perturbation = "GENE1" }]\n'),
    ("few-shot of what is not held out", REFUSED,
     _WHOLE + '[few_shot]\npairs = [{ cell_type = "T", perturbation = "GENE2", share = 0.5 }]\n'),
    ("a separator of a number", REFUSED, "combination_separator = 3\n" + _WHOLE),
    ("controls that are neither", REFUSED, _WHOLE + 'controls = "maybe"\n'),
    ("bytes that are no text", REFUSED, b"\xff\xfe"),
    ("100,000 open brackets", REFUSED, "x = " + "[" * 100_000),
    ("a number of 5,000 digits", REFUSED, f"seed = {'9' * 5000}\n" + _WHOLE),
    ("labels with terminal escapes", REFUSED, _HEAD + '[held_out]\nperturbations = ["\\u001b[2J"]\n'),
    ("labels of 100,000 characters", REFUSED, _HEAD + f'[held_out]\nperturbations = ["{"x" * 100_000}"]\n'),
):  # fmt: skip
    CASES("split", _what, _expected)(_split(_text))

_STATE = '[training]\nd = "train"\n[zeroshot]\n"d.B" = "test"\n'


def _state(text: str) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        _at(examples)
        Path("state.toml").write_text(text, encoding="utf-8")
        keys = ["--perturbation-key", "perturbation", "--control", "control"]
        return ["split", DATA, "--from-state", "state.toml", *keys, "--out", "parts"]

    return make


for _what, _expected, _text in (
    ("whole", ACCEPTED, _STATE),
    ("empty", REFUSED, ""),
    ("a section that is text", REFUSED, 'zeroshot = "d.B"\n'),
    ("a section that is a number", REFUSED, _STATE + "[fewshot]\n\"d.T\" = 3\n"),
    ("training that is a list", REFUSED, 'training = ["d"]\n[zeroshot]\n"d.B" = "test"\n'),
    ("datasets that is a number", REFUSED, "datasets = 3\n" + _STATE),
    ("entries without a point", REFUSED, '[training]\nd = "train"\n[zeroshot]\nB = "test"\n'),
    ("entries without quotes", REFUSED, '[training]\nd = "train"\n[zeroshot]\nd.B = "test"\n'),
    ("a part that nobody knows", REFUSED, _STATE.replace('"test"', '"exam"')),
    ("a part that is a number", REFUSED, _STATE.replace('"test"', "3")),
    ("a part that is a list", REFUSED, _STATE.replace('"test"', '["test"]')),
    ("a cell type that no cell has", REFUSED, _STATE.replace("d.B", "d.Z")),
    ("two data sets", REFUSED, _STATE + '"e.B" = "test"\n'),
    ("few-shot lists of numbers", REFUSED, '[training]\nd = "train"\n[fewshot."d.B"]\ntest = [1, 2]\n'),
    ("few-shot lists that are text", REFUSED, '[training]\nd = "train"\n[fewshot."d.B"]\ntest = "GENE1"\n'),
    ("few-shot of unknown parts", REFUSED, '[training]\nd = "train"\n[fewshot."d.B"]\nexam = ["GENE1"]\n'),
    ("few-shot of labels that no cell has", REFUSED, '[training]\nd = "train"\n[fewshot."d.B"]\ntest = ["GENE9"]\n'),
    ("a data set that does not train", REFUSED, _STATE.replace('d = "train"', 'd = "test"')),
):  # fmt: skip
    CASES("State's split", _what, _expected)(_state(_text))

# --- arguments --------------------------------------------------------------------------------------------------------

_G = ["generate", "model", "--out", "g.h5ad"]
_T = ["train", DATA, "--out", "run", *tiny()]
_P = ["prepare", DATA, "--out", "store"]
_KEYS = ["--perturbation-key", "perturbation", "--control", "control"]
_NO_TEXT = os.fsdecode(b"\xff\xfe")
for _what, _words in (
    ("an unknown command", ["sing"]),
    ("an empty command", [""]),
    ("an unknown option", ["train", "--sing"]),
    ("no arguments of train", ["train"]),
    ("an option without a value", ["train", DATA, "--out"]),
    ("an option with markup", ["train", "--[red]"]),
    ("an option with a terminal escape", ["train", "--\x1b[2J"]),
    ("an argument of no Unicode", [_NO_TEXT]),
    ("an argument of 100,000 characters", ["x" * 100_000]),
    ("0 cells", [*_G, "--n", "0"]),
    ("-1 cells", [*_G, "--n", "-1"]),
    ("half a cell", [*_G, "--n", "0.5"]),
    ("1e3 cells", [*_G, "--n", "1e3"]),
    ("NaN cells", [*_G, "--n", "nan"]),
    ("no number of cells", [*_G, "--n", ""]),
    ("cells of other digits", [*_G, "--n", "²"]),
    ("steps of other digits", [*_G, "--n", "2", "--steps", "²"]),
    ("0 steps", [*_G, "--n", "2", "--steps", "0"]),
    ("-1 steps", [*_G, "--n", "2", "--steps", "-1"]),
    ("--1 steps", [*_G, "--n", "2", "--steps", "--1"]),
    ("many steps", [*_G, "--n", "2", "--steps", "many"]),
    ("10^30 steps", [*_G, "--n", "2", "--steps", "1" + "0" * 30]),
    ("5,000 digits of steps", [*_G, "--n", "2", "--steps", "9" * 5000]),
    ("a schedule that falls", [*_G, "--n", "2", "--schedule", "10,1"]),
    ("a schedule beyond the genes", [*_G, "--n", "2", "--schedule", "1,1000000"]),
    ("a schedule of words", [*_G, "--n", "2", "--schedule", "1,two"]),
    ("a schedule of 5,000 digits", [*_G, "--n", "2", "--schedule", "9" * 5000]),
    ("an empty schedule", [*_G, "--n", "2", "--schedule", ""]),
    ("a KL of 0", [*_G, "--n", "2", "--steps", "auto", "--max-kl", "0"]),
    ("a KL of NaN", [*_G, "--n", "2", "--steps", "auto", "--max-kl", "nan"]),
    ("a negative seed", [*_G, "--n", "2", "--seed", "-1"]),
    ("a seed of 2^31", [*_G, "--n", "2", "--seed", str(2**31)]),
    ("a minibatch of 0", [*_G, "--n", "2", "--minibatch-size", "0"]),
    ("guidance of NaN", [*_G, "--n", "2", "--guidance-scale", "nan"]),
    ("guidance of 1e999", [*_G, "--n", "2", "--guidance-scale", "1e999"]),
    ("negative guidance", [*_G, "--n", "2", "--guidance-scale", "-1"]),
    ("guidance in a space that is none", [*_G, "--n", "2", "--guidance-scale", "2", "--guidance-space", "outer"]),
    ("a condition without a value", [*_G, "--n", "2", "--condition", "cell_type"]),
    ("a condition of an empty value", [*_G, "--n", "2", "--condition", "cell_type="]),
    ("a condition of an unknown field", [*_G, "--n", "2", "--condition", "donor=1"]),
    ("a condition of an unknown value", [*_G, "--n", "2", "--condition", "cell_type=Z"]),
    ("a condition twice", [*_G, "--n", "2", "--condition", "cell_type=B", "--condition", "cell_type=T"]),
    ("a condition of no Unicode", [*_G, "--n", "2", "--condition", f"cell_type={_NO_TEXT}"]),
    ("a condition of terminal escapes", [*_G, "--n", "2", "--condition", "cell_type=\x1b[2J"]),
    ("a combination of a part with itself", [*_G, "--n", "2", "--condition", "perturbation=GENE1+GENE1"]),
    ("a combination with an empty part", [*_G, "--n", "2", "--condition", "perturbation=GENE1+"]),
    ("only separators", [*_G, "--n", "2", "--condition", "perturbation=+++"]),
    ("a perturbation that is unknown", [*_G, "--n", "2", "--condition", "perturbation=GENE99"]),
    ("a policy that is none", [*_G, "--n", "2", "--unseen", "guess"]),
    ("a negative dose", [*_G, "--n", "2", "--dose", "-1"]),
    ("a dose of NaN", [*_G, "--n", "2", "--dose", "nan"]),
    ("a depth of 0", [*_G, "--n", "2", "--depth", "0"]),
    ("a depth of 1e999", [*_G, "--n", "2", "--depth", "1e999"]),
    ("a clamp without a count", [*_G, "--n", "2", "--clamp", "GENE1"]),
    ("a clamp of a fraction", [*_G, "--n", "2", "--clamp", "GENE1=1.5"]),
    ("a negative clamp", [*_G, "--n", "2", "--clamp", "GENE1=-1"]),
    ("a clamp of 10^30", [*_G, "--n", "2", "--clamp", "GENE1=1" + "0" * 30]),
    ("a clamp of 5,000 digits", [*_G, "--n", "2", "--clamp", "GENE1=" + "9" * 5000]),
    ("a clamp of an unknown gene", [*_G, "--n", "2", "--clamp", "XYZ=1"]),
    ("a tilt of 0", [*_G, "--n", "2", "--tilt", "GENE1=0"]),
    ("a tilt of NaN", [*_G, "--n", "2", "--tilt", "GENE1=nan"]),
    ("a tilt of 1e999", [*_G, "--n", "2", "--tilt", "GENE1=1e999"]),
    ("a tilt file that is not there", [*_G, "--n", "2", "--tilt", "nothing.csv"]),
    ("a device that is none", [*_G, "--n", "2", "--device", "abacus"]),
    ("a GPU that is not there", [*_G, "--n", "2", "--device", "cuda:99"]),
    ("a device of meta tensors", [*_G, "--n", "2", "--device", "meta"]),
    ("a second CPU", [*_G, "--n", "2", "--device", "cpu:99"]),
    ("a run that is a file", ["generate", DATA, "--out", "g.h5ad", "--n", "2"]),
    ("a run that is empty", ["generate", "", "--out", "g.h5ad", "--n", "2"]),
    ("conditions and none", [*_T, "--no-conditions", "--condition-key", "cell_type"]),
    ("a condition key that is not there", [*_T, "--condition-key", "donor"]),
    ("an empty condition key", [*_T, "--condition-key", ""]),
    ("a condition key twice", [*_T, "--condition-key", "cell_type", "--condition-key", "cell_type"]),
    ("the perturbation key as condition key", [*_T, *_KEYS, "--condition-key", "perturbation"]),
    ("a control without a perturbation key", [*_T, "--control", "control"]),
    ("a control that no cell has", [*_T, "--perturbation-key", "perturbation", "--control", "DMSO"]),
    ("an empty control", [*_T, "--perturbation-key", "perturbation", "--control", ""]),
    ("a split without a perturbation key", [*_T, "--split", "split.toml"]),
    ("an unknown preset", [*_T, "--preset", "huge"]),
    ("a run to resume that is not there", [*_T, "--resume"]),
    ("a dose that is text", [*_T, *_KEYS, "--set", "data.dose_key=cell_type"]),
    ("cells per shard of 0", [*_P, "--cells-per-shard", "0"]),
    ("a mitochondrial share of 2", [*_P, "--max-mito", "2"]),
    ("a mitochondrial share of NaN", [*_P, "--max-mito", "nan"]),
    ("filters that keep no cell", [*_P, "--min-counts", "1000000000"]),
    ("filters that keep no gene", [*_P, "--min-cells-per-gene", "1000000000"]),
    ("an obs key that is not there", [*_P, "--obs-key", "donor"]),
    ("a file twice", ["prepare", DATA, DATA, "--out", "store"]),
    ("a join that is none", [*_P, "--join", "sideways"]),
    ("a species of a stranger", [*_P, "--species-of", "other.h5ad=mouse"]),
    ("a species without a file", [*_P, "--species-of", "mouse"]),
    ("a species of no name", [*_P, "--species-of", f"{DATA}="]),
    ("an ortholog table that is not there", [*_P, "--orthologs", "nothing.csv"]),
    ("0 splits", ["evaluate", "--real", DATA, "--generated", DATA, "--out", "e", "--splits", "0"]),
    ("0 cells to evaluate", ["evaluate", "--real", DATA, "--generated", DATA, "--out", "e", "--max-cells", "0"]),
    ("-1 cells to evaluate", ["evaluate", "--real", DATA, "--generated", DATA, "--out", "e", "--max-cells", "-1"]),
    ("a cell type key that is not there", ["evaluate", "--real", DATA, "--generated", DATA, "--out", "e",
                                           "--cell-type-key", "kind"]),
    ("real cells as training cells", ["evaluate", "--real", DATA, "--generated", DATA, "--training", DATA, "--out", "e"]),
    ("a control without a key", ["evaluate", "--real", DATA, "--generated", DATA, "--out", "e", "--control", "control"]),
    ("two splits", ["split", DATA, "a.toml", "--from-state", "b.toml", "--out", "parts"]),
    ("no split", ["split", DATA, "--out", "parts"]),
    ("a split without an output", ["split", DATA, "a.toml"]),
    ("an unknown baseline", ["baseline", "magic", "--training", DATA, "--like", DATA, *_KEYS, "--out", "p.h5ad"]),
    ("0 cells of a baseline", ["baseline", "additive", "--training", DATA, "--like", DATA, *_KEYS, "--out", "p.h5ad",
                               "--n", "0"]),
    ("no source of embeddings", ["embeddings", "--out", "e.npz"]),
    ("0 components", ["embeddings", "--from-counts", DATA, "--components", "0", "--out", "e.npz"]),
    ("embeddings of an unknown ending", ["embeddings", "--from-counts", DATA, "--out", "e.xyz"]),
    ("scales that are words", ["calibrate", "model", "--data", DATA, "--scales", "a,b"]),
    ("scales of NaN", ["calibrate", "model", "--data", DATA, "--scales", "nan,nan"]),
    ("one scale", ["calibrate", "model", "--data", DATA, "--scales", "1"]),
    ("negative scales", ["calibrate", "model", "--data", DATA, "--scales", "-2,-1"]),
    ("0 threads", ["de", DATA, *_KEYS, "--out", "d", "--threads", "0"]),
    ("an export of nothing", ["export", "vcc2026", "--genes", "g.txt"]),
    ("an export without genes", ["export", "vcc2026", DATA, "--out", "s.h5ad"]),
    ("a negative number of export genes", ["export", "vcc2026", DATA, "--genes", "g.txt", "--out", "s.h5ad",
                                           "--n-genes", "-1"]),
    ("a title and no folder", ["report", "nowhere", "--title", "x"]),
):  # fmt: skip

    def _arguments(words: list[str]) -> Callable[[Path], list[str]]:
        def make(examples: Path) -> list[str]:
            _at(examples)
            return words

        return make

    CASES("arguments", _what, REFUSED)(_arguments(_words))

# --- outputs ----------------------------------------------------------------------------------------------------------

_WRITERS = {
    "generate": ["generate", "model", "--n", "2", "--out"],
    "train": ["train", DATA, *tiny(), "--out"],
    "prepare": ["prepare", DATA, "--out"],
    "split": ["split", DATA, "split.toml", "--out"],
    "embeddings": ["embeddings", "--from-counts", DATA, "--components", "2", "--out"],
    "baseline": ["baseline", "additive", "--training", DATA, "--like", DATA, *_KEYS, "--out"],
}  # fmt: skip
_FOLDERS = ("train", "prepare", "split")


def _read_only_folder() -> None:
    Path("closed").mkdir()
    for path in (Path(DATA), *Path("model").rglob("*")):
        path.chmod(0o777)
    os.chmod("closed", 0o500)
    if os.geteuid() == 0:
        os.chmod(".", 0o777)
        os.seteuid(65534)


for _command, _words in _WRITERS.items():
    _ending = "" if _command in _FOLDERS else (".npz" if _command == "embeddings" else ".h5ad")
    for _what, _name, _prepare in (
        ("under a file", f"file/out{_ending}", lambda: Path("file").touch()),
        ("that is a device without space", "/dev/full", lambda: None),
        ("that is a folder, or a file in place of one", f"there{_ending}",
         lambda e=_ending: Path(f"there{e}").mkdir() if e else Path("there").write_text("x")),
        ("that exists", f"there{_ending}",
         lambda e=_ending: Path(f"there{e}").write_text("x") if e
         else [Path("there").mkdir(), Path("there/notes.txt").touch(), Path("there/train.h5ad").touch()]),
        ("in a folder without rights", f"closed/out{_ending}", _read_only_folder),
        ("of 5,000 characters", "x" * 5000 + _ending, lambda: None),
        ("of no name", "", lambda: None),
        ("that is a link to itself", f"loop{_ending}", lambda e=_ending: os.symlink(f"loop{e}", f"loop{e}")),
        ("that is a named pipe", f"pipe{_ending}", lambda e=_ending: os.mkfifo(f"pipe{e}")),
    ):  # fmt: skip

        def _writing(words: list[str], name: str, prepare: Callable[[], object]) -> Callable[[Path], list[str]]:
            def make(examples: Path) -> list[str]:
                for source in ("cells.h5ad", "run"):
                    if (examples / source).is_dir():
                        shutil.copytree(examples / source, "model")
                    else:
                        shutil.copy(examples / source, DATA)
                Path("split.toml").write_text(_WHOLE)
                prepare()
                return [*words, name]

            return make

        replaced = "link to itself" in _what and _command in ("generate", "baseline")
        CASES(f"output of {_command}", _what, ACCEPTED if replaced else REFUSED)(_writing(_words, _name, _prepare))
