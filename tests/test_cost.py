"""The formulas of the benchmarks' operations against PyTorch's counter."""

from pathlib import Path

import pytest


@pytest.mark.parametrize("preset, training", [("small", True), ("small", False), ("paper-s32", False)])
def test_operations_by_formula_are_those_counted(preset, training, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from paper_step import Case, measure

    # The counter does not know attention on a CPU, so few genes for the paper's network.
    n_genes = 2_000 if preset == "small" else 320
    measured = measure(Case(preset, "fp32", "cpu", training, n_cells=8, repeats=1, n_genes=n_genes))
    assert measured["gflop"] == pytest.approx(measured["gflop_counted_by_torch"], rel=0.02)
