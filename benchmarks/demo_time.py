"""Time of the two things a newcomer waits for: ``make install`` on a fresh copy of this tree, and the demo by stage.

    python benchmarks/demo_time.py

The copy has no virtual environment and pip keeps no cache, so that every package is fetched and unpacked.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recording import ROOT, Stopwatch, environment, markdown_table, say, write_result

_NOT_COPIED = (
    ".git",
    ".venv",
    "build",
    "demo-run",
    "runs",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
)


def install(copy: Path, make_variables: list[str]) -> dict[str, Any]:
    """Copy the tree, run ``make install`` in it and say how long it took and how large the environment is.

    Parameters
    ----------
    copy
        Folder to make.
    make_variables
        Passed on, e.g. ``PYTHON=python3.12``.
    """
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    environ = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    watch = Stopwatch()
    subprocess.run(["make", "install", *make_variables], cwd=copy, check=True, env=environ, stdout=sys.stderr)
    seconds = watch.seconds()
    size = sum(file.lstat().st_size for file in (copy / ".venv").rglob("*") if not file.is_symlink())
    return {"seconds": seconds, "environment_gib": size / 2**30}


def demo(command: Path, folder: Path, settings: list[str]) -> dict[str, float]:
    """Run ``lingshu demo`` and give the seconds of each stage, and of the whole command.

    Parameters
    ----------
    command
        The installed ``lingshu``.
    folder
        Where the demo writes; must not exist.
    settings
        ``section.key=value`` strings; none for the demo as it is.
    """
    chosen = [word for setting in settings for word in ("--set", setting)]
    watch = Stopwatch()
    subprocess.run([command, "demo", "--out", folder, *chosen], check=True, stdout=sys.stderr)
    seconds = watch.seconds()
    stages = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["seconds"]
    stages.pop("total")
    return {**stages, "start of Python and imports": seconds - sum(stages.values()), "whole command": seconds}


def main() -> None:
    """Install, run the demo, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="append", default=[], metavar="NAME=VALUE", help="variable of make")
    parser.add_argument("--installed", type=Path, help="an environment to use: measure the demo only")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="setting of the demo")
    parser.add_argument("--name", default="demo_time")
    args, facts = parser.parse_args(), environment()
    with tempfile.TemporaryDirectory() as scratch:
        installed = None
        if args.installed is None:
            say("make install in a fresh copy")
            installed = install(Path(scratch) / "copy", args.make)
        bin_folder = (args.installed or Path(scratch) / "copy" / ".venv") / "bin"
        stages = demo(bin_folder.absolute() / "lingshu", Path(scratch) / "demo", args.set)
    rows = [["installation", installed["seconds"]]] if installed else []
    rows += [[f"demo: {stage}", seconds] for stage, seconds in stages.items()]
    about = "A fresh copy of the tree: `make install` (all packages fetched anew), then `lingshu demo`."
    if installed:
        about += f" The environment takes {installed['environment_gib']:.2f} GiB."
    body = {"installation": installed, "demo_seconds": stages, "settings": args.set}
    write_result(args.name, about, facts, body, [markdown_table(["", "seconds"], rows)])


if __name__ == "__main__":
    sys.exit(main())
