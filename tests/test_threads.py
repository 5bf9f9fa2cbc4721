"""Numba sets OpenMP's number of threads for the whole process, torch's too; what judges cells gives it back."""

import os
import subprocess
import sys

import pytest

CODE = """
import numpy as np, scanpy as sc, torch
from anndata import AnnData
from scipy import sparse
from lingshu_cell.metrics.differential import differential_tables
from lingshu_cell.metrics.folder import holding_output

counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (40, 30)).astype(np.float32))

def judge(out):
    sc.pp.normalize_total(AnnData(counts.copy()))
    return torch.get_num_threads()

found = [torch.get_num_threads(), holding_output(judge)("out"), torch.get_num_threads()]
differential_tables(counts, ["control", "P"] * 20, "control", [f"gene {i}" for i in range(30)], threads=2)
print(*found, torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="numba has its OpenMP layer on Linux")
def test_who_judges_cells_leaves_torch_the_threads_it_had(tmp_path):
    for package in ("scanpy", "pdex"):
        pytest.importorskip(package)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "omp"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "2", "1", "1"]  # 2: what scanpy does to it, and why this is needed
