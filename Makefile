# make demo | make test do all the set-up; make help lists the rest.
.DEFAULT_GOAL := help
.PHONY: help demo test bench faults gpu lint clean install browser

PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.13.0
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
# Constraints hold what was tested together, on Python 3.11.
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

export OMP_NUM_THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
export THP_MEM_ALLOC_ENABLE ?= 1

help:
	@echo "make demo   train, generate, evaluate and report on bundled blood cells, in demo-run/"
	@echo "make test   the quick tests"
	@echo "make bench  slow tests, and most of benchmarks/results anew, one seed each: a working day on two idle cores"
	@echo "make faults kills, full disks, damaged files, two at once, against every command that writes"
	@echo "make gpu    tests and measurements that need a CUDA device (GPU_PYTHON=python3 to use a Python that has all packages)"
	@echo "make lint   style"
	@echo "make clean  remove the virtual environment and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	@test -n "$(CONSTRAINTS)" || echo "note: not Python 3.11, so versions are not pinned by constraints.txt"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[evaluate,responses,test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lingshu demo --out demo-run --overwrite

# The tests of the report look at it in a browser; without one they skip and say so.
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || [ -n "$$LINGSHU_CHROMIUM" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 \
	  || echo "note: Chromium could not be installed; the browser tests will be skipped"; \
	else echo "note: no Chromium and no way to install it; the browser tests will be skipped"; fi

test: $(STAMP) browser
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

# benchmarks/README.md says what each line measures and how long it takes.
BENCH := $(BIN)/python benchmarks
PBMC := build/fidelity/fidelity-pbmc3k
PBMC8 := build/fidelity/fidelity-pbmc8k
bench: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --timeout 0
	PYTHON=$(PYTHON) benchmarks/peers/make_venv.sh
	$(BENCH)/fidelity.py --data pbmc3k --models small,scvi,paper-s32,halves,shuffled --cpu-seconds 400
	@for data in pbmc8k:1300 marrow_cd34:900 dentate_gyrus_mouse:900; do \
	  name=$${data%:*}; \
	  if test -f ../shared/data/$$name.h5ad; then $(BENCH)/fidelity.py --data $$name --cpu-seconds $${data#*:} || exit 1; \
	  else echo "$$name is not here: left out"; fi; \
	done
	$(BENCH)/paper_step.py
	$(BENCH)/steps_front.py $(PBMC)/small/run $(PBMC)/heldout.h5ad $(PBMC)/train.h5ad --steps 8,16,64 --schedules optimal --name steps_front-pbmc3k
	@if test -d $(PBMC8)/small; then \
	  $(BENCH)/steps_front.py $(PBMC8)/small/run $(PBMC8)/heldout.h5ad $(PBMC8)/train.h5ad --steps 4,8,16,64 --schedules optimal; fi
	$(BENCH)/demo_time.py
	$(BENCH)/compare_parts.py heads
	$(BENCH)/compare_parts.py encoders
	$(BENCH)/compare_parts.py economy
	$(BENCH)/loader.py
	OMP_NUM_THREADS=1 $(BENCH)/store_training.py
	OMP_NUM_THREADS=1 $(BENCH)/many_data_sets.py
	OMP_NUM_THREADS=1 $(BENCH)/processes.py
	OMP_NUM_THREADS=1 $(BENCH)/generate_scale.py
	OMP_NUM_THREADS=1 $(BENCH)/scaling.py
	OMP_NUM_THREADS=1 $(BENCH)/planner.py
	$(BENCH)/malformed.py --mutations 20
	$(BENCH)/export_vcc2026.py --cells 20000 360000 --pool 12 1
	@if test -f ../shared/data/kang_ifnb.h5ad; then for screen in kang gbm; do \
	  $(BENCH)/responses.py $$screen --variants perturbation_mean control_bootstrap additive ridge nearest_neighbour ours || exit 1; done; \
	  $(BENCH)/responses.py gbm --variants ours-calibrated --set calibrate=true; \
	  for screen in papalexi vcc-h1; do $(BENCH)/responses.py $$screen --variants context_mean control_bootstrap ridge nearest_neighbour ours || exit 1; done; \
	else echo "kang_ifnb is not here: left out"; fi
	OMP_NUM_THREADS=1 $(BENCH)/simulated_screen.py
	$(BENCH)/responses.py sergio-pairs --seeds 0 1 2 --variants perturbation_mean control_bootstrap context_mean additive ridge nearest_neighbour ours
	$(BENCH)/responses.py sergio-targets --variants context_mean control_bootstrap ridge nearest_neighbour ours
	OMP_NUM_THREADS=1 $(BENCH)/faults

# One thread: the same sums in the same order before and after a kill, in forks of one process.
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
	@$(GPU_PYTHON) -c 'from importlib.metadata import version; version("lingshu-cell")' 2>/dev/null \
	  || $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -q -m gpu tests/test_gpu.py
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  PYTHONPATH=src $(GPU_PYTHON) benchmarks/paper_step.py --device cuda --precisions bf16 && \
	  PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu_speed.py; \
	else echo "no CUDA device: the tests were skipped and nothing was measured"; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
