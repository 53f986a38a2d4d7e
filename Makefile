# make demo   see it work, four to five minutes
# make test   everything that guards the project
# make bench  speed beside the plain path, on the CPU (about 15 minutes); make bench-gpu: on a GPU
# make faults 200 kills, 1,000 damaged files, 10,000 damaged images, soak, long fuzzing (about half an hour)
# make check  lint, types and import floors only
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench bench-gpu faults check install clean

demo: $(INSTALLED)
	$(BIN)/nextblock demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench --device cpu

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench --device cuda

faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.full --kills 200 --damage 1000 --processes 2 --report benchmarks/results/faults.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.images --mutations 10000 --report benchmarks/results/faults-images.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --steps 5000 --report benchmarks/results/soak.json
	OMP_NUM_THREADS=1 NEXTBLOCK_FUZZ=long $(BIN)/python -m pytest tests/faults/test_fuzz.py --timeout 7200

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nextblock needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
