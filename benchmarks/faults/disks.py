"""Disks that are full, read-only, or not ours."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from commands import Command, contents, differing, half_written
from forks import Ended, fork, small_files

if TYPE_CHECKING:
    from campaign import Undisturbed

_PAGE = 4096


@contextlib.contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """Mount a file system of a size at a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(scratch: Path) -> bool:
    """Try whether this user may mount a file system."""
    folder = scratch / "try-mount"
    folder.mkdir(exist_ok=True)
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def trial(command: Command, known: "Undisturbed", share: float, way: str, folder: Path) -> tuple[str, str, list[str]]:
    """Run a command where only a share of what it needs is there, make room, and run it again."""
    problems: list[str] = []
    disk = folder / "disk"
    disk.mkdir()
    with contextlib.ExitStack() as stack:
        if way == "tmpfs":
            command.begin(disk)
            size = size_of(disk)
            shutil.rmtree(disk)
            disk.mkdir()
            needed = _needed(command, folder)
            stack.enter_context(small_disk(disk, size + max(_PAGE, int(share * needed) // _PAGE * _PAGE)))
            command.begin(disk)
            ended = fork(command.words, disk)
            again = lambda: subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)  # noqa: E731
        else:
            command.begin(disk)
            largest = max((folder.parent / "sizes" / command.name).read_text().split(), key=int, default="0")
            ended = fork(command.words, disk, prepare=small_files(max(1, int(share * int(largest)))))
            again = lambda: None  # noqa: E731
        outcome = "enough" if ended.code == 0 else "refused"
        where = f"{command.name}, {way}, {share:.0%}"
        if ended.code:
            if wrong := ended.refused_well():
                problems.append(f"{where}: {wrong}")
            if rest := half_written(disk, known.after, known.before.values()):
                problems.append(f"{where}: {rest}")
            if way == "tmpfs" and any(file.name.endswith(".tmp") for file in disk.rglob("*")):
                problems.append(f"{where}: a draft was left behind")
            again()
            ended = fork(command.again(disk), disk)
            if ended.code:
                problems.append(f"{where}: does not go on: {ended.err[-400:]}")
        if others := differing(contents(disk), known.after):
            problems.append(f"{where}: {others[:6]}")
    shutil.rmtree(folder)
    return command.name, outcome, problems


def size_of(folder: Path) -> int:
    """Bytes that the files of a folder take on a file system of pages."""
    return sum(-(-file.stat().st_size // _PAGE) * _PAGE for file in folder.rglob("*") if file.is_file()) + _PAGE


def _needed(command: Command, folder: Path) -> int:
    return int((folder.parent / "sizes" / f"{command.name}.total").read_text())


def remember_sizes(command: Command, folder: Path, before: int) -> None:
    """Note how large the files are that a command wrote."""
    sizes = folder.parent / "sizes"
    sizes.mkdir(exist_ok=True)
    written = [str(file.stat().st_size) for file in folder.rglob("*") if file.is_file()]
    (sizes / command.name).write_text(" ".join(written))
    (sizes / f"{command.name}.total").write_text(str(max(size_of(folder) - before, _PAGE)))


def full_stdout(folder: Path) -> tuple[str, list[str]]:
    """Write to a device that is always full."""
    if not Path("/dev/full").exists():
        return "no such device here", []
    environment = dict(os.environ)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lingshu_cell", "config"], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=folder, env=environment,
        )  # fmt: skip
    wrong = Ended(done.returncode, "", done.stderr, 0.0).refused_well()
    return ("one line, exit code 2", []) if wrong is None else ("wrong", [f"/dev/full: {wrong}"])


def without_rights(command: Command, way: str, folder: Path, drop: Callable[[], None]) -> list[str]:
    """Run a command where it may not write."""
    disk = folder / "disk"
    disk.mkdir()
    problems = []
    with contextlib.ExitStack() as stack:
        if way == "read-only":
            stack.enter_context(small_disk(disk, 1 << 28))
        command.begin(disk)
        before = contents(disk)
        places = [disk, *(path for path in disk.rglob("*") if path.is_dir())]
        if way == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            for place in places:
                place.chmod(0o555)
        ended = fork(command.words, disk, prepare=drop)
        if way != "read-only":
            for place in places:
                place.chmod(0o755)
        if wrong := ended.refused_well():
            problems.append(f"{command.name}, {way}: {wrong}")
        if others := differing(contents(disk), before):
            problems.append(f"{command.name}, {way}: {others[:6]}")
    shutil.rmtree(folder)
    return problems
