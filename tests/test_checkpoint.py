"""A checkpoint comes back bit for bit or not at all, and an accident while writing leaves the one before whole."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lingshu_cell.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint
from lingshu_cell.errors import LingshuError

MANIFEST = {"genes": {"names": ["GAPDH", "ACTB"]}, "licence": "test", "number": 0.1, "nothing": None, "text": "µ – ü"}


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": {
            "float32": torch.randn(7, 5, generator=generator),
            "bfloat16": torch.randn(9, generator=generator).bfloat16(),
            "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
            "transposed": torch.randn(3, 4, generator=generator).T,
            "scalar": torch.tensor(3.0),
        },
        "data": {"int64": torch.arange(-3, 3), "int32": torch.arange(4, dtype=torch.int32), "empty": torch.zeros(0, 2)},
    }


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_holds(run: Path, tensors: dict[str, dict[str, torch.Tensor]], step: int) -> None:
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == step
    for name, expected in tensors.items():
        loaded = checkpoint.tensors(name)
        assert {key: bits(value) for key, value in loaded.items()} == {
            key: bits(value) for key, value in expected.items()
        }


def resign(folder: Path, change) -> None:
    """Change the manifest and make its checksum fit again, as only a forger would."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change(manifest)
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a fresh checkpoint, alone in its run."""
    return save_checkpoint(tmp_path, 12, some_tensors(), MANIFEST)


def test_tensors_and_manifest_come_back_bit_for_bit(saved):
    assert saved.name == "checkpoint-00000012"
    for path in (saved, saved.parent, str(saved.parent)):
        assert_holds(path, some_tensors(), 12)
    manifest = load_checkpoint(saved).manifest
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    assert {file.name for file in saved.iterdir()} == {"manifest.json", "weights.safetensors", "data.safetensors"}


def test_the_newest_is_loaded_and_only_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, some_tensors(step), MANIFEST)
    assert_holds(tmp_path, some_tensors(100), 100)
    assert_holds(tmp_path / "checkpoint-00000010", some_tensors(10), 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000010", "checkpoint-00000100"]


def test_the_same_step_can_be_saved_again(saved):
    save_checkpoint(saved.parent, 12, some_tensors(1), MANIFEST)
    assert_holds(saved.parent, some_tensors(1), 12)


@pytest.mark.parametrize("file", ["weights.safetensors", "data.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_tensors_are_refused(saved, file, share):
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(LingshuError, match=f"must be whole: .*{file} does not match its checksum. Delete this folder"):
        load_checkpoint(saved).tensors(file.split(".")[0])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_in_the_tensors_is_refused(saved, share, bit):
    content = bytearray((saved / "weights.safetensors").read_bytes())
    content[int((len(content) - 1) * share)] ^= 1 << bit
    (saved / "weights.safetensors").write_bytes(content)
    checkpoint = load_checkpoint(saved)
    with pytest.raises(LingshuError, match=r"weights\.safetensors does not match its checksum"):
        checkpoint.tensors("weights")
    assert checkpoint.tensors("data").keys() == some_tensors()["data"].keys()


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused_or_changes_nothing(saved):
    file = saved / "manifest.json"
    whole, manifest = file.read_bytes(), load_checkpoint(saved).manifest
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        file.write_bytes(content)
        try:
            assert load_checkpoint(saved).manifest == manifest  # white space
        except LingshuError:
            continue


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"files": 3}', b"[" * 100_000], ids=repr)
def test_a_manifest_that_is_none_is_refused(saved, content):
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(LingshuError, match="checkpoint must be whole"):
        load_checkpoint(saved)


def test_an_edited_manifest_is_refused(saved):
    file = saved / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace("GAPDH", "TP53"), encoding="utf-8")
    with pytest.raises(LingshuError, match=r"manifest.json does not match its checksum"):
        load_checkpoint(saved)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_is_refused_with_the_way_out(saved, version):
    resign(saved, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(
        LingshuError, match=rf"format version {FORMAT_VERSION}: .* has {version}\. Install the version of lingshu-cell"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "sub/outside", "..\\outside", "OUTSIDE", ""])
def test_paths_that_lead_elsewhere_are_refused_even_when_the_manifest_lists_them(saved, name):
    elsewhere = saved.parent / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, elsewhere)
    digest = hashlib.sha256(elsewhere.read_bytes()).hexdigest()
    resign(saved, lambda manifest: manifest["files"].update({f"{name}.safetensors": digest}))
    with pytest.raises(LingshuError, match="checkpoint must be whole"):
        load_checkpoint(saved).tensors(name)


def test_a_file_the_manifest_does_not_list_is_refused(saved):
    save_file({"a": torch.zeros(1)}, saved / "extra.safetensors")
    with pytest.raises(LingshuError, match=r"lists no extra\.safetensors"):
        load_checkpoint(saved).tensors("extra")


def test_a_missing_file_is_refused(saved):
    (saved / "weights.safetensors").unlink()
    with pytest.raises(LingshuError, match=r"must be whole: .*weights\.safetensors"):
        load_checkpoint(saved).tensors("weights")


def test_pickled_weights_under_a_good_checksum_are_refused(saved):
    torch.save({"a": torch.zeros(1)}, saved / "weights.safetensors")
    digest = hashlib.sha256((saved / "weights.safetensors").read_bytes()).hexdigest()
    resign(saved, lambda manifest: manifest["files"].update({"weights.safetensors": digest}))
    with pytest.raises(LingshuError, match=r"must be whole: .*weights\.safetensors"):
        load_checkpoint(saved).tensors("weights")


@pytest.mark.parametrize("make", [lambda run: run / "absent", lambda run: run, lambda run: run / "checkpoint-00000001"])
def test_a_folder_without_checkpoints_is_refused(tmp_path, make):
    with pytest.raises(LingshuError, match="must hold a checkpoint: none found in"):
        load_checkpoint(make(tmp_path))


class Crash(BaseException):
    """The process ends here: nothing after this runs, not even clean-up for ordinary errors."""


def test_a_crash_between_write_and_rename_leaves_the_old_one_whole(saved, monkeypatch):
    def crash(*args):
        raise Crash

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, crash)
    with pytest.raises(Crash):
        save_checkpoint(saved.parent, 24, some_tensors(1), MANIFEST)
    monkeypatch.undo()
    assert_holds(saved.parent, some_tensors(), 12)
    save_checkpoint(saved.parent, 24, some_tensors(2), MANIFEST)
    assert_holds(saved.parent, some_tensors(2), 24)


def test_a_crash_while_writing_leaves_the_old_one_whole(saved, monkeypatch):
    def crash(folder):
        (folder / "weights.safetensors").write_bytes(b"half")
        raise Crash

    monkeypatch.setattr("lingshu_cell.checkpoint.flush_all", crash)
    with pytest.raises(Crash):
        save_checkpoint(saved.parent, 24, some_tensors(1), MANIFEST)
    assert_holds(saved.parent, some_tensors(), 12)


def test_a_full_disk_leaves_the_old_one_whole_and_says_so(saved):
    """A real write error: the kernel refuses to let any file grow past 20 kB."""
    large = {"weights": {"a": torch.zeros(100_000)}, **{k: v for k, v in some_tensors().items() if k != "weights"}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(LingshuError, match=r"run folder must be writable: .* Free some space or change --out"):
            save_checkpoint(saved.parent, 24, large, MANIFEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(saved.parent, some_tensors(), 12)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no draft is left behind"
    save_checkpoint(saved.parent, 24, large, MANIFEST)
    assert load_checkpoint(saved.parent).step == 24
