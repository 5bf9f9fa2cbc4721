"""How a run comes by its configuration: files and settings, the run to be resumed, automatic conditions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from lingshu_cell.checkpoint import load_checkpoint, reading
from lingshu_cell.config import Config, load_config
from lingshu_cell.data.anndata_io import read_obs
from lingshu_cell.data.store import is_store, open_store
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import expanded

AUTOMATIC = "auto"
"""Condition on ``cell_type`` where every cell of every data set has one."""

_AUTOMATIC_KEY = "cell_type"


def run_config(
    sources: Sequence[Path | str | ad.AnnData],
    run: Path,
    *,
    preset: str | None = None,
    file: Path | None = None,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    condition_keys: Sequence[str] | str | None = AUTOMATIC,
    resume: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> Config:
    """Build the configuration of a run.

    Parameters
    ----------
    sources
        The data sets, looked at only for automatic conditions.
    run
        Run folder.
    preset, file, settings, overrides
        See :func:`lingshu_cell.config.load_config`.
    condition_keys
        obs columns to condition on; ``None`` or an empty list for none. ``"auto"`` leaves the choice to the settings,
        and where they say nothing takes ``cell_type`` if every cell of every data set has one.
    resume
        Start from the settings of the run in place of a preset's.
    on_note
        Called with a line when conditions are chosen automatically.

    Returns
    -------
    Config
        All settings.

    Raises
    ------
    LingshuError
        On settings that do not exist or do not fit, on another preset than that of a resumed run, or when ``resume``
        finds no checkpoint.
    """
    overrides = dict(overrides or {})
    if condition_keys != AUTOMATIC:
        chosen = (condition_keys,) if isinstance(condition_keys, str) else tuple(condition_keys or ())
        overrides["data"] = {**overrides.get("data", {}), "condition_keys": chosen}
    if resume and expanded(run).is_dir():
        checkpoint = load_checkpoint(run)
        with reading(checkpoint):
            saved = Config.model_validate(checkpoint.manifest["config"]).model_dump(mode="json")
        if preset not in (None, saved["preset"]):
            raise LingshuError(
                "A resumed run keeps its preset", f"it has '{saved['preset']}', not '{preset}'", "Leave --preset out"
            )
        return load_config(saved["preset"], file, settings, overrides, base=saved)
    config = load_config(preset, file, settings, overrides)
    if "condition_keys" in config.data.model_fields_set:
        return config
    keys = automatic_condition_keys(sources)
    if keys:
        on_note(f"conditioned on {keys[0]}, as every cell has one (--no-conditions or --condition-key change that)")
    data = config.data.model_copy(update={"condition_keys": keys})
    return config.model_copy(update={"data": data})


def automatic_condition_keys(sources: Sequence[Path | str | ad.AnnData]) -> tuple[str, ...]:
    """Give ``("cell_type",)`` if every cell of every data set has such a label, else nothing.

    Parameters
    ----------
    sources
        AnnData objects, files or URLs, or the folder of a store; only ``obs`` is read.

    Raises
    ------
    LingshuError
        If a source cannot be read.
    """
    return (_AUTOMATIC_KEY,) if all(_has_labels(source) for source in sources) else ()


def _has_labels(source: Path | str | ad.AnnData) -> bool:
    if is_store(source):
        return open_store(source).is_labelled(_AUTOMATIC_KEY)
    obs = read_obs(source)
    if _AUTOMATIC_KEY not in obs:
        return False
    column = obs[_AUTOMATIC_KEY]
    return not column.isna().any() and not pd.api.types.is_float_dtype(column.dtype)
