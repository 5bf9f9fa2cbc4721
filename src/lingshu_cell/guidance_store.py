"""The guidance that a calibration found for a run, on disk beside its checkpoints."""

from dataclasses import asdict, dataclass
from pathlib import Path

from lingshu_cell.arguments import is_finite
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import read_json
from lingshu_cell.output_files import checked, writable, write_checked_json

GUIDANCE_NAME = "guidance.json"


@dataclass(frozen=True)
class Calibration:
    """Which guidance makes predicted effects as strong as measured ones.

    Attributes
    ----------
    scale, space
        See ``config.GenerationConfig``.
    checkpoint_step
        Step of the checkpoint it was fitted for; another checkpoint does not use it.
    scales, slopes
        What was tried, and the pooled slope of predicted on measured log fold change under each.
    conditions
        The validation conditions.
    data_fingerprint
        sha256 of the validation cells.
    """

    scale: float
    space: str
    checkpoint_step: int
    scales: tuple[float, ...]
    slopes: tuple[float, ...]
    conditions: tuple[str, ...]
    data_fingerprint: str


def save_calibration(run: Path, calibration: Calibration) -> Path:
    """Write ``RUN/guidance.json``; the file appears when it is whole."""
    file = run / GUIDANCE_NAME
    with writable("The run folder must be writable", file, "Free some space or check the rights"):
        write_checked_json(file, asdict(calibration))
    return file


def load_calibration(run: Path, checkpoint_step: int) -> Calibration | None:
    """Read the calibration of a run; ``None`` where there is none, or one of another checkpoint.

    Raises
    ------
    LingshuError
        If the file is not what :func:`save_calibration` wrote.
    """
    file = run / GUIDANCE_NAME
    if not file.is_file():
        return None
    rule = "guidance.json must be as lingshu calibrate wrote it"
    values = read_json(file, rule, "Delete it and calibrate again")
    try:
        values = checked(values)
        values |= {name: tuple(values[name]) for name in ("scales", "slopes", "conditions")}
        calibration = Calibration(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise LingshuError(rule, f"{file}: {error}", "Delete it and calibrate again") from None
    if not is_finite(calibration.scale):
        raise LingshuError(rule, f"{file}: the scale is no number", "Calibrate again")
    return calibration if calibration.checkpoint_step == checkpoint_step else None
