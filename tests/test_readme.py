"""What the documents say is so: the tree on the disk, commands and options, settings and outputs."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from lingshu_cell.config import load_config
from lingshu_cell.console import settings_toml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md", "CHANGELOG.md", "docs/config.md", "docs/outputs.md", "docs/distributed.md", "docs/generation.md",
    "docs/scaling.md",
)  # fmt: skip


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def tree_of_readme() -> set[str]:
    lines = fenced(README.split("<!-- tree -->")[1], "text")[0].splitlines()
    found, folders = set(), []
    for line in lines:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(folders))
            assert len(line.split()) > 1, f"{name} is not described"
    return found


def tree_on_disk() -> set[str]:
    package = ROOT / "src" / "lingshu_cell"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files -= set(package.glob("*/__init__.py"))  # they only name their folder
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_tree_is_that_of_the_disk():
    assert tree_of_readme() == tree_on_disk()


@cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lingshu_cell", command, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def commands() -> list[str]:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    inline = re.findall(r"`(lingshu [a-z][^`]*)`", text)
    blocks = [line.split("  #")[0] for block in fenced(text, "bash") for line in block.splitlines()]
    return sorted({line for line in inline + blocks if line.startswith("lingshu ")})


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line):
    words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", line))
    if words[1].startswith("--"):
        return
    told = help_of(words[1])
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", told), f"{option} is no option of lingshu {words[1]}"


def test_links_lead_to_files():
    for name in DOCUMENTS:
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (folder / target).is_file(), f"{name} links to {target}"


def test_settings_of_small_are_those_of_the_program():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert fenced(page, "toml")[0] == settings_toml(load_config("small")) + "\n", "paste the output of lingshu config"


def test_settings_of_paper_are_those_that_differ():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    said = tomllib.loads(fenced(page, "toml")[1])
    paper, small = (load_config(name).model_dump(mode="json") for name in ("paper", "small"))
    assert said.pop("preset") == "paper" and said.pop("network") == paper["network"]
    for section in ("data", "training", "generation"):
        changed = {key: value for key, value in paper[section].items() if value != small[section][key]}
        assert said.pop(section, {}) == changed
    assert not said


def test_documents_name_no_machine():
    for name in (*DOCUMENTS, "Makefile", ".ci/run", "constraints.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/root/|/home/|file://|localhost", text), name
