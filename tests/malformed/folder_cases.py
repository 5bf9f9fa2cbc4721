"""Runs, stores and evaluations whose files are damaged, or are whole and say what no program of ours wrote."""

# ruff: noqa: E501 - a case is one line

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lingshu_cell.checksums import checksum, sha256
from malformed.catalogue import Collector
from malformed.harness import ACCEPTED, REFUSED

CASES = Collector()
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "responses"
Edit = Callable[[Path], object]


def manifest(change: Callable[[dict[str, Any]], object], signed: bool = True) -> Edit:
    """Change a manifest and, as only a forger would, make its checksum fit."""

    def edit(folder: Path) -> None:
        file = folder / "manifest.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        if signed:
            content["checksum"] = checksum(content)
        file.write_text(json.dumps(content), encoding="utf-8")

    return edit


def text(name: str, content: str | bytes) -> Edit:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    """Change tensors, and the checksums with them."""

    def edit(folder: Path) -> None:
        file = folder / f"{name}.safetensors"
        values = {key: value.copy() for key, value in load_file(file).items()}
        changed = change(values)
        save_file(changed if isinstance(changed, dict) else values, file)
        manifest(lambda m: m["files"].__setitem__(file.name, sha256(file)))(folder)

    return edit


def _put(*path: str, value: object) -> Edit:
    """Set an entry of a manifest."""

    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return manifest(change)


def _without(key: str) -> Edit:
    return manifest(lambda m: m.pop(key))


def _one_rare(gene: int, data_set: int = 0) -> dict[str, np.ndarray]:
    """One count of a gene too rare to be modelled."""
    return {"rare_gene": np.array([gene]), "rare_count": np.ones(1, np.int32), "rare_data_set": np.array([data_set])}


def _replaced(name: str, make: Callable[[Path], object]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def _run(edit: Edit, words: list[str]) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        shutil.copytree(examples / "run", "model")
        edit(next(Path("model").glob("checkpoint-*")))
        return words

    return make


GENERATE = ["generate", "model", "--n", "2", "--out", "g.h5ad"]
_EMA = "ema_0.05"
for _what, _expected, _edit in (
    ("whole", ACCEPTED, lambda f: None),
    ("no manifest", REFUSED, lambda f: (f / "manifest.json").unlink()),
    ("an empty manifest", REFUSED, text("manifest.json", "")),
    ("a manifest that is no JSON", REFUSED, text("manifest.json", "{")),
    ("a manifest that is a list", REFUSED, text("manifest.json", "[]")),
    ("a deeply nested manifest", REFUSED, text("manifest.json", "[" * 100_000)),
    ("a manifest with a number of 5,000 digits", REFUSED, text("manifest.json", '{"a": ' + "9" * 5000 + "}")),
    ("a manifest that is no text", REFUSED, text("manifest.json", b"\xff\xfe")),
    ("a manifest that is a pipe", REFUSED, _replaced("manifest.json", os.mkfifo)),
    ("a manifest that is endless", REFUSED, _replaced("manifest.json", lambda p: p.symlink_to("/dev/zero"))),
    ("a changed manifest", REFUSED, manifest(lambda m: m.update(step=7), signed=False)),
    ("no format version", REFUSED, _without("format_version")),
    ("a later format version", REFUSED, _put("format_version", value=99)),
    ("a format version of text", REFUSED, _put("format_version", value="1")),
    ("no files", REFUSED, _without("files")),
    ("files that are a list", REFUSED, _put("files", value=[])),
    ("no configuration", REFUSED, _without("config")),
    ("a configuration that is a number", REFUSED, _put("config", value=3)),
    ("an unknown setting", REFUSED, _put("config", "training", "unknown", value=3)),
    ("a width of 10^9", REFUSED, _put("config", "network", "width", value=10**9)),
    ("a width of 50,000", REFUSED, _put("config", "network", "width", value=50_000)),
    ("another width", REFUSED, _put("config", "network", "width", value=16)),
    ("10^6 blocks", REFUSED, _put("config", "network", "n_blocks", value=10**6)),
    ("another network", REFUSED, _put("config", "network", value={"kind": "transformer"})),
    ("averages of other widths", REFUSED, _put("config", "training", "ema_sigma_rel", value=[0.07, 0.1])),
    ("no genes", REFUSED, _without("genes")),
    ("genes that are a number", REFUSED, _put("genes", value=3)),
    ("fewer genes", REFUSED, _put("genes", "names", value=["GENE0"])),
    ("duplicated genes", REFUSED, _put("genes", "names", value=["GENE0"] * 40)),
    ("no conditioning", REFUSED, _without("conditioning")),
    ("conditioning of another kind", REFUSED, _put("conditioning", value=[])),
    ("more categories than the weights have", REFUSED, _put("conditioning", "vocabulary", value={"cell_type": ["a"] * 9})),
    ("no number of training cells", REFUSED, _without("n_training_cells")),
    ("-3 training cells", REFUSED, _put("n_training_cells", value=-3)),
    ("training cells of text", REFUSED, _put("n_training_cells", value="many")),
    ("an information curve of text", REFUSED, _put("information_curve", value="flat")),
    ("no weights", REFUSED, lambda f: (f / f"{_EMA}.safetensors").unlink()),
    ("weights that are cut off", REFUSED, lambda f: os.truncate(f / f"{_EMA}.safetensors", 100)),
    ("weights that the manifest does not list", REFUSED, manifest(lambda m: m["files"].pop(f"{_EMA}.safetensors"))),
    ("weights that are a pipe", REFUSED, _replaced(f"{_EMA}.safetensors", os.mkfifo)),
    ("weights that are endless", REFUSED, _replaced(f"{_EMA}.safetensors", lambda p: p.symlink_to("/dev/zero"))),
    ("one tensor less", REFUSED, tensors(_EMA, lambda t: t.pop(next(iter(t))))),
    ("one tensor more", REFUSED, tensors(_EMA, lambda t: t.update(more=np.zeros(3, np.float32)))),
    ("NaN among the weights", REFUSED, tensors(_EMA, lambda t: {k: np.full_like(v, np.nan) for k, v in t.items()})),
    ("weights of other shapes", REFUSED, tensors(_EMA, lambda t: {k: np.zeros((3, 3), np.float32) for k in t})),
    ("weights of no numbers", REFUSED, tensors(_EMA, lambda t: {k: np.zeros(0, np.float32) for k in t})),
    ("no list of modelled genes", REFUSED, tensors("data", lambda t: t.pop("modelled"))),
    ("modelled genes out of range", REFUSED, tensors("data", lambda t: t.update(modelled=t["modelled"] + 100))),
    ("negative modelled genes", REFUSED, tensors("data", lambda t: t.update(modelled=t["modelled"] - 100))),
    ("modelled genes of fractions", REFUSED, tensors("data", lambda t: t.update(modelled=t["modelled"].astype(np.float32)))),
    ("modelled genes of two dimensions", REFUSED, tensors("data", lambda t: t.update(modelled=t["modelled"][:, None]))),
    ("rare genes out of range", REFUSED, tensors("data", lambda t: t.update(_one_rare(99)))),
    ("rare genes of a data set that is not there", REFUSED, tensors("data", lambda t: t.update(_one_rare(0, data_set=1)))),
    ("rare genes of no data set", REFUSED, tensors("data", lambda t: t.update(_one_rare(0), data_set_cells=t["data_set_cells"][:0]))),
    ("library sizes of fewer conditions", REFUSED, tensors("conditioning", lambda t: t.update({"depth.n_R": t["depth.n_R"][:-1]}))),
    ("condition rows out of range", REFUSED, tensors("data", lambda t: t.update(condition_rows=t["condition_rows"] + 100))),
    ("no condition rows", REFUSED, tensors("data", lambda t: t.update(condition_rows=t["condition_rows"][:0]))),
    ("negative numbers of cells", REFUSED, tensors("data", lambda t: t.update(condition_row_counts=-t["condition_row_counts"]))),
    ("a calibration that is a list", REFUSED, lambda f: (f.parent / "guidance.json").write_text("[]")),
    ("a calibration of NaN", REFUSED, lambda f: (f.parent / "guidance.json").write_text('{"scale": NaN}')),
    ("a schedule that is no JSON", REFUSED, lambda f: (f.parent / "schedule.json").write_text("{")),
    ("a schedule that is a number", REFUSED, lambda f: (f.parent / "schedule.json").write_text("3")),
):  # fmt: skip
    CASES("run", _what, _expected)(_run(_edit, GENERATE))
for _what, _edit in (
    ("no genes", _without("genes")), ("no configuration", _without("config")), ("no versions", _without("versions")),
    ("conditions that are a number", _put("conditions", value=3)), ("steps of text", _put("n_parameters", value="x")),
    ("a quality of text", _put("validation_nelbo_nats_per_cell", value="good")),
):  # fmt: skip
    CASES("run, told of", _what, REFUSED)(_run(_edit, ["info", "model"]))


def _store(edit: Edit) -> Callable[[Path], Callable[[], object]]:
    def make(examples: Path) -> Callable[[], object]:
        from lingshu_cell.data.store import open_store

        shutil.copytree(examples / "store", "store")
        edit(Path("store"))

        def read() -> None:
            store = open_store("store")
            for _ in store.iterate():
                pass
            store.token_counts()
            store.obs()
            store.close()

        return read

    return make


for _what, _expected, _edit in (
    ("whole", ACCEPTED, lambda f: None),
    ("no manifest", REFUSED, lambda f: (f / "manifest.json").unlink()),
    ("a manifest that is no JSON", REFUSED, text("manifest.json", "{")),
    ("a manifest that is a list", REFUSED, text("manifest.json", "[]")),
    ("a manifest that is a pipe", REFUSED, _replaced("manifest.json", os.mkfifo)),
    ("a changed manifest", REFUSED, manifest(lambda m: m.update(n_cells=7), signed=False)),
    ("a later format version", REFUSED, _put("format_version", value=99)),
    ("a file above the store", REFUSED, manifest(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}))),
    ("a file of an absolute path", REFUSED, manifest(lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}))),
    ("files of another kind", REFUSED, manifest(lambda m: m["files"].update({"arrays/a.npy": 3}))),
    ("a shard less", REFUSED, lambda f: (f / "shards/shard-000001.h5ad").unlink()),
    ("a shard that is cut off", REFUSED, lambda f: os.truncate(f / "shards/shard-000001.h5ad", 100)),
    ("a shard of other bytes", REFUSED, lambda f: text("shards/shard-000001.h5ad", bytes((f / "shards/shard-000001.h5ad").stat().st_size))(f)),
    ("10^12 cells", REFUSED, _put("n_cells", value=10**12)),
    ("-1 cells", REFUSED, _put("n_cells", value=-1)),
    ("cells of text", REFUSED, _put("n_cells", value="many")),
    ("0 cells per shard", REFUSED, _put("cells_per_shard", value=0)),
    ("no labels", REFUSED, _without("obs")),
    ("labels that are a number", REFUSED, _put("obs", value=3)),
    ("labels in a file elsewhere", REFUSED, manifest(lambda m: m["obs"][0].update(file="../../x.npy"))),
    ("labels in a file that is not listed", REFUSED, manifest(lambda m: m["obs"][0].update(file="arrays/none.npy"))),
    ("labels of objects", REFUSED, manifest(lambda m: m["obs"][0].update(dtype="O"))),
    ("fewer genes", REFUSED, _put("genes", "names", value=["GENE0"])),
    ("no data sets", REFUSED, _put("data_sets", value=[])),
):  # fmt: skip
    CASES("store", _what, _expected)(_store(_edit))


def _report(source: str, edit: Edit) -> Callable[[Path], list[str]]:
    def make(examples: Path) -> list[str]:
        shutil.copytree(GOLDEN / "ours" if source == "responses" else examples / source, "judged")
        edit(Path("judged"))
        return ["report", "judged"]

    return make


for _what, _expected, _source, _edit in (
    ("a missing table", REFUSED, "evaluation", lambda f: (f / "cells.csv.gz").unlink()),
    ("a table that is no gzip", REFUSED, "evaluation", text("cells.csv.gz", "source\n")),
    ("metrics that are a list", REFUSED, "evaluation", text("metrics.json", "[]")),
    ("metrics that are nested deeply", REFUSED, "evaluation", text("metrics.json", "[" * 100_000)),
    ("metrics that are empty", REFUSED, "evaluation", text("metrics.json", "{}")),
    ("a metric of text", REFUSED, "evaluation", text("metrics.json", '{"a": {"value": "x"}}')),
    ("metrics that are a pipe", REFUSED, "evaluation", _replaced("metrics.json", os.mkfifo)),
    ("facts that are a number", REFUSED, "evaluation", text("facts.json", "3")),
    ("a record of responses that is a list", REFUSED, "responses", text("responses.json", "[]")),
    ("a record of responses that is no JSON", REFUSED, "responses", text("responses.json", "{")),
    ("conditions that are empty", REFUSED, "responses", text("conditions.csv", "")),
):  # fmt: skip
    CASES("evaluation", _what, _expected)(_report(_source, _edit))
