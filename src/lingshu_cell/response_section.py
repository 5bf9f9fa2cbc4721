"""The part of a report about perturbation responses: what an evaluation and its DE tables give pictures of."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lingshu_cell.errors import LingshuError, offenders
from lingshu_cell.input_files import read_json, refuse_special
from lingshu_cell.metrics.differential import README_NAME, SIGNIFICANT, DifferentialTables, read_differential
from lingshu_cell.output_files import writable, write_text
from lingshu_cell.response_figures import (
    dot_plot,
    fold_changes,
    ranked_conditions,
    standalone,
    strongest,
    top_genes,
    volcano,
)

DIFFERENTIAL_FOLDERS = ("de_real", "de_predicted")
_TITLES = {
    "pearson_delta": "Pearson correlation of the change from control",
    "lfc_slope": "slope of predicted on measured log fold change",
    "mae_log1p": "mean absolute error of log1p means",
    "mae_delta": "mean absolute error of the change from control",
    "e_distance": "energy distance",
}
_AGAIN = "Run lingshu evaluate with --perturbation-key and give its folder"
_LOWER_IS_BETTER = ("mae_log1p", "mae_delta", "e_distance")


class ResponseFigure(NamedTuple):
    """A picture with what is said of it.

    Parameters
    ----------
    title
        Heading.
    svg
        ``<svg>`` element in the page's own colours.
    caption
        How to read it.
    """

    title: str
    svg: str
    caption: str


def response_section(
    folder: Path,
    *,
    measured: Path | None = None,
    predicted: Path | None = None,
    metric: str = "pearson_delta",
    n_conditions: int = 3,
) -> list[ResponseFigure]:
    """Make the pictures of an evaluation of responses, for a report.

    Parameters
    ----------
    folder
        Folder with ``responses.json`` and ``conditions.csv``.
    measured, predicted
        Folders of DE tables of the real and of the predicted cells (``lingshu de``); by default ``de_real`` and
        ``de_predicted`` in ``folder``, where they are.
    metric
        Column of conditions.csv that ranks the conditions.
    n_conditions
        So many of the worst-predicted conditions that have measured effects get a scatter and a volcano plot.

    Returns
    -------
    list of ResponseFigure
        Title, ``<svg>`` element and caption of each picture.

    Raises
    ------
    LingshuError
        If the folder is not one of an evaluation of responses, or a table is broken.
    """
    folder = Path(folder)
    table, record = read_responses(folder)
    settings = record.get("settings", {})
    found = {}
    for name, given in zip(DIFFERENTIAL_FOLDERS, (measured, predicted), strict=True):
        place = folder / name if given is None else Path(given)
        found[name] = read_differential(place) if given is not None or place.is_dir() else None
    real, generated = (found[name] for name in DIFFERENTIAL_FOLDERS)
    section = [_ranking(table, column, settings) for column in dict.fromkeys((metric, "lfc_slope")) if column in table]
    if real is None:
        return section
    shared = {} if generated is None else {c: generated.tables[c] for c in real.tables if c in generated.tables}
    section.append(_dots(real, shared))
    ranked = table.dropna(subset=metric) if metric in table else table
    if metric in table:
        ranked = ranked.sort_values(metric, ascending=metric not in _LOWER_IS_BETTER, kind="stable")
    shown = [
        name
        for name in ranked["condition"]
        if name in real.tables and (real.tables[name]["fdr"] < SIGNIFICANT).sum() >= 10
    ]
    slopes = table.set_index("condition").get("lfc_slope", pd.Series(dtype=float))
    for name in shown[:n_conditions]:
        if name in shared:
            section.append(_scatter(name, real.tables[name], shared[name], slopes.get(name)))
        section.append(_one_volcano(name, real, "measured"))
    return section


def read_responses(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Read ``conditions.csv`` and ``responses.json`` of an evaluation of responses.

    Parameters
    ----------
    folder
        That folder.

    Returns
    -------
    tuple
        The table with a column ``condition`` (``identity / perturbation``, or the perturbation alone), and the record.

    Raises
    ------
    LingshuError
        If a file or a column is missing or unreadable.
    """
    folder = Path(folder)
    try:
        record = read_json(folder / "responses.json", "An evaluation of responses must be whole", _AGAIN)
        refuse_special(folder / "conditions.csv", "conditions.csv must be a table")
        table = pd.read_csv(folder / "conditions.csv", dtype={"identity": str, "perturbation": str})
    except LingshuError:
        raise
    except (OSError, ValueError) as error:
        raise LingshuError("An evaluation of responses must be whole", f"{folder}: {error}", _AGAIN) from error
    missing = [name for name in ("identity", "perturbation") if name not in table]
    if missing:
        raise LingshuError(
            "conditions.csv must name its conditions", f"there is no {offenders(missing)}", "Run the evaluation again"
        )
    identity = table["identity"].fillna("")
    table["condition"] = np.where(identity == "", table["perturbation"], identity + " / " + table["perturbation"])
    return table, record


def write_differential_figures(folder: Path) -> list[Path]:
    """Draw a volcano plot beside every DE table of a folder, and a dot plot over all of them, as SVG files.

    Parameters
    ----------
    folder
        Folder that ``lingshu de`` wrote.

    Returns
    -------
    list of pathlib.Path
        The files, on a white ground, for any viewer.

    Raises
    ------
    LingshuError
        If a table is missing or broken.
    """
    import matplotlib

    folder = Path(folder)
    found = read_differential(folder)
    files = dict(zip(found.index["condition"], found.index["file"], strict=True))
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a name is no formula
        pictures = {f"{Path(files[c]).stem}.volcano.svg": volcano(t, f"volcano {c}") for c, t in found.tables.items()}
        if top_genes(found.tables, 1):
            pictures["dot_plot.svg"] = dot_plot(strongest(found.tables), "dot plot of the most significant genes")
    with writable("The output folder must be writable", folder, "Free some space or check the rights"):
        for name, svg in pictures.items():
            write_text(folder / name, standalone(svg))
    return [folder / name for name in pictures]


def _ranking(table: pd.DataFrame, column: str, settings: Mapping) -> ResponseFigure:
    title = _TITLES.get(column, column)
    ceiling = table.get(f"ceiling_{column}")
    values = table[column].to_numpy(float)
    lower = column in _LOWER_IS_BETTER
    if column == "lfc_slope":  # neither high nor low is good: rank by distance from 1, keep the order of the error
        order = np.argsort(-np.abs(values - 1), kind="stable")
        table, values = table.iloc[order], values[order]
        ceiling = None if ceiling is None else ceiling.iloc[order]
    svg = ranked_conditions(
        table["condition"].tolist(), values, ceiling, title, f"conditions by {column}", lower_is_better=lower
    )
    against = f" against control {settings['control']!r}" if settings.get("control") else ""
    stroke = (
        " Blue strokes: what other real cells of the same condition reach in place of the prediction."
        if ceiling is not None
        else ""
    )
    best = (
        "1 is calibrated, below 1 the response is too weak."
        if column == "lfc_slope"
        else f"{'Lower' if lower else 'Higher'} is better."
    )
    return ResponseFigure(
        f"Conditions ranked: {title}", svg, f"One bar per condition{against}, worst first. {best}{stroke}"
    )


def _dots(real: DifferentialTables, predicted: Mapping[str, pd.DataFrame]) -> ResponseFigure:
    chosen = strongest(real.tables, 10 if predicted else 20)
    rows = {}
    for name, table in chosen.items():
        rows[f"{name}, measured" if predicted else name] = table
        if name in predicted:
            rows[f"{name}, predicted"] = predicted[name]
    svg = dot_plot(rows, "dot plot of the most significant genes", genes=top_genes(chosen, 24))
    caption = (
        "The genes that change most significantly in measured cells, in turn of every condition. Colour: log2 fold "
        f"change; area: share of perturbed cells with the gene; ring: FDR < {SIGNIFICANT:g}. "
        f"{real.facts.get('readme', '')}"
    )
    return ResponseFigure("Genes that respond", svg, caption)


def _scatter(name: str, measured: pd.DataFrame, predicted: pd.DataFrame, slope: float | None) -> ResponseFigure:
    known = slope is not None and np.isfinite(slope)
    svg = fold_changes(measured, predicted, f"fold changes {name}", slope=slope if known else None)
    by = (
        "corrected for the noise of both sides (conditions.csv)"
        if known
        else "by total least squares over significant genes"
    )
    caption = (
        f"Each dot is a gene; violet: FDR < {SIGNIFICANT:g} in measured cells. Dashed: perfect. Orange: the slope, "
        f"{by}; below 1 the predicted response is too weak. Named: significant genes furthest from the diagonal."
    )
    return ResponseFigure(f"Fold changes: {name}", svg, caption)


def _one_volcano(name: str, found: DifferentialTables, what: str) -> ResponseFigure:
    caption = f"{what.capitalize()} cells. {found.facts.get('readme', f'See {README_NAME}.')}"
    return ResponseFigure(f"Differential expression: {name}", volcano(found.tables[name], f"volcano {name}"), caption)
