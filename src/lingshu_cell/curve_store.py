"""The information curve of a run on disk: in the manifest since training ended, or measured later beside it."""

from dataclasses import dataclass
from pathlib import Path

from lingshu_cell.checkpoint import Checkpoint
from lingshu_cell.diffusion.information import InformationCurve
from lingshu_cell.errors import LingshuError
from lingshu_cell.input_files import read_json
from lingshu_cell.output_files import checked, writable, write_checked_json

FILE = "schedule.json"


@dataclass(frozen=True)
class StoredCurve:
    """A curve and the cells it comes from, in words."""

    curve: InformationCurve
    measured_on: str


def load_curve(checkpoint: Checkpoint) -> StoredCurve | None:
    """Give the curve of a checkpoint: ``RUN/schedule.json`` if measured with this checkpoint, else the manifest's.

    Raises
    ------
    LingshuError
        If ``schedule.json`` cannot be read.
    """
    file = checkpoint.folder.parent / FILE
    if file.is_file():
        stored = read_json(file, "A stored schedule must be whole", "Delete this file")
        try:
            stored = checked(stored)
            if stored["checkpoint_checksum"] == checkpoint.manifest["checksum"]:
                curve = InformationCurve.from_json(stored["information_curve"])
                return StoredCurve(curve, str(stored["measured_on"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LingshuError("A stored schedule must be whole", f"{file}: {error}", "Delete this file") from None
    values = checkpoint.manifest.get("information_curve")
    if values is None:
        return None
    curve = InformationCurve.from_json(values)
    return StoredCurve(curve, f"{curve.n_cells:,} validation cells, when training ended")


def save_curve(checkpoint: Checkpoint, stored: StoredCurve) -> Path:
    """Write ``RUN/schedule.json``, beside and renamed; generation takes its curve from there.

    Raises
    ------
    LingshuError
        If the run folder cannot be written.
    """
    file = checkpoint.folder.parent / FILE
    content = {
        "checkpoint": checkpoint.folder.name,
        "checkpoint_checksum": checkpoint.manifest["checksum"],
        "measured_on": stored.measured_on,
        "information_curve": stored.curve.to_json(),
    }
    with writable("The run folder must be writable", file, "Free some space or check the rights"):
        write_checked_json(file, content)
    return file
