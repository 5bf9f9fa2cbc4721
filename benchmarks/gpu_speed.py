"""What a GPU does of `small` in the product's own loops: training cells/s by minibatch, generated cells/s by tile.

    python benchmarks/gpu_speed.py

The cells are bundled PBMC 3k; minibatches repeat them. A training counts from its 20th step on, so that starting is
left out, and neither validates nor saves in between. Generation writes its h5ad file.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from recording import environment, markdown_table, run_in_child, say, write_result

TRAININGS = ((128, 300), (512, 200), (2048, 120))  # minibatch, steps
TILES = ((64, 2048), (256, 4096), (1024, 16384))  # rows of a network call, cells
_FIRST_STEP = 20


def train_speed(minibatch: int, steps: int, run: Path) -> dict[str, Any]:
    """Train and give cells/s."""
    import anndata as ad

    from lingshu_cell.config import load_config
    from lingshu_cell.datasets import pbmc3k_path
    from lingshu_cell.train import train

    training = {"steps": steps, "minibatch_size": minibatch, "device": "cuda"}
    rare = {"validate_every": steps + 1, "checkpoint_every": steps + 1}
    seen: list[float] = []
    config = load_config("small", overrides={"training": training | rare})
    train([ad.read_h5ad(pbmc3k_path())], run, config, on_progress=lambda progress: seen.append(time.perf_counter()))
    seconds = (seen[-2] - seen[_FIRST_STEP]) / (len(seen) - 2 - _FIRST_STEP)  # the last step measures a curve
    return {"minibatch": minibatch, "step_seconds": seconds, "cells_per_second": minibatch / seconds}


def generation_speed(run: Path, tile: int, n_cells: int) -> dict[str, Any]:
    """Generate into a file and give cells/s; a first tile warms up."""
    from lingshu_cell.generate import generate_file, load_model

    model = load_model(run, "cuda")
    generation = model.config.generation.model_copy(update={"tile_size": tile, "minibatch_size": tile})
    model = replace(model, config=model.config.model_copy(update={"generation": generation}))
    generate_file(model, tile, run / f"warm-{tile}.h5ad")
    started = time.perf_counter()
    generate_file(model, n_cells, run / f"cells-{tile}.h5ad")
    seconds = time.perf_counter() - started
    return {"tile": tile, "cells": n_cells, "seconds": seconds, "cells_per_second": n_cells / seconds}


def main() -> None:
    """Measure and write the result."""
    facts, trainings, generations = environment(), [], []
    with tempfile.TemporaryDirectory(prefix="lingshu-gpu-") as folder:
        for minibatch, steps in TRAININGS:
            trainings.append(run_in_child(train_speed, minibatch, steps, Path(folder) / f"run-{minibatch}"))
            say(f"training, minibatch {minibatch}: {trainings[-1]['cells_per_second']:.0f} cells/s")
        for tile, n_cells in TILES:
            generations.append(run_in_child(generation_speed, Path(folder) / f"run-{TRAININGS[0][0]}", tile, n_cells))
            say(f"generation, tile {tile}: {generations[-1]['cells_per_second']:.0f} cells/s")
    keys = ("minibatch", "step_seconds", "cells_per_second"), ("tile", "cells", "seconds", "cells_per_second")
    tables = [
        markdown_table(list(names), [[row[name] for name in names] for row in rows])
        for names, rows in zip(keys, (trainings, generations), strict=True)
    ]
    about = "`small` in fp32 on a GPU, PBMC 3k: the product's own training loop and generation into an h5ad file."
    write_result("gpu_speed", about, facts, {"training": trainings, "generation": generations}, tables)


if __name__ == "__main__":
    sys.exit(main())
