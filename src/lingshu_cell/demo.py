"""The whole pipeline on the bundled PBMC 3k cells: split, train, generate, evaluate, report."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from lingshu_cell.data.anndata_io import write_adata
from lingshu_cell.data.splits import split_cells
from lingshu_cell.datasets import pbmc3k_path
from lingshu_cell.errors import LingshuError
from lingshu_cell.evaluate import evaluate_files
from lingshu_cell.generate import generate_file, load_model
from lingshu_cell.input_files import expanded
from lingshu_cell.output_files import write_json
from lingshu_cell.report import write_report
from lingshu_cell.run_config import run_config
from lingshu_cell.train import Progress, train

MARKER = "demo.json"
_MADE = ("train.h5ad", "heldout.h5ad", "generated.h5ad", "run", "evaluation")
_HELD_OUT = 0.1
_MOST_TRAINING_SECONDS = 200  # so that all of it takes less than five minutes on two slow cores
_SEED = 0


@dataclass
class DemoResult:
    """What the demo made.

    Attributes
    ----------
    out, report
        Folder and page.
    metrics
        Content of ``metrics.json``.
    n_training_cells, n_generated_cells
        Cells given to training (its validation cells included), and cells generated, which is as many as were held out.
    interrupted
        Whether Ctrl-C ended the demo while it trained; then there is nothing beyond ``run``.
    seconds
        Wall time of each stage.
    """

    out: Path
    report: Path
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    n_training_cells: int = 0
    n_generated_cells: int = 0
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, on_note: Callable[[str], None]) -> Iterator[None]:
        """Announce and time a stage."""
        on_note(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_demo(
    out: Path,
    *,
    overwrite: bool = False,
    settings: Sequence[str] = (),
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> DemoResult:
    """Train ``small`` on nine tenths of PBMC 3k, generate as many cells as were held out, and judge them against those.

    Parameters
    ----------
    out
        Folder for everything; it must be new or empty.
    overwrite
        Replace what an earlier demo left in ``out``; nothing else there is touched.
    settings
        ``section.key=value`` strings that change the preset. Training ends after 200 seconds if not earlier.
    on_note, on_progress
        Called with lines for the user, and after each optimiser step.

    Returns
    -------
    DemoResult
        Metrics, times and places.

    Raises
    ------
    LingshuError
        If ``out`` is in use or cannot be written, or a setting is not possible.
    """
    out = expanded(out)
    evaluation = out / "evaluation"
    result = DemoResult(out, evaluation / "report.html")
    files = {name: out / f"{name}.h5ad" for name in ("train", "heldout", "generated")}
    limit = f"training.max_seconds={_MOST_TRAINING_SECONDS}"
    config = run_config([pbmc3k_path()], out / "run", settings=[limit, *settings])
    _make_room(out, overwrite)
    with result.stage("split", on_note):
        cells = ad.read_h5ad(pbmc3k_path())
        kept, held_out = split_cells(cells.n_obs, _HELD_OUT, _SEED)
        _write(cells, kept, files["train"])
        _write(cells, held_out, files["heldout"])
        result.n_training_cells, result.n_generated_cells = len(kept), len(held_out)
    with result.stage("train", on_note):
        trained = train([files["train"]], out / "run", config, on_progress=on_progress, on_note=on_note)
    if trained.interrupted:
        result.interrupted = True
        return result
    with result.stage("generate", on_note):
        generate_file(load_model(out / "run"), len(held_out), files["generated"], seed=_SEED)
    with result.stage("evaluate", on_note):
        result.metrics = evaluate_files(files["heldout"], files["generated"], evaluation, training=files["train"])
        shutil.copyfile(out / "run" / "history.csv", evaluation / "history.csv")
    with result.stage("report", on_note):
        write_report(evaluation)
    result.seconds["total"] = round(sum(result.seconds.values()), 1)
    write_json(out / MARKER, {"seconds": result.seconds})
    return result


def _make_room(out: Path, overwrite: bool) -> None:
    """Take the folder, or refuse; the marker tells a folder of the demo from one of the user's own."""
    is_demo = (out / MARKER).is_file()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (is_demo and overwrite))):
        remedy = "Pass --overwrite to replace it, or another --out" if is_demo else "Pass another --out"
        raise LingshuError("The demo needs a new folder", f"{out} exists", remedy)
    try:
        for name in _MADE if out.exists() else ():
            made = out / name
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARKER, {"seconds": None})
    except OSError as error:
        raise LingshuError("The demo folder must be writable", f"{out}: {error}", "Change --out") from None


def _write(cells: ad.AnnData, rows: np.ndarray, path: Path) -> None:
    write_adata(path, cells[rows].copy())
