#!/usr/bin/env bash
# Make benchmarks/peers/.venv with scVI and the simulator SERGIO (GPL-3) in it; peers have dependencies of their own
# and stay out of the package's environment.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
test -x .venv/bin/python || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet torch==2.13.0  # first, so that the next line does not choose another build
.venv/bin/python -m pip install --quiet scvi-tools==1.4.2
.venv/bin/python -c 'import scvi, torch; print("scvi-tools", scvi.__version__, "torch", torch.__version__)'
.venv/bin/python -m pip install --quiet sergio-scSim==1.9.3
.venv/bin/python -c 'from SERGIO import sergio; import numpy; print("SERGIO with numpy", numpy.__version__)'
