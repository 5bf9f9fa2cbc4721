"""lingshu-cell: masked discrete diffusion over whole single-cell transcriptomes."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lingshu_cell.errors import LingshuError

if TYPE_CHECKING:
    from lingshu_cell.model import LingshuCell, evaluate, report

__version__ = "0.1.0"
__all__ = ["LingshuCell", "LingshuError", "__version__", "evaluate", "report"]

_FROM_MODEL = frozenset({"LingshuCell", "evaluate", "report"})  # torch is imported when one of them is asked for


def __getattr__(name: str) -> Any:
    if name not in _FROM_MODEL:
        raise AttributeError(f"module 'lingshu_cell' has no attribute {name!r}")
    from lingshu_cell import model

    return getattr(model, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``evaluate`` and ``report`` the functions: importing the modules of these names would rebind them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FROM_MODEL and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
