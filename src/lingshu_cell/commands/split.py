"""The command ``lingshu split``: cells to train, validation and test files by condition, proven disjoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lingshu_cell.commands.options import Json
from lingshu_cell.console import give, give_json, say
from lingshu_cell.errors import LingshuError

if TYPE_CHECKING:
    import numpy as np

    from lingshu_cell.data.condition_splits import ConditionSplit

EXAMPLES = (
    "lingshu split cells.h5ad split.toml --out parts",
    "lingshu split cells.h5ad split.toml --dry-run",
    "lingshu split cells.h5ad --from-state state.toml --perturbation-key gene --control non-targeting --out parts",
)


def split(
    data: Annotated[str, typer.Argument(metavar="DATA.h5ad", help="Cells with their labels in obs.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="SPLIT.toml", help="What is held out; docs/splits.md explains the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for train.h5ad, validation.h5ad, test.h5ad.")
    ] = None,
    from_state: Annotated[
        Path | None, typer.Option(metavar="STATE.toml", help="Take the split of State (zeroshot, fewshot) instead.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="With --from-state: data set of the file DATA belongs to.")
    ] = None,
    perturbation_key: Annotated[str, typer.Option(help="With --from-state: obs column of perturbations.")] = "gene",
    control: Annotated[str, typer.Option(help="With --from-state: its value in control cells.")] = "non-targeting",
    identity_key: Annotated[str, typer.Option(help="With --from-state: obs column of cell types.")] = "cell_type",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the table; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in DIR.")] = False,
    json: Json = False,
) -> None:
    """Divide cells into training, validation and test files by condition.

    Counts and obs stay as they are. No condition is in two files, unless the split says so (few-shot), and no cell.
    """
    from lingshu_cell.data.anndata_io import read_obs
    from lingshu_cell.data.condition_splits import PARTS
    from lingshu_cell.data.split_files import import_state_toml, read_split

    if (file is None) == (from_state is None):
        remedy = "Name SPLIT.toml, or --from-state STATE.toml"
        raise LingshuError("There is one split", "none is given" if file is None else "two are given", remedy)
    if out is None and not dry_run:
        raise LingshuError("The files need a folder", "no --out", "Name one, or only look with --dry-run")
    if file is not None:
        chosen = read_split(file)
    else:
        keys = {"perturbation_key": perturbation_key, "control": control, "identity_key": identity_key}
        chosen = import_state_toml(str(from_state), **keys, dataset=dataset)
    obs = read_obs(data)
    parts = chosen.assign(obs)
    text = chosen.describe(obs)
    written = {} if dry_run or out is None else write_parts(data, chosen, parts, out, overwrite=overwrite)
    if json:
        conditions = chosen.summary(obs).to_dict("records")
        cells = {part: int((parts == part).sum()) for part in PARTS}
        files = {part: str(path) for part, path in written.items()}
        give_json({"files": files, "n_cells": cells, "conditions": conditions})
        return
    give(text)
    for part, path in written.items():
        give(f"{path}: {int((parts == part).sum()):,} cells")
    if not written:
        say("nothing written (--dry-run)")


def write_parts(
    data: str, chosen: "ConditionSplit", parts: "np.ndarray", out: Path, *, overwrite: bool = False
) -> dict[str, Path]:
    """Write each part that has cells to ``DIR/PART.h5ad``, and the split to ``DIR/split.toml``.

    The files are read back to prove that they share no cell and, few-shot conditions aside, no condition.

    Parameters
    ----------
    data
        The cells, an h5ad file.
    chosen
        The split.
    parts
        What :meth:`ConditionSplit.assign` gave for these cells.
    out
        Folder; made if absent.
    overwrite
        Whether earlier files may be replaced.

    Returns
    -------
    dict
        The file of each part that has cells.

    Raises
    ------
    LingshuError
        If a file exists, or the files written are not disjoint.
    """
    import anndata as ad

    from lingshu_cell.data.anndata_io import read_obs, write_adata
    from lingshu_cell.data.condition_labels import check_disjoint
    from lingshu_cell.data.condition_splits import PARTS
    from lingshu_cell.data.split_files import to_toml
    from lingshu_cell.output_files import writable, write_text

    paths = {part: out / f"{part}.h5ad" for part in PARTS}
    there = [str(path) for path in (*paths.values(), out / "split.toml") if path.exists()]
    if there and not overwrite:
        raise LingshuError(
            "Files are not replaced", f"there are {', '.join(there)}", "Name a new folder, or --overwrite"
        )
    if any(path.exists() and path.samefile(data) for path in paths.values()):
        raise LingshuError("The cells to be split stay as they are", f"{data} lies in {out}", "Name another folder")
    with writable("The output folder must be writable", out, "Check the rights, or name another folder"):
        out.mkdir(parents=True, exist_ok=True)
    adata = ad.read_h5ad(data)
    few_shot = chosen.few_shot_conditions(adata.obs) if chosen.few_shot else set()
    for part, path in list(paths.items()):
        if not (parts == part).any():
            path.unlink(missing_ok=True)  # a part that is empty now must not leave an older file behind
            del paths[part]
            continue
        write_adata(path, adata[parts == part].copy())
    with writable("The output folder must be writable", out, "Free some space or check the rights"):
        write_text(out / "split.toml", to_toml(chosen))
    keys = [key for key in (chosen.identity_key, chosen.perturbation_key) if key is not None]
    tables = {part: read_obs(path) for part, path in paths.items()}
    for index, part in enumerate(tables):
        for other in list(tables)[index + 1 :]:
            check_disjoint(
                tables[part],
                tables[other],
                keys,
                control=chosen.control,
                allowed={pair[-len(keys) :] for pair in few_shot} if part == PARTS[0] else (),
                combination_separator=chosen.combination_separator,
            )
    return paths
