# Everything a newcomer types. Needs Python >= 3.11 with pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: several ranks share this machine's cores.
export OMP_NUM_THREADS := 1

.PHONY: demo test lint bench faults fuzz clean

demo: $(VENV)/.installed
	$(BIN)/python demo/run.py
	$(BIN)/python demo/state.py
	$(BIN)/python demo/parallel.py
	$(BIN)/python demo/background.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	mkdir -p build
	$(BIN)/python benchmarks/throughput.py --json build/throughput.json --plot build/throughput.svg
	$(BIN)/python benchmarks/interference.py --json build/interference.json
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/balance.py
	$(BIN)/python benchmarks/bytes_read.py
	$(BIN)/python benchmarks/incremental.py
	$(BIN)/python benchmarks/zero_forms.py
	$(BIN)/python benchmarks/tiers.py

# Rounds of each kind of kill.
ROUNDS ?= 8

faults: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[faults]'
	$(BIN)/python faults/run.py --rounds $(ROUNDS) --json build/faults.json
	$(BIN)/python -m giantstep.testing.killing --rounds $(ROUNDS) --mode all --json build/killing.json

# Seconds per target; corpora, findings and logs go to build/fuzz.
SECS ?= 60

fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	nice -n 10 $(BIN)/python -m tests.fuzz.run_atheris --secs $(SECS)

# torch is pinned: an unpinned one may bring gigabytes of GPU libraries along.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
