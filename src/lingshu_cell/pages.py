"""What every report page shares: templates that escape everything, nested facts as lines, files that appear whole."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lingshu_cell.errors import LingshuError
from lingshu_cell.judgement import number
from lingshu_cell.output_files import writable, write_text

if TYPE_CHECKING:
    import jinja2


def template_environment() -> "jinja2.Environment":
    """Load the page templates: autoescape on, unknown names refused, with the filters ``number`` and ``script_hash``.

    Returns
    -------
    jinja2.Environment

    Raises
    ------
    LingshuError
        If jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  the pictures need it; say so before work is done
    except ImportError as error:
        raise LingshuError(
            "A report needs jinja2 and matplotlib",
            f"{error.name!r} is not installed",
            'Install them with: pip install "lingshu-cell[evaluate]"',
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["script_hash"] = _script_hash
    return environment


def flat_facts(content: object, prefix: str = "") -> list[tuple[str, str]]:
    """Write every leaf of nested facts as a pair of a name and its text.

    Parameters
    ----------
    content
        Mappings, lists, numbers and text, as from JSON.
    prefix
        Name of the whole.

    Returns
    -------
    Pairs such as ``("files › real › cells", "2,700")``.
    """
    if isinstance(content, Mapping):
        return [
            leaf
            for key, value in content.items()
            for leaf in flat_facts(value, f"{prefix} › {key}" if prefix else str(key))
        ]
    if isinstance(content, list):
        content = ", ".join(str(item) for item in content)
    return [(prefix, str(content) if prefix.endswith("seed") else number(content))]


def save_page(page: str, target: Path) -> Path:
    """Write a page beside its place and move it there, so that a failure leaves the old page whole.

    Parameters
    ----------
    page
        Text of the page.
    target
        The file.

    Returns
    -------
    ``target``.
    """
    with writable("The page must be writable", target, "Free some space or check the rights"):
        write_text(target, page)
    return target


def _script_hash(script: str) -> str:
    """Fingerprint of the page's one script for its content security policy: no other script may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode("utf-8")).digest()).decode("ascii")
