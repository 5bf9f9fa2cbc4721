"""Pictures of a report: cell maps as small PNG files, quantitative plots as SVG that takes the page's own colours."""

import base64
import colorsys
import io
import re
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
import pandas as pd

# Stand-ins that matplotlib draws with; the page replaces them by its own light or dark colours (CSS variables).
_PAGE_COLOURS = {
    "#010203": "var(--ink-soft)",
    "#030201": "var(--line)",
    "#2f6db3": "var(--real)",
    "#d9722b": "var(--generated)",
}
INK, _LINE, REAL, GENERATED = _PAGE_COLOURS
_BACKDROP = "#8e97a6"
# Rasterised dots cannot follow the page: tones that suit black and white.
SIDE_COLOURS = {"real": "#4a86cc", "generated": "#e0803c"}
_SVG_SIZE_INCHES = (3.7, 2.9)
_MAP_PIXELS, _MARKER_PIXELS = 880, 320

TYPE_COLOURS = (
    "#4477c8", "#e8743b", "#2f9e73", "#d64c7f", "#c9a227", "#7d5cc6", "#3fb1c9", "#a0563a",
    "#86b83a", "#e39bb8", "#5f7d95", "#b03fb0", "#d9b48a", "#2a7f8f", "#b8433f", "#8f8f3a",
)  # fmt: skip


def type_colours(cell_types: Sequence[str]) -> dict[str, str]:
    """Give every cell type one colour that is legible on white and on black.

    Parameters
    ----------
    cell_types
        Distinct names, most frequent first; beyond the curated colours, hues follow the golden angle.

    Returns
    -------
    Name to ``#rrggbb``.
    """
    colours = dict(zip(cell_types, TYPE_COLOURS, strict=False))
    for i, name in enumerate(cell_types[len(TYPE_COLOURS) :]):
        red, green, blue = colorsys.hls_to_rgb((0.07 + i * 0.381966) % 1.0, 0.42 + 0.16 * (i % 2), 0.5)
        colours[name] = f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
    return colours


def map_limits(coordinates: np.ndarray) -> tuple[float, float, float, float]:
    """Frame a map around all cells, so that real and generated panels share it; the axes of a UMAP have no unit.

    Parameters
    ----------
    coordinates
        UMAP positions of all cells of both sides, shape (cells, 2), finite.

    Returns
    -------
    Lowest x, highest x, lowest y, highest y.
    """
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    margin = np.maximum((high - low) * 0.05, 1e-6)
    (x_low, y_low), (x_high, y_high) = low - margin, high + margin
    return float(x_low), float(x_high), float(y_low), float(y_high)


def cell_map(xy: np.ndarray, colours: Sequence[str], backdrop: np.ndarray, limits: tuple, seed: int = 0) -> str:
    """Draw one side's cells on the common map, over the other side in faint grey.

    Parameters
    ----------
    xy
        Positions of the cells, shape (cells, 2).
    colours
        One colour per cell.
    backdrop
        Positions of the other side's cells, shape (cells, 2).
    limits
        From :func:`map_limits`.
    seed
        Order in which cells are drawn, so that no type lies systematically on top.

    Returns
    -------
    A ``data:`` address of a transparent PNG.
    """
    axes = _map_axes(_MAP_PIXELS, limits)
    size = _dot_size(len(xy), _MAP_PIXELS)
    order = np.random.default_rng(seed).permutation(len(xy))
    if len(backdrop):
        axes.scatter(*backdrop.T, s=size, c=_BACKDROP, alpha=0.16, linewidths=0)
    axes.scatter(*xy[order].T, s=size, c=np.asarray(colours, dtype=object)[order].tolist(), alpha=0.85, linewidths=0)
    return _png(axes.figure)


def expression_map(xy: np.ndarray, expression: np.ndarray, most: float, limits: tuple) -> str:
    """Draw one gene's log-normalised expression on the common map, strongest cells on top.

    Parameters
    ----------
    xy
        Positions of the cells, shape (cells, 2).
    expression
        Log-normalised expression per cell, shape (cells,).
    most
        Expression that gets the full colour; the same for both sides.
    limits
        From :func:`map_limits`.

    Returns
    -------
    A ``data:`` address of a transparent PNG.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("expression", ["#a3abb873", "#c58fb5d9", "#d4408f", "#8a1a78"])
    axes = _map_axes(_MARKER_PIXELS, limits)
    order = np.argsort(expression, kind="stable")
    axes.scatter(
        *xy[order].T, s=2 * _dot_size(len(xy), _MARKER_PIXELS), c=expression[order], cmap=colours, vmin=0, vmax=most,
        linewidths=0,
    )  # fmt: skip
    return _png(axes.figure)


def histogram(real: np.ndarray, generated: np.ndarray, label: str, name: str) -> str:
    """Draw two histograms over one logarithmic axis, medians as dashed lines.

    Parameters
    ----------
    real, generated
        A positive quantity per cell; zeros are drawn at the lowest bin.
    label
        Title of the horizontal axis.
    name
        Unique on the page; also what a screen reader says.

    Returns
    -------
    An ``<svg>`` element.
    """
    real, generated = np.maximum(real, 1), np.maximum(generated, 1)
    low, high = min(real.min(), generated.min()), max(real.max(), generated.max())
    bins = np.geomspace(low, max(high, low * 1.5), 41)
    axes = new_axes(label, "share of cells (%)")
    for values, colour, filled in ((real, REAL, True), (generated, GENERATED, False)):
        weights = np.full(len(values), 100 / len(values))
        style = {"histtype": "stepfilled", "alpha": 0.45} if filled else {"histtype": "step", "linewidth": 1.5}
        axes.hist(values, bins=bins, weights=weights, color=colour, **style)
        axes.axvline(float(np.median(values)), color=colour, linestyle=(0, (4, 3)), linewidth=1)
    _log_axis(axes, "x")
    return to_svg(axes.figure, name)


def depth_scatter(cells: pd.DataFrame, name: str) -> str:
    """Draw genes detected against total counts per cell, one cloud per side.

    Parameters
    ----------
    cells
        Columns ``source`` (``real`` or ``generated``), ``total_counts`` and ``n_genes``.
    name
        Unique on the page; also what a screen reader says.

    Returns
    -------
    An ``<svg>`` element.
    """
    axes = new_axes("total counts per cell", "genes detected per cell")
    columns = cells[["total_counts", "n_genes"]].clip(lower=1)
    _both_clouds(
        axes, *(columns[cells["source"] == side].to_numpy(float).T for side in SIDE_COLOURS), alpha=0.6, size=6
    )
    _log_axis(axes, "x")
    _log_axis(axes, "y")
    return to_svg(axes.figure, name)


def mean_variance(genes: pd.DataFrame, name: str) -> str:
    """Draw the variance of each gene's counts against their mean, with the Poisson line.

    Parameters
    ----------
    genes
        Columns ``mean_real``, ``variance_real`` and the same of ``generated``, in counts.
    name
        Unique on the page; also what a screen reader says.

    Returns
    -------
    An ``<svg>`` element.
    """

    def poisson(mean: np.ndarray) -> np.ndarray:
        return mean

    return _against_mean(genes, "variance", "variance of counts", poisson, name, log_y=True)


def zero_fraction(genes: pd.DataFrame, name: str) -> str:
    """Draw the share of cells without the gene against the gene's mean count, with the Poisson curve.

    Parameters
    ----------
    genes
        Columns ``mean_real``, ``zero_fraction_real`` and the same of ``generated``.
    name
        Unique on the page; also what a screen reader says.

    Returns
    -------
    An ``<svg>`` element.
    """

    def poisson(mean: np.ndarray) -> np.ndarray:
        return np.exp(-mean)

    return _against_mean(genes, "zero_fraction", "share of cells with no count", poisson, name, log_y=False)


def gene_means(genes: pd.DataFrame, name: str) -> str:
    """Draw each gene's mean log-normalised expression, generated against real, with the diagonal.

    Parameters
    ----------
    genes
        Columns ``mean_lognorm_real`` and ``mean_lognorm_generated``.
    name
        Unique on the page; also what a screen reader says.

    Returns
    -------
    An ``<svg>`` element.
    """
    axes = new_axes("mean log expression, real", "mean log expression, generated")
    real, generated = genes["mean_lognorm_real"], genes["mean_lognorm_generated"]
    axes.scatter(real, generated, s=7, c="#8d6cc9", alpha=0.45, linewidths=0, rasterized=True)
    top = float(max(real.max(), generated.max(), 1e-6))
    axes.plot([0, top], [0, top], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    return to_svg(axes.figure, name)


def curve(step: np.ndarray, value: np.ndarray, name: str) -> str:
    """Draw one quantity of a training history against the optimiser step.

    Parameters
    ----------
    step, value
        Where it was measured and what was found, shape (measurements,), finite.
    name
        Unique on the page; also what a screen reader says and the title of the vertical axis.

    Returns
    -------
    An ``<svg>`` element.
    """
    axes = new_axes("optimiser step", name.lower())
    marker = "o" if len(value) <= 40 else None
    axes.plot(step, value, color=GENERATED, linewidth=1.3, marker=marker, markersize=3)
    low, high = np.quantile(value, [0, 0.99])  # the first steps of a run would flatten everything else
    margin = max((high - low) * 0.06, abs(high) * 1e-3, 1e-9)
    axes.set_ylim(low - margin, high + margin)
    return to_svg(axes.figure, name)


def _against_mean(genes: pd.DataFrame, column: str, label: str, poisson: Callable, name: str, *, log_y: bool) -> str:
    axes = new_axes("mean count of the gene", label)
    clouds = []
    for side in SIDE_COLOURS:
        mean, value = genes[f"mean_{side}"].to_numpy(float), genes[f"{column}_{side}"].to_numpy(float)
        seen = (mean > 0) & (value > 0) if log_y else mean > 0
        clouds.append((mean[seen], value[seen]))
    _both_clouds(axes, *clouds, alpha=0.35, size=4)
    means = np.concatenate([mean for mean, _ in clouds])
    if len(means):
        grid = np.geomspace(means.min(), means.max(), 100)
        axes.plot(grid, poisson(grid), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    _log_axis(axes, "x")
    if log_y:
        _log_axis(axes, "y")
    return to_svg(axes.figure, name)


def _both_clouds(axes, real: tuple, generated: tuple, *, alpha: float, size: float) -> None:
    """Draw the dots of both sides in random order, so that neither hides the other."""
    x, y = (np.concatenate([real[i], generated[i]]) for i in (0, 1))
    colours = np.repeat(list(SIDE_COLOURS.values()), [len(real[0]), len(generated[0])])
    order = np.random.default_rng(0).permutation(len(x))
    axes.scatter(x[order], y[order], s=size, c=colours[order], alpha=alpha, linewidths=0, rasterized=True)


def new_axes(x_label: str, y_label: str):
    """Give empty axes in the look of the reports; labels and ticks are in ink that the page recolours."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=_SVG_SIZE_INCHES, layout="constrained").add_subplot()
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8.5, width=0.6, length=3)
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _log_axis(axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = np.log10(max(high / max(low, 1e-300), 1.0))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    if value >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _map_axes(pixels: int, limits: tuple):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(pixels / 100, pixels / 100), dpi=100).add_axes((0, 0, 1, 1))
    axes.set(xlim=limits[:2], ylim=limits[2:])
    axes.set_axis_off()
    return axes


def _dot_size(n_cells: int, pixels: int) -> float:
    """Area of a dot in square points: few cells get big dots, many cells small ones, at any size of the picture."""
    return float(np.clip(75.0 / np.sqrt(max(n_cells, 1)), 0.9, 6.0)) * (pixels / 300) ** 2


def _png(figure) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # 256 colours are indistinguishable from 16 million in a dot plot and a third of the size.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).quantize(256, method=Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def to_svg(figure, name: str) -> str:
    """Turn the figure of the axes into an ``<svg>`` element that takes the colours of the page."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)  # ids must be unique on the page, not only inside one picture
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{escape(name)}"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for drawn, page in _PAGE_COLOURS.items():
        text = text.replace(drawn, page)
    return text
