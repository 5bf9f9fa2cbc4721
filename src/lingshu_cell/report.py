"""Render the folder of an evaluation as one HTML page that opens offline."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lingshu_cell import figures
from lingshu_cell.errors import LingshuError
from lingshu_cell.evaluation_folder import GENE_PREFIX, SOURCES, Evaluation, read_evaluation
from lingshu_cell.judgement import LEVELS, group_rows, judge, verdict
from lingshu_cell.pages import flat_facts, save_page, template_environment
from lingshu_cell.response_report import RESPONSES_NAME, render_responses

REPORT_NAME = "report.html"
_MOST_TYPES_IN_LEGEND = 24
_OTHER_COLOUR = "#8e97a6"


def write_report(directory: Path, *, title: str | None = None, baseline: Path | None = None) -> Path:
    """Render ``directory/report.html`` from the tables that ``lingshu evaluate`` wrote there.

    A folder with ``responses.json`` gives the page of perturbation responses, any other the page of generated cells.

    Parameters
    ----------
    directory
        Folder with ``metrics.json``, ``facts.json``, ``cells.csv.gz``, ``genes.csv.gz``, ``proportions.csv`` and,
        where a training history is wanted, ``history.csv``; or with ``responses.json`` and ``conditions.csv``.
    title
        Heading of the page; by default it names the generated file.
    baseline
        Only for responses: folder of the evaluation of a baseline on the same real cells, to be shown beside.

    Returns
    -------
    The path of the page. It needs no network and no other file.

    Raises
    ------
    LingshuError
        If the folder or one of its files is missing, unreadable or lacks a column, or the baseline does not fit.
    """
    directory = Path(directory)
    if (directory / RESPONSES_NAME).is_file():
        page = render_responses(directory, title=title, baseline=baseline)
    elif baseline is not None:
        raise LingshuError(
            "A baseline can stand beside perturbation responses only",
            f"{str(directory)!r} has no {RESPONSES_NAME}",
            "Leave the baseline out, or evaluate with --perturbation-key",
        )
    else:
        page = render_report(read_evaluation(directory), title=title)
    return save_page(page, directory / REPORT_NAME)


def render_report(evaluation: Evaluation, *, title: str | None = None) -> str:
    """Turn an evaluation into the text of a self-contained HTML page.

    Parameters
    ----------
    evaluation
        From :func:`read_evaluation`.
    title
        Heading of the page; by default it names the generated file.

    Returns
    -------
    HTML in which every name that a user could have chosen is escaped.
    """
    environment = template_environment()
    rows = judge(evaluation.metrics)
    source = _provenance(evaluation.facts)
    generation = {key: value for key, value in source.items() if key != "training"}  # its steps and cells are others
    page = environment.get_template("report.html.jinja")
    generated = _file_name(evaluation.facts, "generated") or evaluation.name
    return page.render(
        title=title or f"Generated cells against real cells: {generated}",
        evaluation=evaluation,
        evaluated=evaluation.evaluated.strftime("%d %B %Y, %H:%M"),
        verdict=verdict(rows),
        levels=[(limit, level) for limit, level, _ in LEVELS],
        groups=group_rows(rows),
        tiles=[row for row in rows if row.headline and row.value is not None],
        n_cells=evaluation.cells["source"].value_counts().to_dict(),
        n_genes=len(evaluation.genes),
        model=_model_line(generation),
        maps=_maps(evaluation.cells),
        markers=_markers(evaluation.cells),
        proportions=_proportion_rows(evaluation.proportions),
        plots=_plots(evaluation),
        furthest=_furthest_genes(evaluation.genes),
        training=_training(evaluation.history),
        provenance=flat_facts(source),
        facts=flat_facts({k: v for k, v in evaluation.facts.items() if v is not source}),
        commands=_commands(evaluation, generation),
    )


def _maps(cells: pd.DataFrame) -> dict[str, Any] | None:
    """The two maps coloured by cell type, their legend, and what each side's labels are."""
    placed = cells.dropna(subset=["umap1", "umap2"])
    if placed["source"].nunique() < len(SOURCES):
        return None
    limits = figures.map_limits(placed[["umap1", "umap2"]].to_numpy(float))
    sides, labelled_by, labels = {}, {}, {}
    for side in SOURCES:
        sides[side] = placed[placed["source"] == side]
        own = (sides[side]["cell_type"] != "").any()
        labels[side] = sides[side]["cell_type" if own else "predicted_cell_type"]
        labelled_by[side] = "their cell-type labels" if own else "a classifier trained on real cells"
    counts = pd.DataFrame({side: labels[side].value_counts() for side in SOURCES}).fillna(0).astype(int)
    counts = counts[counts.index != ""]
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    colours = figures.type_colours(list(counts.index[:_MOST_TYPES_IN_LEGEND]))
    legend = [{"name": name, "colour": colours[name], **counts.loc[name].to_dict()} for name in colours]
    rest = counts.iloc[_MOST_TYPES_IN_LEGEND:]
    if len(rest):
        legend.append({"name": f"{len(rest)} rarer types", "colour": _OTHER_COLOUR, **rest.sum().to_dict()})
    xy = {side: sides[side][["umap1", "umap2"]].to_numpy(float) for side in SOURCES}
    panels = []
    for side, other in (SOURCES, SOURCES[::-1]):
        plain = _OTHER_COLOUR if colours else figures.SIDE_COLOURS[side]
        drawn = [colours.get(name, plain) for name in labels[side]]
        image = figures.cell_map(xy[side], drawn, xy[other], limits)
        panels.append({"side": side, "n": len(xy[side]), "image": image, "labelled_by": labelled_by[side]})
    return {"panels": panels, "legend": legend}


def _markers(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """One pair of maps per marker gene, on one colour scale, with the share of cells that express it."""
    placed = cells.dropna(subset=["umap1", "umap2"])
    if placed["source"].nunique() < len(SOURCES):
        return []
    limits = figures.map_limits(placed[["umap1", "umap2"]].to_numpy(float))
    markers = []
    for column in (name for name in cells.columns if name.startswith(GENE_PREFIX)):
        shown = placed.dropna(subset=[column])
        positive = shown.loc[shown[column] > 0, column]
        most = float(positive.quantile(0.98)) if len(positive) else 1.0
        panels = []
        for side in SOURCES:
            rows = shown[shown["source"] == side]
            expression = rows[column].to_numpy(float)
            image = figures.expression_map(rows[["umap1", "umap2"]].to_numpy(float), expression, most, limits)
            share = float((expression > 0).mean()) if len(expression) else float("nan")
            panels.append({"side": side, "image": image, "share": share})
        markers.append({"gene": column.removeprefix(GENE_PREFIX), "panels": panels})
    return markers


def _proportion_rows(proportions: pd.DataFrame) -> list[dict[str, Any]]:
    """Shares per type in per cent, commonest first, with bar lengths relative to the largest share."""
    table = proportions.sort_values("real", ascending=False, kind="stable")
    largest = max(float(np.nanmax(table[list(SOURCES)].to_numpy(float), initial=0.0)), 1e-9)
    rows = []
    for row in table.itertuples():
        entry = {"name": row.cell_type, "difference": (row.generated - row.real) * 100}
        for side in SOURCES:
            share = float(getattr(row, side))
            share = share if np.isfinite(share) else 0.0
            entry[side] = {"percent": share * 100, "bar": share / largest * 100}
        rows.append(entry)
    return rows


def _plots(evaluation: Evaluation) -> dict[str, str]:
    """The quantitative pictures; their headings and captions are in the template."""
    cells, genes = evaluation.cells, evaluation.genes
    real, generated = (cells[cells["source"] == side] for side in SOURCES)
    return {
        "total_counts": figures.histogram(
            real["total_counts"], generated["total_counts"], "total counts per cell (UMI)", "total counts per cell"
        ),
        "n_genes": figures.histogram(
            real["n_genes"], generated["n_genes"], "genes detected per cell", "genes detected per cell"
        ),
        "depth": figures.depth_scatter(cells, "genes detected against total counts"),
        "gene_means": figures.gene_means(genes, "mean expression of genes, generated against real"),
        "mean_variance": figures.mean_variance(genes, "variance of genes against their mean"),
        "zeros": figures.zero_fraction(genes, "share of zeros against mean count"),
    }


def _training(history: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Curves of a training history: the loss, and the validation bound where it was measured."""
    if history is None or not pd.api.types.is_numeric_dtype(history["step"]):
        return []
    numeric = [c for c in history.columns if pd.api.types.is_numeric_dtype(history[c]) and history[c].notna().any()]
    validation = [c for c in numeric if "nelbo" in c or c.startswith("val")]
    losses = [c for c in numeric if "loss" in c and c not in validation]
    curves = []
    for heading, columns in (("Training loss", losses[:1]), ("Validation on held-out cells", validation[:1])):
        for column in columns:
            measured = history[["step", column]].dropna()
            svg = figures.curve(measured["step"], measured[column], heading)
            curves.append({"heading": heading, "svg": svg, "column": column, "last": measured[column].iloc[-1]})
    return curves


def _furthest_genes(genes: pd.DataFrame, most: int = 8) -> dict[str, list[dict[str, Any]]]:
    """The genes whose mean log expression is furthest too low and too high."""
    difference = genes["mean_lognorm_generated"] - genes["mean_lognorm_real"]
    ordered = genes.assign(difference=difference).sort_values("difference", kind="stable")
    low, high = ordered[ordered["difference"] < 0].head(most), ordered[ordered["difference"] > 0].tail(most)[::-1]
    return {"too low": low.to_dict("records"), "too high": high.to_dict("records")}


def _provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the generated file says of its own making, wherever in the facts it is kept."""
    for key, value in facts.items():
        if isinstance(value, dict):
            found = value if "provenance" in key else _provenance(value)
            if found:
                return found
    return {}


def _find(content: object, key: str) -> object:
    """The first value under ``key`` in nested facts, nearest to the top first."""
    if not isinstance(content, Mapping):
        return None
    if content.get(key) is not None:
        return content[key]
    return next((found for value in content.values() if (found := _find(value, key)) is not None), None)


def _file_name(facts: Mapping[str, Any], part: str) -> str | None:
    """Name of the file that a part came from, without the folders of somebody's machine."""
    entry = _find(facts.get("files"), part)
    if isinstance(entry, Mapping):
        entry = entry.get("name") or entry.get("file") or entry.get("path")
    return Path(str(entry)).name if entry else None


def _model_line(source: Mapping[str, Any]) -> str:
    """What made the cells, in one line."""
    words = {"preset": "preset {}", "checkpoint_step": "trained for {} steps", "schedule": "{} schedule"}
    words |= {"steps": "{} sampling steps", "seed": "seed {}"}
    found = [form.format(value) for key, form in words.items() if isinstance(value := _find(source, key), str | int)]
    return " · ".join(found) or "unknown: the generated file does not say"


def _commands(evaluation: Evaluation, source: Mapping[str, Any]) -> list[str]:
    """The commands that lead to this page again, as far as the facts tell."""
    generated = _file_name(evaluation.facts, "generated") or "GEN.h5ad"
    lines = []
    if source:
        run = ["lingshu", "generate", Path(str(_find(source, "checkpoint") or "RUN")).name]
        n_cells = int((evaluation.cells["source"] == "generated").sum())
        file = _find(evaluation.facts.get("files"), "generated")
        if isinstance(file, Mapping) and isinstance(file.get("cells"), int):
            n_cells = file["cells"]  # the table may hold only some of them
        run += ["--n", n_cells, "--out", generated]
        for option in ("steps", "seed"):
            if isinstance(value := _find(source, option), int):
                run += [f"--{option}", value]
        conditions = _find(source, "condition")
        if isinstance(conditions, Mapping):
            for key, value in conditions.items():
                if isinstance(value, str):
                    run += ["--condition", f"{key}={value}"]
        lines.append(run)
    evaluate = ["lingshu", "evaluate", "--real", _file_name(evaluation.facts, "real") or "REAL.h5ad"]
    evaluate += ["--generated", generated]
    if training := _file_name(evaluation.facts, "training"):
        evaluate += ["--training", training]
    if isinstance(seed := evaluation.facts.get("seed"), int):
        evaluate += ["--seed", seed]
    lines += [[*evaluate, "--out", evaluation.name], ["lingshu", "report", evaluation.name]]
    return [" ".join(shlex.quote(str(word)) for word in line) for line in lines]
