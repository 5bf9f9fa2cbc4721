"""Pictures of perturbation responses: volcano, dot plot, predicted against measured fold changes, ranked conditions."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lingshu_cell.figures import GENERATED, INK, REAL, new_axes, to_svg
from lingshu_cell.metrics.differential import SIGNIFICANT

# Dots and letters that do not follow the page: tones that suit black and white.
_UP, _DOWN, _NEITHER = "#d0573f", "#4a86cc", "#8e97a6"
_PAPER = {"var(--ink-soft)": "#4a5361", "var(--line)": "#e3e2dc", "var(--real)": REAL, "var(--generated)": GENERATED}
_LEAST_FDR = 1e-300
_RING = "#5d6675"
_MOST_BARS = 30
_LEAST_MEAN = 0.1  # normalised counts: below, a fold change is mostly noise


def volcano(table: pd.DataFrame, name: str, *, n_labels: int = 12) -> str:
    """Draw -log10 FDR against log2 fold change of every gene, the most significant ones named.

    Parameters
    ----------
    table
        Columns ``gene``, ``log2_fold_change``, ``fdr``.
    name
        Unique on the page; also what a screen reader says.
    n_labels
        At most so many significant genes are named, from both sides.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    change = table["log2_fold_change"].to_numpy(float)
    height = -np.log10(np.maximum(table["fdr"].to_numpy(float), _LEAST_FDR))
    significant = table["fdr"].to_numpy(float) < SIGNIFICANT
    axes = new_axes("log2 fold change, perturbed / control", "−log10 FDR")
    axes.figure.set_size_inches(5.2, 3.9)
    colours = np.where(significant, np.where(change > 0, _UP, _DOWN), _NEITHER)
    drawn = (change != 0) | (height > 0)
    style = {"alpha": 0.6, "linewidths": 0, "rasterized": True}
    axes.scatter(change[drawn], height[drawn], s=np.where(significant, 11, 5)[drawn], c=colours[drawn], **style)
    axes.axhline(-np.log10(SIGNIFICANT), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axvline(0, color=INK, linewidth=0.6)
    widest = max(np.abs(change[drawn]).max(initial=0.0), 1.0) * 1.4
    axes.set_xlim(-widest, widest)
    axes.set_ylim(-0.02 * max(height.max(initial=0.0), 2.0), max(height.max(initial=0.0), 2.0) * 1.1)
    _count_sides(axes, change, significant)
    order = [i for i in np.lexsort((-np.abs(change), -height)) if significant[i]]
    sides = [[i for i in order if side * change[i] > 0][:3] for side in (1, -1)]  # three of each side at least
    chosen = list(dict.fromkeys([*sides[0], *sides[1], *order]))[:n_labels]
    _name_points(axes, change[chosen], height[chosen], table["gene"].astype(str).to_numpy()[chosen])
    return to_svg(axes.figure, name)


def dot_plot(
    tables: Mapping[str, pd.DataFrame], name: str, *, n_genes: int = 24, genes: Sequence[str] | None = None
) -> str:
    """Draw genes against conditions: colour is log2 fold change, area the share of perturbed cells with the gene.

    A dot has a ring where its FDR is below 0.05.

    Parameters
    ----------
    tables
        Condition → table with ``gene``, ``log2_fold_change``, ``fraction_perturbed``, ``fdr``; drawn from the top.
    name
        Unique on the page; also what a screen reader says.
    n_genes
        How many of the most significant genes, in turn of every condition, where ``genes`` are not named.
    genes
        The genes to draw, in this order.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    from matplotlib.colors import LinearSegmentedColormap

    genes = list(genes) if genes is not None else top_genes(tables, n_genes)
    colours = LinearSegmentedColormap.from_list("change", [_DOWN, "#a9c3e0", "#c9c7c2", "#e6b3a6", _UP])
    axes = new_axes("", "")
    n_rows, n_columns = max(len(tables), 1), max(len(genes), 1)
    longest = max((len(label) for label in tables), default=0)
    width = max(0.27 * n_columns + 0.075 * longest + 1.5, 3.6)
    axes.figure.set_size_inches(width, max(0.27 * n_rows + 1.0, 1.9))
    shown = [table.set_index("gene").reindex(genes) for table in tables.values()]
    changes = np.array([table["log2_fold_change"].fillna(0) for table in shown]).ravel()
    most = float(np.ceil(np.quantile(np.abs(changes), 0.95))) if changes.size and changes.any() else 1.0
    shares = np.array([table["fraction_perturbed"].fillna(0) for table in shown]).ravel()
    rings = np.array([np.where(table["fdr"] < SIGNIFICANT, 1.0, 0.0) for table in shown]).ravel()
    rows, columns = np.divmod(np.arange(changes.size), n_columns)
    steps = np.ceil(shares * 20).astype(int)  # dots of one area share one path: a small file
    for step in np.unique(steps):
        at = steps == step
        axes.scatter(
            columns[at], rows[at], s=105 * step / 20, c=changes[at], cmap=colours, vmin=-most, vmax=most,
            edgecolors=_RING, linewidths=rings[at],
        )  # fmt: skip
    axes.set_xticks(range(len(genes)), genes, rotation=90, fontsize=8.5, fontstyle="italic")
    axes.set_yticks(range(len(tables)), list(tables), fontsize=8.5)
    axes.set(xlim=(-0.7, n_columns - 0.3), ylim=(n_rows - 0.3, -0.7))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    _dot_keys(axes, colours, most, n_rows)
    return to_svg(axes.figure, name)


def fold_changes(
    measured: pd.DataFrame, predicted: pd.DataFrame, name: str, *, slope: float | None = None, n_labels: int = 8
) -> str:
    """Draw predicted against measured log2 fold changes of one condition, with the diagonal and a slope.

    Parameters
    ----------
    measured, predicted
        Tables with ``gene``, ``mean_control``, ``mean_perturbed``, ``log2_fold_change``, ``fdr``; genes are matched by
        name, and those with a mean below 0.1 in both measured groups are left out.
    name
        Unique on the page; also what a screen reader says.
    slope
        Slope of predicted on measured to draw; by default that of :func:`calibration_slope`.
    n_labels
        At most so many of the genes furthest from the diagonal, among those that change, are named.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    both = _matched(measured, predicted)
    x, y = both["log2_fold_change"].to_numpy(float), both["log2_fold_change_predicted"].to_numpy(float)
    significant = both["fdr"].to_numpy(float) < SIGNIFICANT
    slope = calibration_slope(measured, predicted) if slope is None else slope
    axes = new_axes("measured log2 fold change", "predicted log2 fold change")
    axes.figure.set_size_inches(4.3, 4.1)
    for chosen, colour, size in ((~significant, _NEITHER, 5), (significant, "#8d6cc9", 12)):
        axes.scatter(x[chosen], y[chosen], s=size, c=colour, alpha=0.55, linewidths=0, rasterized=True)
    widest = max(np.abs(np.concatenate([x, y])).max(initial=0.0), 1.0) * 1.08
    axes.axhline(0, color=INK, linewidth=0.5)
    axes.axvline(0, color=INK, linewidth=0.5)
    axes.plot([-widest, widest], [-widest, widest], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if slope is not None and np.isfinite(slope):
        reach = widest / max(1.0, abs(slope))
        axes.plot([-reach, reach], [-reach * slope, reach * slope], color=GENERATED, linewidth=1.6)
        text = {"transform": axes.transAxes, "va": "top", "fontsize": 9, "color": GENERATED}
        axes.text(0.03, 0.98, f"slope {slope:.2f}", **text)
    axes.set(xlim=(-widest, widest), ylim=(-widest, widest), aspect="equal")
    far = np.argsort(-np.abs(y - x) * significant)[:n_labels]
    far = far[significant[far]]
    _name_points(axes, x[far], y[far], both.index.to_numpy(str)[far])
    return to_svg(axes.figure, name)


def calibration_slope(measured: pd.DataFrame, predicted: pd.DataFrame) -> float | None:
    """Fit predicted on measured log2 fold changes by total least squares through the origin.

    Over genes significant on *either* side: the noise of both sides counts alike, so that a perfect prediction of as
    many cells gives 1 and neither side is favoured by the choice of genes.

    Parameters
    ----------
    measured, predicted
        As in :func:`fold_changes`.

    Returns
    -------
    float or None
        The slope; 1 is calibrated, below 1 too weak. None with fewer than ten such genes.
    """
    both = _matched(measured, predicted)
    chosen = both[(both["fdr"] < SIGNIFICANT) | (both["fdr_predicted"] < SIGNIFICANT)]
    if len(chosen) < 10:
        return None
    x, y = chosen["log2_fold_change"].to_numpy(float), chosen["log2_fold_change_predicted"].to_numpy(float)
    direction = np.linalg.svd(np.stack([x, y], axis=1), full_matrices=False)[2][0]
    return None if direction[0] == 0 else float(direction[1] / direction[0])


def ranked_conditions(
    labels: Sequence[str],
    values: np.ndarray,
    ceiling: np.ndarray | None,
    label: str,
    name: str,
    *,
    lower_is_better: bool,
) -> str:
    """Draw one bar per condition, the worst at the top, with what other real cells reach as a stroke.

    Parameters
    ----------
    labels
        Conditions, shape (conditions,).
    values
        Metric of the prediction; conditions without a value are left out.
    ceiling
        The same of real cells in place of the prediction, or None.
    label
        Title of the horizontal axis.
    name
        Unique on the page; also what a screen reader says.
    lower_is_better
        Whether high values are errors.

    Returns
    -------
    str
        An ``<svg>`` element; of more than 30 conditions the worst 15 and the best 15.
    """
    table = pd.DataFrame({"label": list(labels), "value": np.asarray(values, float)})
    table["ceiling"] = np.nan if ceiling is None else np.asarray(ceiling, float)
    table = table.dropna(subset="value").sort_values("value", ascending=not lower_is_better, kind="stable")
    if len(table) > _MOST_BARS:
        half = _MOST_BARS // 2
        gap = pd.DataFrame({"label": [f"… {len(table) - _MOST_BARS} more …"], "value": [np.nan], "ceiling": [np.nan]})
        table = pd.concat([table.head(half), gap, table.tail(half)])
    axes = new_axes(label, "")
    longest = max((len(text) for text in table["label"]), default=0)
    axes.figure.set_size_inches(3.6 + 0.075 * longest, 0.23 * max(len(table), 1) + 0.95)
    rows = np.arange(len(table))
    axes.barh(rows, table["value"], height=0.62, color=GENERATED, alpha=0.85)
    axes.vlines(table["ceiling"], rows - 0.42, rows + 0.42, color=REAL, linewidth=2.4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(rows, table["label"], fontsize=8.5)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return to_svg(axes.figure, name)


def top_genes(tables: Mapping[str, pd.DataFrame], n_genes: int) -> list[str]:
    """Take the most significant genes of every condition in turn until there are enough.

    Parameters
    ----------
    tables
        Condition → table with ``gene``, ``log2_fold_change``, ``fdr``.
    n_genes
        How many at most, ≥ 1.

    Returns
    -------
    list of str
        Genes with FDR < 0.05 somewhere, those with the strongest mean rise first.
    """
    best = [
        table[table["fdr"] < SIGNIFICANT].sort_values("fdr", kind="stable")["gene"].tolist()
        for table in tables.values()
    ]
    chosen: dict[str, None] = {}
    for rank in range(max(map(len, best), default=0)):
        for genes in best:
            if rank < len(genes) and len(chosen) < n_genes:
                chosen[genes[rank]] = None
    if not chosen:
        return []
    changes = pd.concat(
        [table.set_index("gene")["log2_fold_change"].reindex(list(chosen)) for table in tables.values()], axis=1
    )
    return changes.mean(axis=1).sort_values(ascending=False, kind="stable").index.tolist()


def standalone(svg: str) -> str:
    """Turn an ``<svg>`` element of the page into a file of its own, on white and in fixed colours.

    Parameters
    ----------
    svg
        From any function of this module.

    Returns
    -------
    str
        Text of an SVG file.
    """
    for page, fixed in _PAPER.items():
        svg = svg.replace(page, fixed)
    end = svg.index(">") + 1
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}{ground}{svg[end:]}'


def strongest(tables: Mapping[str, pd.DataFrame], most: int = 20) -> dict[str, pd.DataFrame]:
    """Keep the conditions with the most significant genes, in their own order.

    Parameters
    ----------
    tables
        Condition → table with ``fdr``.
    most
        How many at most.

    Returns
    -------
    dict
        Those that have any significant gene.
    """
    n_changed = {name: int((table["fdr"] < SIGNIFICANT).sum()) for name, table in tables.items()}
    kept = sorted(n_changed, key=lambda name: -n_changed[name])[:most]
    return {name: table for name, table in tables.items() if name in kept and n_changed[name] > 0}


def _dot_keys(axes, colours, most: float, n_rows: int) -> None:
    """Add the keys of a dot plot: a bar of colours, and dots of known size above."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-most, most), colours)
    bar = axes.figure.colorbar(scale, ax=axes, shrink=min(1.0, 3.0 / (0.27 * n_rows + 1)), aspect=14, pad=0.01)
    bar.set_label("log2 fold change", color=INK, fontsize=8.5)
    bar.ax.tick_params(colors=INK, labelsize=8, length=2)
    bar.outline.set_visible(False)
    bar.set_ticks([-most, 0, most], labels=[f"≤ −{most:g}", "0", f"≥ {most:g}"])
    examples = [axes.scatter([], [], s=105 * share, c=_NEITHER, linewidths=0) for share in (0.1, 0.5, 1.0)]
    key = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": 3, "frameon": False, "fontsize": 8}
    axes.legend(examples, ["10 %", "50 %", "100 % of cells"], labelcolor=INK, handletextpad=0.2, **key)


def _matched(measured: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """Genes of both tables that are expressed in measured cells."""
    seen = measured[measured[["mean_control", "mean_perturbed"]].max(axis=1) >= _LEAST_MEAN].set_index("gene")
    return seen.join(predicted.set_index("gene")[["log2_fold_change", "fdr"]], how="inner", rsuffix="_predicted")


def _count_sides(axes, change: np.ndarray, significant: np.ndarray) -> None:
    """Say at the top how many genes fall and rise."""
    for x, side, word, align in ((0.02, -1, "down", "left"), (0.98, 1, "up", "right")):
        n = int((significant & (side * change > 0)).sum())
        style = {"transform": axes.transAxes, "ha": align, "va": "top", "fontsize": 9}
        axes.text(x, 0.99, f"{n:,} {word}", color=_UP if side > 0 else _DOWN, **style)


def _name_points(axes, x: np.ndarray, y: np.ndarray, names: np.ndarray) -> None:
    """Write names beside points, pushed apart from top to bottom, with a thin line back where a name had to move."""
    from scipy.optimize import isotonic_regression

    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    step = 0.165 / axes.figure.get_size_inches()[1] * (high - low)  # of one line of text
    for side in (-1, 1):
        rows = np.array([i for i in np.argsort(-y) if (x[i] >= 0) == (side > 0)], dtype=int)
        if not len(rows):
            continue
        steps = step * np.arange(len(rows))
        places = isotonic_regression(y[rows] + steps, increasing=False).x - steps  # nearest places a step apart
        places -= max(places[0] - (high - 0.06 * (high - low)), 0.0)
        for i, place in zip(rows, places, strict=True):
            moved = abs(place - y[i]) > 0.4 * step
            beside = x[i] + side * (0.06 if moved else 0.02) * (right - left)
            line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1} if moved else None
            axes.annotate(
                names[i], (x[i], y[i]), (beside, place), fontsize=8, fontstyle="italic", color=INK, va="center",
                ha="left" if side > 0 else "right", arrowprops=line, annotation_clip=False,
            )  # fmt: skip
