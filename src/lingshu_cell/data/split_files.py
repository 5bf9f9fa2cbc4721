"""Splits as files: our TOML read and written, and that of State (Arc Institute's cell-load) read."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lingshu_cell.data.condition_splits import TEST, TRAIN, VALIDATION, Condition, ConditionSplit, HeldOut
from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_toml

_TOP = {
    "perturbation_key": str,
    "control": str,
    "identity_key": str,
    "seed": int,
    "combination_separator": str,
    "allow_in_combinations": bool,
    "held_out": dict,
    "validation": dict,
    "few_shot": dict,
    "control_shares": dict,
}
_SECTION = {"perturbations": list, "pairs": list, "identities": list}
_HELD_OUT = {**_SECTION, "controls": str}
_TYPE_NAMES = {str: "text", int: "a whole number", bool: "true or false", dict: "a section", list: "a list"}
_STATE_SECTIONS = ("datasets", "training", "zeroshot", "fewshot")
_STATE_PARTS = {"train": TRAIN, "val": VALIDATION, "test": TEST}


def read_split(path: Path | str) -> ConditionSplit:
    """Read a split from TOML; docs/splits.md explains every key.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    ConditionSplit
        The split, not yet compared with any data.

    Raises
    ------
    LingshuError
        If the file is no TOML, a key is unknown or missing, or a value has the wrong type, or an entry is given twice.
    """
    return parse_split(_read_toml(path), str(path))


def parse_split(values: Mapping[str, Any], where: str = "the split") -> ConditionSplit:
    """Build a split from what its TOML file holds.

    Parameters
    ----------
    values
        Nested mapping with the keys of the file.
    where
        Name of the source, for errors.

    Returns
    -------
    ConditionSplit
        The split.

    Raises
    ------
    LingshuError
        See :func:`read_split`.
    """
    _check_keys(values, _TOP, where)
    missing = [key for key in ("perturbation_key", "control") if key not in values]
    if missing:
        remedy = 'Write e.g. perturbation_key = "perturbation" and control = "control"'
        raise LingshuError("A split names its column of perturbations and its control", f"no {missing[0]}", remedy)
    keys = (values.get("identity_key"), values["perturbation_key"])
    sections = {name: values.get(name, {}) for name in ("held_out", "validation", "few_shot", "control_shares")}
    held_out, validation = (_held_out(sections[name], name, keys, where) for name in ("held_out", "validation"))
    twice = set(held_out.conditions) & set(validation.conditions)
    if twice:
        finding = f"named by both: {offenders(sorted(map(str, twice)))}"
        raise LingshuError("A condition is held out for validation or for test", finding, "Leave it out of one section")
    if not (held_out.conditions or validation.conditions or sections["control_shares"]):
        raise LingshuError("A split holds something out", f"{where} holds nothing out", "Fill its [held_out] section")
    _check_keys(sections["few_shot"], _SECTION, f"{where} [few_shot]")
    few_shot = tuple(_entries(sections["few_shot"], "few_shot", keys, where, shares=True))
    _check_keys(sections["control_shares"], {VALIDATION: float, TEST: float}, f"{where} [control_shares]")
    shares = tuple((part, float(share)) for part, share in sections["control_shares"].items())
    for part, share in shares:
        _check_share(share, f"control_shares.{part}")
    if sum(share for _, share in shares) >= 1:
        raise LingshuError(
            "Training keeps control cells", f"control_shares of {where} add up to 1 or more", "Lower them"
        )
    seed = values.get("seed", 0)
    if seed < 0:
        raise LingshuError("The seed is 0 or more", f"seed = {seed} in {where}", "Choose another one")
    plain = {key: values[key] for key in ("combination_separator", "allow_in_combinations") if key in values}
    return ConditionSplit(
        perturbation_key=values["perturbation_key"],
        control=values["control"],
        identity_key=values.get("identity_key"),
        held_out=held_out,
        validation=validation,
        few_shot=few_shot,
        control_shares=shares,
        seed=seed,
        **plain,
    )


def to_toml(split: ConditionSplit) -> str:
    """Write a split as TOML that :func:`read_split` reads back to the same split.

    Parameters
    ----------
    split
        Any split.

    Returns
    -------
    str
        The text of the file.
    """
    keys = (split.identity_key, split.perturbation_key)
    lines = [f"perturbation_key = {_text(split.perturbation_key)}", f"control = {_text(split.control)}"]
    if split.identity_key is not None:
        lines.append(f"identity_key = {_text(split.identity_key)}")
    lines += [f"seed = {split.seed}", f"combination_separator = {_text(split.combination_separator)}"]
    lines.append(f"allow_in_combinations = {json.dumps(split.allow_in_combinations)}")
    for name, section in (("held_out", split.held_out), ("validation", split.validation)):
        if section != HeldOut():
            lines += ["", f"[{name}]", *_section_lines([(condition, None) for condition in section.conditions], keys)]
            lines.append(f"controls = {_text(section.controls)}")
    if split.few_shot:
        lines += ["", "[few_shot]", *_section_lines(split.few_shot, keys)]
    if split.control_shares:
        lines += ["", "[control_shares]", *(f"{part} = {share!r}" for part, share in split.control_shares)]
    return "\n".join(lines) + "\n"


def import_state_toml(
    path: Path | str,
    *,
    perturbation_key: str = "gene",
    control: str = "non-targeting",
    identity_key: str = "cell_type",
    dataset: str | None = None,
    seed: int = 0,
) -> ConditionSplit:
    """Read a split of State: ``[datasets]``, ``[training]``, ``[zeroshot]`` and ``[fewshot."dataset.cell_type"]``.

    A zero-shot cell type is held out with its control cells, as State does. Listed perturbations of a few-shot cell
    type become pairs; its control cells all stay in training, where State divides them in proportion (a warning says
    so).

    Parameters
    ----------
    path
        State's TOML file.
    perturbation_key, control, identity_key
        What State gets on its command line as ``pert_col``, ``control_pert`` and ``cell_type_key``; its defaults.
    dataset
        The data set of the file that the cells at hand belong to; may be None where there is one only.
    seed
        Seed of the split.

    Returns
    -------
    ConditionSplit
        The same held-out conditions; write it with :func:`to_toml`.

    Raises
    ------
    LingshuError
        If the file is no TOML of State, names several data sets and none is chosen, or uses what has no counterpart.

    References
    ----------
    The format: README of https://github.com/ArcInstitute/cell-load.
    """
    values = _read_toml(path)
    sections = {name: values.get(name, {}) for name in _STATE_SECTIONS}
    if wrong := [name for name, section in sections.items() if not isinstance(section, Mapping)]:
        raise LingshuError("Sections of State hold entries", f"not so in {path}: {offenders(wrong)}", "Mend the file")
    if not (sections["zeroshot"] or sections["fewshot"]):
        finding = f"{path} has {offenders(values)}"
        remedy = "Check that it is State's file"
        raise LingshuError("A split of State has [zeroshot] or [fewshot] entries", finding, remedy)
    dataset = _state_dataset(sections, dataset, str(path))
    if sections["training"].get(dataset) != "train":
        raise LingshuError(
            "Cell types that no entry names must train",
            f"[training] of {path} does not list {dataset}, so State leaves them out",
            f'Remove them from the cells, and add {dataset} = "train" under [training]',
        )
    held_out: dict[str, list[Condition]] = {VALIDATION: [], TEST: []}
    whole: dict[str, set[str]] = {VALIDATION: set(), TEST: set()}
    for identity, part in _state_entries(sections["zeroshot"], dataset, str(path)).items():
        if not isinstance(part, str) or part not in _STATE_PARTS:
            raise LingshuError("State's parts are train, val and test", f"'{identity}' = {part!r}", "Mend the file")
        if part != "train":
            whole[_STATE_PARTS[part]].add(identity)
            held_out[_STATE_PARTS[part]].append(Condition(identity=identity))
    for identity, lists in _state_entries(sections["fewshot"], dataset, str(path)).items():
        _check_keys(lists, {"val": list, "test": list}, f'{path} [fewshot."{dataset}.{identity}"]')
        if identity not in whole[VALIDATION] | whole[TEST]:  # State looks at [zeroshot] first
            for part, pairs in _state_pairs(identity, lists).items():
                held_out[part] += pairs
    modes = {part: "held out" if whole[part] else "train" for part in (VALIDATION, TEST)}
    return ConditionSplit(
        perturbation_key,
        control,
        identity_key,
        held_out=HeldOut(tuple(held_out[TEST]), modes[TEST]),
        validation=HeldOut(tuple(held_out[VALIDATION]), modes[VALIDATION]),
        seed=seed,
        combination_separator="",  # a label is an opaque name to State
    )


def _state_dataset(sections: Mapping[str, Mapping[str, Any]], dataset: str | None, where: str) -> str:
    named = {str(key).split(".")[0] for name in ("zeroshot", "fewshot") for key in sections[name]}
    named |= set(sections["training"])
    if dataset is None and len(named) == 1:
        return named.pop()
    if dataset not in named:
        finding = f"{where} has {offenders(sorted(named))}" + (f", not '{dataset}'" if dataset else "")
        raise LingshuError("The cells at hand belong to one data set of the file", finding, "Choose one with --dataset")
    return dataset


def _state_pairs(identity: str, lists: Mapping[str, Sequence[str]]) -> dict[str, list[Condition]]:
    """Give the pairs of a few-shot cell type; those in both lists only test."""
    test, validation = (list(dict.fromkeys(lists.get(word, ()))) for word in ("test", "val"))
    both = sorted(set(test) & set(validation))
    if both:
        _warn(f"{identity}: in val and test in State, here in test only: {offenders(both)}")
    if test or validation:
        _warn(f"{identity}: State divides its control cells in proportion, here all train; see [control_shares]")
    return {
        TEST: [Condition(identity, name) for name in test],
        VALIDATION: [Condition(identity, name) for name in validation if name not in both],
    }


def _state_entries(section: Mapping[str, Any], dataset: str, where: str) -> dict[str, Any]:
    undotted = [key for key in section if "." not in key]
    if undotted:
        finding = f"{where} has {offenders(undotted)}"
        raise LingshuError('State\'s entries are named "dataset.cell_type"', finding, "Put the whole name in quotes")
    return {key.split(".", 1)[1]: value for key, value in section.items() if key.split(".")[0] == dataset}


def _held_out(section: Mapping[str, Any], name: str, keys: tuple[str | None, str], where: str) -> HeldOut:
    _check_keys(section, _HELD_OUT, f"{where} [{name}]")
    controls = section.get("controls", "train")
    if controls not in ("train", "held out"):
        remedy = 'Write "train" or "held out"'
        raise LingshuError("Controls of held-out identities train or are held out", f"controls = {controls!r}", remedy)
    return HeldOut(tuple(condition for condition, _ in _entries(section, name, keys, where, shares=False)), controls)


def _entries(
    section: Mapping[str, Any], name: str, keys: tuple[str | None, str], where: str, shares: bool
) -> list[tuple[Condition, float]]:
    """Read the lists of a section; with ``shares`` every entry is a table that holds a share."""
    identity_key, perturbation_key = keys
    wanted = {"perturbations": (perturbation_key,), "pairs": keys, "identities": (identity_key,)}
    found: list[tuple[Condition, float]] = []
    for kind in _SECTION:
        place = f"{where} [{name}] {kind}"
        if section.get(kind) and None in wanted[kind]:
            raise LingshuError("Identities need their column", f"{place} without identity_key", "Set identity_key")
        for entry in section.get(kind, ()):
            table = entry if shares or kind == "pairs" else {wanted[kind][0]: entry}
            expected = {str(key): str for key in wanted[kind]} | ({"share": float} if shares else {})
            example = ", ".join(f"{key} = {'0.1' if key == 'share' else chr(34) + '…' + chr(34)}" for key in expected)
            if not isinstance(table, Mapping):
                raise LingshuError(f"An entry of {place} is a table", f"{entry!r}", f"Write {{ {example} }}")
            _check_keys(table, expected, place)
            if len(table) < len(expected):
                raise LingshuError(f"An entry of {place} has all its keys", f"{dict(table)}", f"Write {{ {example} }}")
            if shares:
                _check_share(table["share"], f"{name}.{kind}")
            identity = None if kind == "perturbations" else table[identity_key]
            condition = Condition(identity, None if kind == "identities" else table[perturbation_key])
            if condition in [earlier for earlier, _ in found]:
                raise LingshuError("An entry is given once", f"{place}: {condition} twice", "Leave one out")
            found.append((condition, float(table.get("share", 0))))
    return found


def _check_keys(values: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    if not isinstance(values, Mapping):
        raise LingshuError(
            "A section of a split holds keys", f"{where} is {values!r}", "Write [section] and key = value"
        )
    for key, value in values.items():
        if key not in known:
            close = get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            guess = f"Did you mean '{close[0]}'? " if close else ""
            remedy = f"{guess}Known: {', '.join(known)}"
            raise LingshuError("Every key of a split must be known", f"'{key}' in {where}", remedy)
        wanted = (int, float) if known[key] is float else known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and known[key] is not bool):
            expected = _TYPE_NAMES.get(known[key], "a number")
            raise LingshuError("Every key of a split has its type", f"{key} = {value!r} in {where}", f"Give {expected}")
        if known[key] is list and key in ("perturbations", "identities", "val", "test"):
            _check_texts(value, f"{where} {key}", tables="few_shot" in where)


def _check_texts(values: Sequence[Any], where: str, tables: bool) -> None:
    wrong = [value for value in values if not isinstance(value, Mapping if tables else str)]
    if wrong and not tables:
        raise LingshuError("Names are text", f"{where} has {offenders(wrong)}", 'Put them in quotes, e.g. "IRF1"')


def _check_share(share: float, where: str) -> None:
    if not 0 < share < 1:
        remedy = "Choose e.g. 0.1, or leave the entry out"
        raise LingshuError("A share lies between 0 and 1", f"{share} in {where}", remedy)


def _section_lines(entries: Sequence[tuple[Condition, float | None]], keys: tuple[str | None, str]) -> list[str]:
    kinds: dict[str, list[str]] = {kind: [] for kind in _SECTION}
    for condition, share in entries:
        names = {keys[0]: condition.identity, keys[1]: condition.perturbation}
        given = {str(key): name for key, name in names.items() if name is not None}
        kind = "pairs" if len(given) == 2 else "perturbations" if condition.identity is None else "identities"
        table = ", ".join(f"{_key(key)} = {_text(name)}" for key, name in given.items())
        if share is not None:
            kinds[kind].append(f"{{ {table}, share = {share!r} }}")
        else:
            kinds[kind].append(f"{{ {table} }}" if kind == "pairs" else _text(next(iter(given.values()))))
    return [f"{kind} = [{_laid_out(items)}]" for kind, items in kinds.items() if items]


def _laid_out(items: Sequence[str]) -> str:
    line = ", ".join(items)
    return line if len(line) < 100 else "\n" + "".join(f"  {item},\n" for item in items)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _read_toml(path: Path | str) -> dict[str, Any]:
    return read_toml(path, "A split must be a readable TOML file")


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
