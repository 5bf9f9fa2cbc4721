"""The page of perturbation responses: what an evaluation of predicted responses says, for a reader."""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.judgement import number
from lingshu_cell.metrics.cell_eval import average_score
from lingshu_cell.metrics.differential import FACTS_NAME
from lingshu_cell.pages import flat_facts, template_environment
from lingshu_cell.response_judgement import (
    ENERGY_CLOSE,
    ENERGY_GOOD,
    LEAST_CEILING,
    LEVELS,
    direction,
    effect_size,
    finite,
    relative,
    response_verdict,
    within,
)
from lingshu_cell.response_section import DIFFERENTIAL_FOLDERS, read_responses, response_section

RESPONSES_NAME = "responses.json"
_GUIDE = Path(__file__).parent / "templates" / "response_guide.toml"
_NEEDED = {"summary": dict, "settings": dict, "controls": dict, "n": dict, "notes": list}
_MOST_SHOWN, _MOST_ROWS = 40, 1000
_NO_EFFECT = 0.05  # p of the E-test between real perturbed and control cells
_COLUMNS = (
    ("Pearson-Δ", "pearson_delta"),
    ("Slope", "lfc_slope"),
    ("DES", "cell_eval_des"),
    ("MAE", "mae_log1p"),
    ("Energy distance", "e_distance"),
)
_PIXELS_PER_POINT, _GUESSED_WIDTH = 4 / 3, 420


def render_responses(folder: Path, *, title: str | None = None, baseline: Path | None = None) -> str:
    """Turn the folder of an evaluation of responses into the text of a self-contained HTML page.

    Parameters
    ----------
    folder
        Folder with ``responses.json`` and ``conditions.csv``; pictures of genes are added where it holds the folders
        ``de_real`` and ``de_predicted`` of ``lingshu de``.
    title
        Heading of the page; by default it names the predicted file.
    baseline
        Folder of the evaluation of a baseline's cells on the same real cells, to be shown beside.

    Returns
    -------
    HTML in which every name that a user could have chosen is escaped.

    Raises
    ------
    LingshuError
        If a file is missing, unreadable or not whole, or the baseline was judged against other cells.
    """
    folder = Path(folder)
    try:
        return _rendered(folder, title, baseline)
    except LingshuError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:  # its parts do not fit
        raise LingshuError(
            "An evaluation must be whole", f"{folder}: {type(error).__name__}: {error}", "Evaluate the cells again"
        ) from error


def _rendered(folder: Path, title: str | None, baseline: Path | str | None) -> str:
    environment = template_environment()
    table, record = read_responses(folder)
    _check(record)
    table = _ranked(table)
    other = record.get("baseline") or {} if baseline is None else _read_baseline(Path(baseline), record)
    score = _score(record, other)
    against = f"the baseline {other['name']}" if other.get("name") else "the baseline that the evaluation was given"
    files = {part: _file_name(record, part) for part in ("real", "predicted", "training")}
    rows = _rows(table, record.get("provenance"))
    return environment.get_template("responses.html.jinja").render(
        title=title or f"Predicted responses against measured ones: {files['predicted'] or folder.resolve().name}",
        record=record,
        evaluated=datetime.fromtimestamp((folder / RESPONSES_NAME).stat().st_mtime).strftime("%d %B %Y, %H:%M"),
        files=files,
        model=_model_line(record.get("provenance")),
        verdict=response_verdict(table, record, score, against),
        levels=LEVELS[:-1],
        least_ceiling=LEAST_CEILING,
        tiles=_tiles(record, other, score),
        against=against if other else None,
        columns=[cell["label"] for cell in rows[0]["cells"]] if rows else [],
        rows=rows,
        most_shown=_MOST_SHOWN,
        n_more=len(table) - len(rows),
        own_words=_own_words(record.get("provenance")),
        figures=_figures(folder),
        tables=_tables(record, other, score),
        controls=record["controls"],
        provenance=flat_facts(record.get("provenance") or {}),
        facts=_facts(record, files),
        commands=_commands(record, files, folder.resolve().name),
    )


def _check(record: object) -> None:
    """Refuse a record that is not what an evaluation of responses writes."""
    found = record if isinstance(record, dict) else {}
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise LingshuError(
            f"{RESPONSES_NAME} must be as the evaluation wrote it",
            f"missing or of another kind: {offenders(wrong)}",
            "Run lingshu evaluate with --perturbation-key again; its files are not meant to be edited",
        )


def _read_baseline(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read what is shown of a baseline, and refuse one that was judged against other cells."""
    theirs = read_responses(folder)[1]
    _check(theirs)
    differing = [name for name, value in record["settings"].items() if theirs["settings"].get(name) != value]
    if differing:
        raise LingshuError(
            "The baseline must be judged against the same cells",
            f"different: {offenders(differing)}",
            "Evaluate the baseline's cells with the same real data and settings, and give that folder",
        )
    name = (theirs.get("provenance") or {}).get("baseline") or folder.resolve().name
    return {"name": name, "summary": theirs["summary"], "cell_eval": theirs.get("cell_eval")}


def _score(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """The average score of the prediction and of other real cells, and of each metric; None without a baseline."""
    ours, baseline = record.get("cell_eval") or {}, (other.get("cell_eval") or {}).get("mean")
    found = {}
    for prefix in ("", "ceiling_"):
        name = f"{prefix}average_score"
        if baseline is not None and ours.get(f"{prefix}mean"):
            found[prefix] = average_score(ours[f"{prefix}mean"], baseline)
        elif ours.get(name):
            found[prefix] = ours[name]
    if "" not in found:
        return None
    ceiling = found.get("ceiling_", {})
    labels = {metric["name"]: metric["label"].split(",")[0] for entry in _guide() for metric in entry["metric"]}
    return {
        **found[""],
        "left_out": [labels.get(name, name) for name in found[""].get("left_out", ())],
        "ceiling": ceiling.get("average"),
        "ceiling_scores": ceiling.get("scores", {}),
    }


def _guide() -> list[dict[str, Any]]:
    return tomllib.loads(_GUIDE.read_text(encoding="utf-8"))["table"]


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Conditions by the share of the ceiling that they reach, worst first, those without a verdict last."""
    table = table.assign(**{c: np.nan for c in ("pearson_delta", "ceiling_pearson_delta") if c not in table})
    value, ceiling = table["pearson_delta"], table["ceiling_pearson_delta"]
    share = (value / ceiling).where(ceiling >= LEAST_CEILING)
    judged = share.notna().astype(int) * 2 + value.notna()
    order = pd.DataFrame({"judged": -judged, "share": share.fillna(value)})
    return table.loc[order.sort_values(["judged", "share"], kind="stable").index]


def _rows(table: pd.DataFrame, provenance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One row per condition: who, how many cells, metrics beside their ceilings, remarks."""
    shown = [(label, name) for label, name in _COLUMNS if name in table and table[name].notna().any()]
    rows = []
    for _, row in table.head(_MOST_ROWS).iterrows():
        get = {name: finite(value) for name, value in row.items()}.get
        marks = {
            "pearson_delta": direction(get("pearson_delta"), get("ceiling_pearson_delta"))[1],
            "lfc_slope": effect_size(get("lfc_slope"), get("ceiling_lfc_slope"))[1],
            "cell_eval_des": relative(get("cell_eval_des"), get("ceiling_cell_eval_des")),
            "mae_log1p": relative(get("mae_log1p"), get("ceiling_mae_log1p"), lower_is_better=True),
            "e_distance": _energy_mark(get("e_distance"), get("ceiling_e_distance"), get("e_distance_effect")),
        }
        cells = [
            {"label": label, "name": name, "value": get(name), "ceiling": get(f"ceiling_{name}"), "mark": marks[name]}
            for label, name in shown
        ]
        identity = row["identity"] if isinstance(row["identity"], str) else ""
        counts = {name: get(name) for name in ("n_real", "n_predicted", "n_judged", "n_de_real", "n_de_predicted")}
        who = {"identity": identity, "perturbation": row["perturbation"]}
        rows.append({**who, **counts, "cells": cells, "notes": _remarks(row, get, identity, provenance)})
    return rows


def _energy_mark(value: float | None, ceiling: float | None, effect: float | None) -> str | None:
    """Mark the energy distance by the share of the response that is still to go, beyond that of other real cells."""
    if value is None or effect is None or effect <= 0:
        return None
    return within((value - (ceiling or 0.0)) / effect, ENERGY_GOOD, ENERGY_CLOSE)


def _remarks(row: pd.Series, get, identity: str, provenance: Mapping[str, Any] | None) -> list[str]:
    """What limits the verdict of one condition, and what the model said of it."""
    if get("n_judged") is None:
        return ["too few cells to be judged"]
    remarks, ceiling, p_value = [], get("ceiling_pearson_delta"), get("e_test_effect_p")
    if ceiling is not None and ceiling < LEAST_CEILING:
        remarks.append("real cells hardly respond: not judged")
    elif p_value is not None and p_value > _NO_EFFECT:
        remarks.append("real cells may not respond at all (E-test)")
    asked = [str(value) for value in ((provenance or {}).get("condition") or {}).values()]
    if {row["perturbation"], *filter(None, [identity])} <= set(asked):
        remarks += _own_words(provenance)["notes"]
    return remarks


def _own_words(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Remarks and confidence that the predicted file brings along in ``uns``, and the condition they are about."""
    source = provenance or {}
    inner = source.get("perturbation") if isinstance(source.get("perturbation"), Mapping) else {}
    notes = [note for place in (source, inner) for note in _texts(place.get("notes"))]
    notes += [f"confidence {place['confidence']}" for place in (source, inner) if place.get("confidence") is not None]
    condition = source.get("condition") if isinstance(source.get("condition"), Mapping) else {}
    return {"notes": notes, "about": ", ".join(f"{key} = {value}" for key, value in condition.items())}


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _tiles(
    record: Mapping[str, Any], other: Mapping[str, Any], score: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The numbers of the headline, each beside other real cells and the baseline."""

    def take(key: str, name: str, mean: str = "mean") -> tuple[float | None, float | None, float | None]:
        places = ((record, ""), (record, "ceiling_"), (other, ""))
        if key == "summary":
            return tuple(finite(place.get(key, {}).get(name, {}).get(f"{pre}{mean}")) for place, pre in places)
        return tuple(finite(((place.get(key) or {}).get(f"{pre}mean") or {}).get(name)) for place, pre in places)

    pearson, slope = take("summary", "pearson_delta"), take("summary", "lfc_slope", "pooled")
    des, mae = take("cell_eval", "des"), take("summary", "mae_log1p")
    energy = take("summary", "e_distance")
    effect = finite(record["summary"].get("e_distance_effect", {}).get("mean"))
    size = "" if effect is None else f"control to perturbed {effect:.2g}"
    average = (score["average"], score["ceiling"], 0.0) if score else (None, None, None)
    tiles = [
        ("Pearson-Δ, change from control", pearson, direction(*pearson[:2])[1], "higher is better"),
        ("Slope of log fold changes", slope, effect_size(*slope[:2])[1], "1 is calibrated"),
        ("DES, changed genes found", des, relative(*des[:2]), "higher is better"),
        ("MAE of mean log expression", mae, relative(*mae[:2], lower_is_better=True), "lower is better"),
        ("Energy distance", energy, _energy_mark(energy[0], energy[1], effect), size or "lower is better"),
        ("Average score of cell-eval", average, "", "0 baseline, 1 perfect"),
    ]
    return [
        {"name": name, "value": values[0], "ceiling": values[1], "baseline": values[2], "mark": mark, "read": read}
        for name, values, mark, read in tiles
        if values[0] is not None
    ]


def _tables(
    record: Mapping[str, Any], other: Mapping[str, Any], score: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Every measurement with its meaning, in the tables of the guide; those that were not run are left out."""
    tables = []
    for entry in _guide():
        columns = _COLUMNS_OF[entry["key"]](record, other, score)
        if columns is None:
            continue
        rows = [
            {**metric, "values": [finite(values.get(metric["name"])) for _, values in columns]}
            for metric in entry["metric"]
            if any(metric["name"] in values for _, values in columns)
        ]
        kept = [i for i in range(len(columns)) if i == 0 or any(row["values"][i] is not None for row in rows)]
        for row in rows:
            row["values"] = [row["values"][i] for i in kept]
        tables.append({**entry, "columns": [columns[i][0] for i in kept], "rows": rows})
    return tables


def _summary_columns(record, other, score) -> list[tuple[str, dict[str, Any]]]:
    def part(place: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {name: entry.get(key) for name, entry in place.get("summary", {}).items()}

    def pooled(place: Mapping[str, Any], key: str = "pooled") -> dict[str, Any]:
        return {"lfc_slope_pooled": place.get("summary", {}).get("lfc_slope", {}).get(key)}

    return [
        ("Prediction", part(record, "mean") | pooled(record)),
        ("Other real cells", part(record, "ceiling_mean") | pooled(record, "ceiling_pooled")),
        ("Baseline", part(other, "mean") | pooled(other)),
        ("Median", part(record, "median")),
        ("Conditions", part(record, "n")),
    ]


def _truth_columns(record, other, score) -> list[tuple[str, dict[str, Any]]]:
    parts = (("mean", "Mean"), ("median", "Median"), ("n", "Conditions"))
    return [(label, {name: entry.get(key) for name, entry in record["summary"].items()}) for key, label in parts]


def _cell_eval_columns(record, other, score) -> list[tuple[str, dict[str, Any]]] | None:
    found = record.get("cell_eval")
    if not found:
        return None
    return [
        ("Prediction", found.get("mean") or {}),
        ("Other real cells", found.get("ceiling_mean") or {}),
        ("Baseline", (other.get("cell_eval") or {}).get("mean") or {}),
        ("Score", score["scores"] if score else {}),
        ("Score of other real cells", score["ceiling_scores"] if score else {}),
    ]


def _cell_eval2_columns(record, other, score) -> list[tuple[str, dict[str, Any]]] | None:
    found = record.get("cell_eval2")
    if not found:
        return None
    names = {"overall": "Prediction", "ceiling_overall": "Other real cells", "baseline": "Mean response"}
    return [(label, found.get(part) or {}) for part, label in (names | {"scores": "Score"}).items()]


_COLUMNS_OF = {
    "summary": _summary_columns,
    "truth": _truth_columns,
    "cell_eval": _cell_eval_columns,
    "cell_eval2": _cell_eval2_columns,
}


def _figures(folder: Path) -> list[dict[str, Any]]:
    """Pictures with their natural width in pixels; what many captions say of controls and test is said once."""
    import matplotlib

    facts = folder / DIFFERENTIAL_FOLDERS[0] / FACTS_NAME
    said = json.loads(facts.read_text(encoding="utf-8"))["readme"] if facts.is_file() else ""
    figures, captions = [], set()
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a name is no formula
        drawn = response_section(folder)
    for figure in drawn:
        box = re.search(r'viewBox="[\d.e-]+ [\d.e-]+ ([\d.]+) ', figure.svg)
        width = round(float(box.group(1)) * _PIXELS_PER_POINT) if box else _GUESSED_WIDTH
        caption, repeated = figure.caption, said and figure.caption.endswith(said)
        if repeated and said in captions:
            caption = caption.removesuffix(said) + "Controls and test: as said of the dots above."
        captions |= {said} if repeated else set()
        figures.append({"title": figure.title, "svg": figure.svg, "caption": caption, "width": width})
    return figures


def _file_name(record: Mapping[str, Any], part: str) -> str | None:
    """Name of a file without the folders of somebody's machine."""
    entry = (record.get("files") or {}).get(part)
    return Path(str(entry["source"])).name if isinstance(entry, Mapping) and entry.get("source") else None


def _model_line(provenance: Mapping[str, Any] | None) -> str:
    """What made the cells, in one line."""
    source = provenance or {}
    parts = [source.get(name) for name in ("generation", "perturbation")]
    found = {key: value for part in (*parts, source) if isinstance(part, Mapping) for key, value in part.items()}
    words = {"baseline": "baseline {}", "preset": "preset {}", "checkpoint_step": "trained for {} steps"}
    words |= {"schedule": "{} schedule", "steps": "{} sampling steps"}
    words |= {"guidance_scale": "guidance {}", "seed": "seed {}"}
    known = {key: found[key] for key in words if isinstance(found.get(key), str | int | float)}
    said = [words[key].format(value if key == "seed" else number(value)) for key, value in known.items()]
    return " · ".join(said) or "unknown: the predicted file does not say"


def _facts(record: Mapping[str, Any], files: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """How the cells were judged: settings, files by name, versions, seconds."""
    named = {
        part: {**entry, "source": files.get(part) or entry.get("source")}
        for part, entry in (record.get("files") or {}).items()
        if isinstance(entry, Mapping)
    }
    wanted = ("settings", "n", "pca", "real_perturbed_cells_also_in_training", "versions", "seconds")
    return flat_facts({"files": named, **{key: record[key] for key in wanted if key in record}})


def _commands(record: Mapping[str, Any], files: Mapping[str, str | None], name: str) -> list[str]:
    """The commands that lead to this page again, as far as the record tells."""
    settings = record["settings"]
    real, predicted = files["real"] or "REAL.h5ad", files["predicted"] or "PREDICTED.h5ad"
    labels: list[object] = []
    for key in ("perturbation_key", "control", "identity_key"):
        if settings.get(key) is not None:
            labels += [f"--{key.replace('_', '-')}", settings[key]]
    training = ["--training", files["training"]] if files["training"] else []
    seed = ["--seed", settings["seed"]] if settings.get("seed") is not None else []
    lines: list[list[object]] = [
        ["evaluate", "--real", real, "--generated", predicted, *training, *labels, *seed, "--out", name],
        ["de", real, *labels, "--out", f"{name}/de_real"],
        ["de", predicted, "--controls", real, *labels, "--out", f"{name}/de_predicted"],
        ["report", name],
    ]
    return [" ".join(shlex.quote(str(word)) for word in ("lingshu", *line)) for line in lines]
