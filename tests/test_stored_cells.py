"""Training from a store: the statistics of the same cells in memory, each cell once per epoch, resumed exactly, and in
memory that does not grow with the cells.
"""

import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import SCREEN_SPLIT, real_cells, tiny_config
from test_train import assert_same_run, history

import lingshu_cell
from lingshu_cell.checkpoint import load_checkpoint
from lingshu_cell.checksums import checksum
from lingshu_cell.conditioning import Conditioner
from lingshu_cell.conditioning_of_cells import build_conditioner
from lingshu_cell.config import Config
from lingshu_cell.data.anndata_io import read_counts
from lingshu_cell.data.loader import WINDOW_CELLS
from lingshu_cell.data.store import open_store
from lingshu_cell.data.stored_cells import StoredCells, open_cells
from lingshu_cell.data.training_set import TrainingSet, assemble
from lingshu_cell.errors import LingshuError
from lingshu_cell.prepare import prepare
from lingshu_cell.run_config import run_config
from lingshu_cell.schedule import schedule_run
from lingshu_cell.tokens import MASK_TOKEN
from lingshu_cell.train import train
from lingshu_cell.validation_conditions import ValidationConditions

SPLIT = (
    SCREEN_SPLIT
    + """[validation]
pairs = [{ line = "L1", drug = "Q" }]
[few_shot]
pairs = [{ line = "L2", drug = "P", share = 0.3 }]
[control_shares]
validation = 0.2
"""
)
DATA = {
    "condition_keys": ["line"], "perturbation_key": "drug", "control": "none", "dose_key": "dose", "depth": True,
    "validation_fraction": 0.0,
}  # fmt: skip


def in_memory(file: Path, config: Config) -> TrainingSet:
    keys = [*config.data.condition_keys, *([config.data.perturbation_key] if config.data.perturbation_key else [])]
    return assemble([read_counts(file, None, keys)], **config.data.assembly())


def stored(store: Path, config: Config) -> StoredCells:
    return open_cells(store, **{k: v for k, v in config.data.assembly().items() if k != "min_coverage"})


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    """300 real cells × 120 genes, called a screen of four lines with P, Q, Q+P and none; as file and as store."""
    folder, rng = tmp_path_factory.mktemp("screen"), np.random.default_rng(0)
    cells = real_cells(300, 120, least_detected=1)
    cells.obs["line"] = rng.choice(["L1", "L2", "L3", "L4"], 300)
    cells.obs["drug"] = rng.choice(["none", "P", "Q", "Q+P"], 300, p=[0.4, 0.2, 0.2, 0.2])
    cells.obs["dose"] = np.where(cells.obs["drug"] == "none", np.nan, rng.choice([1.0, 100.0], 300))
    cells.write_h5ad(folder / "cells.h5ad")
    prepare([folder / "cells.h5ad"], folder / "store", cells_per_shard=64)
    (folder / "split.toml").write_text(SPLIT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A store of 200 and of 40 real cells; the second data set lacks 30 of 100 genes and all cell types."""
    folder, cells = tmp_path_factory.mktemp("two"), real_cells(240, 100)
    large, small = cells[:200].copy(), cells[200:, :70].copy()
    del small.obs["cell_type"]
    large.write_h5ad(folder / "large.h5ad")
    small.write_h5ad(folder / "small.h5ad")
    prepare([folder / "large.h5ad", folder / "small.h5ad"], folder / "store", cells_per_shard=64)
    return folder / "store"


def triples(rare) -> list[tuple[int, int, int]]:
    return sorted(zip(rare.gene.tolist(), rare.count.tolist(), rare.data_set.tolist(), strict=True))


@pytest.mark.parametrize("split", [False, True])
def test_statistics_are_those_of_the_file(screen, split):
    config = tiny_config(data={**DATA, "split": str(screen / "split.toml") if split else None})
    ours, theirs = stored(screen / "store", config), in_memory(screen / "cells.h5ad", config)
    assert ours.vocabulary.names == theirs.vocabulary.names and ours.conditions == theirs.conditions
    for name in ("modelled", "measured"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.token_counts(), theirs.token_counts())
    assert triples(ours.rare) == triples(theirs.rare) and (ours.rare.n_cells_S == theirs.rare.n_cells_S).all()
    assert len(ours.rare.gene) > 0
    assert [len(getattr(ours, part)) for part in ("train", "validation", "seen")] == [
        len(getattr(theirs, part)) for part in ("train", "validation", "seen")
    ]
    for part in ("train", "validation", "seen"):
        for mine, other in zip(
            ours.condition_frequencies(getattr(ours, part)),
            theirs.condition_frequencies(getattr(theirs, part)),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, other)
    assert ours.notes == theirs.notes and any("genes are modelled" in note for note in ours.notes)
    assert_same_conditioner(build_conditioner(ours, config), build_conditioner(theirs, config))
    assert (len(ours.validation) > 0) == split and (not split or len(ours.train) < 250)


def assert_same_conditioner(ours: Conditioner, theirs: Conditioner) -> None:
    """Only which control cells make up random parts of a context may differ."""
    one, other = ours.to_tensors(), theirs.to_tensors()
    assert one.keys() == other.keys() and {"context.profile_KJG", "effect.effect_KG", "depth.library_M"} <= {*one}
    first = torch.cat([torch.zeros(1, dtype=torch.int64), one["context.first_I"]])
    for name, value in one.items():
        expected = other[name]
        if name == "context.profile_KJG":
            value, expected = value[first], expected[first]
        # effects are float16, so their last bit follows the order of sums
        torch.testing.assert_close(value, expected, rtol=2e-3 if value.dtype == torch.float16 else 1e-4, atol=1e-4)
    assert ours.to_json()["vocabulary"] == theirs.to_json()["vocabulary"]
    assert ours.dose_mean == pytest.approx(theirs.dose_mean) and ours.dose_sd == pytest.approx(theirs.dose_sd)


def test_validation_conditions_are_measured_as_in_memory(screen):
    config = tiny_config(data={**DATA, "split": str(screen / "split.toml")})
    found = []
    for cells in (stored(screen / "store", config), in_memory(screen / "cells.h5ad", config)):
        found.append(ValidationConditions.of(cells, build_conditioner(cells, config)))
    assert found[0].names == found[1].names == ("L1 / Q",)
    np.testing.assert_allclose(found[0].measured_KG, found[1].measured_KG, atol=1e-9)
    np.testing.assert_allclose(found[0].dose_K, found[1].dose_K, rtol=1e-5)
    assert sorted(map(tuple, found[0].tokens)) == sorted(map(tuple, found[1].tokens))


def test_epochs_hold_the_training_cells_and_no_other(screen):
    config = tiny_config(data={**DATA, "split": str(screen / "split.toml")})
    cells = stored(screen / "store", config)
    n = len(cells.train)
    expected = sorted(tuple(row) for row in cells.rows(np.asarray(cells.train, dtype=np.int64)).tokens_BG)
    draw = cells.draws(1, seed=3, balance=0.0)
    for epoch in range(2):
        drawn = [draw(step) for step in range(epoch * n, (epoch + 1) * n)]
        assert sorted(tuple(one.tokens_BG[0]) for one in drawn) == expected
    rows = cells.rows(np.asarray(cells.train[:20], dtype=np.int64))
    counts, library = cells.counts_of(np.asarray(cells.train[:20], dtype=np.int64))
    np.testing.assert_array_equal(rows.library_B, library)
    np.testing.assert_array_equal((rows.tokens_BG > 0).sum(1), counts.getnnz(1))


def test_held_out_blocks_differ_by_seed_and_are_disjoint_from_training(screen):
    blocks = []
    for seed in range(12):
        cells = stored(screen / "store", tiny_config(data={"split_seed": seed, "validation_fraction": 0.2}))
        blocks.append(set(np.asarray(cells.validation).tolist()))
        train_cells = np.asarray(cells.train).tolist()
        assert len(blocks[-1]) == 60 and sorted({*train_cells, *blocks[-1]}) == list(range(300))
        assert train_cells == sorted(train_cells) and not {*train_cells} & blocks[-1]
    assert [len(blocks[0] & other) for other in blocks[:5]] == [60, 0, 0, 0, 0] and blocks[5] == blocks[0]


def test_control_cells_are_capped_and_still_serve_as_context(screen):
    config = tiny_config(data={**DATA, "control_share": 0.1, "min_cells_per_gene": 0})
    cells = stored(screen / "store", config)
    theirs = in_memory(screen / "cells.h5ad", config)
    assert len(cells.train) == len(theirs.train) < len(cells.seen) == 300 and cells.notes == theirs.notes
    assert_same_conditioner(build_conditioner(cells, config), build_conditioner(theirs, config))
    again = stored(screen / "store", config)
    np.testing.assert_array_equal(cells.train, again.train)


def test_balanced_conditions_are_drawn_as_in_memory(screen):
    config = tiny_config(data=DATA)
    cells = stored(screen / "store", config)
    rows, n_cells = cells.condition_frequencies()
    draw = cells.draws(50, seed=0, balance=0.7)
    drawn = np.concatenate([draw(step).condition_BC for step in range(200)])
    found = np.array([(drawn == row).all(1).mean() for row in rows])
    np.testing.assert_allclose(found, n_cells**0.3 / (n_cells**0.3).sum(), atol=2e-3)


def test_genes_that_a_data_set_lacks_are_masked_and_labels_may_be_unknown(two):
    config = tiny_config(data={"condition_keys": ["cell_type", "data_set", "species"], "validation_fraction": 0.0})
    cells = stored(two, config)
    assert "cell_type is unknown in 40 of 240 cells, which are trained on without it" in cells.notes
    rows = cells.rows(np.arange(240))
    of_small = cells.store.data_set[:] == 1
    lacking = ~cells.measured[1]
    assert of_small.sum() == 40 and lacking.sum() >= 20
    assert (rows.tokens_BG[of_small][:, lacking] == MASK_TOKEN).all()
    assert (rows.tokens_BG[~of_small] != MASK_TOKEN).all() and (rows.tokens_BG[:, ~lacking] != MASK_TOKEN).all()
    assert (rows.condition_BC[of_small, 0] == 0).all() and (rows.condition_BC[~of_small, 0] > 0).all()
    assert cells.conditions.fields["data_set"] == ("large", "small")
    np.testing.assert_array_equal(cells.token_counts()[lacking].sum(1), 200)
    np.testing.assert_array_equal(cells.token_counts()[~lacking].sum(1), 240)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(two, tmp_path):
    config = tiny_config(
        data={"condition_keys": ["cell_type", "data_set"]}, training={"balance": 0.5, "minibatch_size": 50}
    )
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train([two], whole, config)

    def interrupt(progress) -> None:
        if progress.step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    assert train([two], pieces, config, on_progress=interrupt).step == 12
    assert train([two], pieces, config, resume=True).step == 20
    assert_same_run(whole, pieces)
    assert load_checkpoint(whole).manifest["data_fingerprints"][0] == open_store(two).fingerprint


def test_a_model_of_a_store_learns_and_generates(two, tmp_path):
    assert run_config([two], tmp_path / "run").data.condition_keys == ()  # 40 cells have no type
    model = lingshu_cell.LingshuCell.train(
        str(two),
        out=tmp_path / "run",
        condition_keys=["data_set"],
        settings=tiny_config(training={"steps": 60, "peak_learning_rate": 1e-2, "validate_every": 1}).model_dump(
            include={"network": True, "training": {"steps", "minibatch_size", "peak_learning_rate", "validate_every"}}
        ),
    )
    nelbo = [float(row["validation_nelbo"]) for row in history(tmp_path / "run")]
    assert len(nelbo) == 60 and min(nelbo) < 0.998 * nelbo[0]  # four cells of 40: it starts near what can be learned
    cells = model.generate(5, condition={"data_set": "small"}, steps=4)
    assert cells.shape == (5, 100) and cells.X.sum() > 0
    with pytest.raises(LingshuError, match="was made of these files"):
        schedule_run(tmp_path / "run", [two.parent / "large.h5ad"])
    assert schedule_run(tmp_path / "run").stored.curve.n_genes == len(
        load_checkpoint(tmp_path / "run").tensors("data")["modelled"]
    )


def test_what_cannot_be_trained_on_is_said_in_one_line(two, screen, tmp_path):
    plain = {"condition_keys": [], "validation_fraction": 0.1}
    for store, data, words in (
        (two, {"condition_keys": ["nothing"]}, "Keys must be labels of the store: there is no 'nothing'"),
        (two, {"perturbation_key": "cell_type", "control": "B cells"}, "40 of 240 cells have none in 'cell_type'"),
        (two, {"layer": "counts"}, "A store holds the counts of one layer"),
        (two, {"min_cells_per_gene": 500}, "Two genes or more must be detected often enough"),
        (two, {"validation_fraction": 0.001}, "Training and validation both need cells"),
        (screen / "store", {"condition_keys": ["dose"]}, "Conditions must be labels: 'dose' holds numbers"),
        (screen / "store", {**DATA, "dose_key": "mass"}, "there is no 'mass'"),
        (screen / "store", {**DATA, "dose_key": "line"}, "A dose must be a number above 0"),
        (screen / "store", {**DATA, "control": "Nothing"}, "no cell is labelled 'Nothing'"),
    ):
        with pytest.raises(LingshuError, match=words):
            train([store], tmp_path / "run", tiny_config(data={**plain, **data}))
    with pytest.raises(LingshuError, match="A store is trained on alone: 2 sources"):
        train([two, screen / "store"], tmp_path / "run", tiny_config(data=plain))
    (tmp_path / "begun" / ".work").mkdir(parents=True)
    with pytest.raises(LingshuError, match="A store must be finished"):
        train([tmp_path / "begun"], tmp_path / "run", tiny_config(data=plain))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda store: (store / "shards" / "shard-000001.h5ad").unlink(), "shard-000001.h5ad is missing"),
        (lambda store: flip(store / "shards" / "shard-000001.h5ad"), "does not match its checksum"),
        (lambda store: flip(store / "arrays" / "token_counts.npy"), "does not match its checksum"),
        (lambda store: (store / "manifest.json").unlink(), "A store must hold manifest.json"),
    ],
)
def test_a_damaged_store_is_refused(two, tmp_path, harm, words):
    store = shutil.copytree(two, tmp_path / "store")
    harm(store)
    with pytest.raises(LingshuError, match=words):
        train([store], tmp_path / "run", tiny_config(data={"condition_keys": []}))


def test_a_store_that_prepare_did_not_write_is_refused(two, tmp_path):
    """Its checksums fit, its content does not."""
    for field, value in (("sources", None), ("rare_up_to_cells", "many")):
        store = shutil.copytree(two, tmp_path / field)
        manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
        manifest[field] = value
        manifest["checksum"] = checksum(manifest)
        (store / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(LingshuError, match="it holds what lingshu prepare does not write"):
            stored(store, tiny_config(data={"condition_keys": []}))


def flip(file: Path) -> None:
    """Turn a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_store_that_changed_is_not_gone_on_with(two, tmp_path):
    config = tiny_config(data={"condition_keys": []}, training={"steps": 10})
    train([two], tmp_path / "run", config)
    prepare([two.parent / "large.h5ad", two.parent / "small.h5ad"], tmp_path / "store", seed=1)
    with pytest.raises(LingshuError, match="changed: 'the data'"):
        train([tmp_path / "store"], tmp_path / "run", config, resume=True)


def test_memory_does_not_grow_with_the_cells(tmp_path):
    peaks = []
    for copies in (1, 6):
        cells = real_cells(1000, 60)
        cells.obs["drug"] = np.where(np.arange(1000) % 2, "A", "none")
        many = ad.concat([cells] * copies, index_unique="-")
        many.write_h5ad(tmp_path / f"{copies}.h5ad")
        prepare([tmp_path / f"{copies}.h5ad"], tmp_path / f"store{copies}", cells_per_shard=500)
        config = tiny_config(
            data={"condition_keys": ["cell_type"], "perturbation_key": "drug", "control": "none", "depth": True}
        )
        tracemalloc.start()
        opened = stored(tmp_path / f"store{copies}", config)
        build_conditioner(opened, config)
        draw = opened.draws(32, seed=0, balance=0.0)
        for step in range(30 * copies):
            draw(step)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert copies * 900 > WINDOW_CELLS > 900
    # The larger store fills a whole window; in memory there would be six times as many cells.
    assert peaks[1] < 3 * peaks[0]
