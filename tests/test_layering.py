"""One-way imports: a module imports only from rows below its own, and no module may be missing from the map."""

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lingshu_cell"
PACKAGE = SOURCE.name

ROWS = (  # from the bottom up: each module stands one row above the highest that it imports
    "checksums claims commands data data.condition_rows data.effect_regression data.positions datasets diffusion "
    "diffusion.randomness ema engine errors figures interruption judgement metrics metrics.cell_types "
    "metrics.clock metrics.correlation metrics.depth metrics.doublets metrics.embedding metrics.genes "
    "metrics.memorisation metrics.outliers metrics.responses metrics.two_sample network network.conditions "
    "network.layers network.rates tokens",
    "arguments data.cell_states data.condition_labels data.condition_sums data.containers data.counts "
    "data.hdf5_output data.labels data.quality data.splits data.tokenizer data.vocabulary diffusion.noising "
    "diffusion.schedule engine.stopping input_files launch metrics.catalogue metrics.cell_eval metrics.cell_eval2 "
    "network.distribution network.perturbation output_files response_judgement",
    "checkpoint config data.cell_folder data.condition_splits data.count_blocks data.effects data.gene_embeddings "
    "data.gene_sets data.gene_tables data.perturbations data.store_files diffusion.information diffusion.loss "
    "diffusion.sampler diffusion.tilt engine.processes evaluation_folder guidance_store history "
    "network.compression network.detection network.stated_means pages wanted_cells",
    "commands.options curve_store data.anndata_io data.de_tables data.embedding_sources data.gene_doctor "
    "data.prior_effects data.shards data.split_files data.store_writer diffusion.guidance diffusion.plan "
    "diffusion.priors engine.minibatch engine.optimiser engine.sharding metrics.folder network.average_cell "
    "network.transformer_denoiser",
    "check_vcc2026 data.sources data.store data.training_set engine.gradients metrics.differential metrics.inputs "
    "network.gate_head perturbation_effects response_samples",
    "baselines data.cells_with_states data.loader data.measured_genes data.scan engine.feeder evaluate "
    "export_vcc2026 network.set_denoiser response_figures response_libraries run_config silenced",
    "conditioning data.store_builder data.stored_cells evaluate_responses network.denoiser response_section",
    "conditioning_of_cells engine.run_state expected_effects prepare response_report shown_effects",
    "report request validation_conditions",
    "generate train",
    "aligned_cells calibrate calibration console demo generate_shards",
    "commands.baseline commands.calibrate commands.config commands.de commands.demo commands.embeddings "
    "commands.export commands.genes commands.prepare commands.report commands.split planner schedule",
    "commands.generate commands.schedule commands.train model",
    "",  # the package itself, lingshu_cell/__init__.py
    "commands.evaluate commands.info",
    "cli",
    "__main__",
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()} | {"": ROWS.index("")}
PURE = ("diffusion", "network")
JUDGES = (
    "evaluate",
    "evaluate_responses",
    "response_libraries",
    "response_samples",
    "evaluation_folder",
    "baselines",
    "figures",
    "judgement",
    "metrics",
    "pages",
    "perturbation_effects",
    "report",
    "response_figures",
    "response_judgement",
    "response_report",
    "response_section",
)


def modules() -> dict[str, Path]:
    """Every module under its name without the package, ``""`` being the package."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


@cache
def imports(name: str) -> tuple[set[str], set[str]]:
    """Modules of ours, and top-level names of others, that a module imports anywhere in its text."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide where they lead"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [t if t.removeprefix(f"{PACKAGE}.") in MODULES else str(node.module) for t in targets]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            (ours if first == PACKAGE else others).add(rest if first == PACKAGE else first)
    return ours - {name}, others


@cache
def reached(name: str) -> set[str]:
    """All modules of ours that a module imports, directly or through others."""
    todo, seen = [name], set()
    while todo:
        new = imports(todo.pop())[0] - seen
        seen |= new
        todo += new
    return seen


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_the_map_holds_every_module_and_no_other():
    assert set(ROW_OF) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_come_from_rows_below(name):
    sideways_or_up = sorted(other for other in imports(name)[0] if ROW_OF[other] >= ROW_OF[name])
    assert not sideways_or_up, f"{name or PACKAGE} (row {ROW_OF[name]}) imports {sideways_or_up}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if within(name, PURE)))
def test_mathematics_is_pure(name):
    harmless = {"abc", "collections", "dataclasses", "functools", "itertools", "math", "typing"}
    assert imports(name)[1] <= {"torch", "numpy"} | harmless  # no files, AnnData, logging, global random state
    assert all(within(other, (*PURE, "errors", "tokens", "config")) for other in imports(name)[0])


@pytest.mark.parametrize("name", sorted(name for name in MODULES if within(name, JUDGES)))
def test_judging_needs_no_network(name):
    for module in {name, *reached(name)}:
        assert not within(module, PURE), f"{name} reaches {module}"
        assert "torch" not in imports(module)[1], f"{name} reaches torch through {module}"


def test_training_never_reaches_the_sampler():
    assert "diffusion.sampler" not in reached("train")


def test_a_violation_would_be_seen():
    assert "generate" in imports("model")[0] and "diffusion.sampler" in reached("model")
    assert "torch" in imports("train")[1]
