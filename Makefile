# `make` sets up and runs the main job; every target skips what is already done and works without a network afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: all bench test soak fuzz lab explorer sweep lint clean
all: bench

$(READY): pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	# compat: a plain path, or a folder named cortexlab beside a script would hide the package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev]'
	$(BIN)/cortexlab fetch-model
	@touch $@

bench: $(READY)
	$(BIN)/cortexlab bench --workload lognormal --requests 10 --batch-size 10 --num-blocks 50% --seed 1 --repeats 3

test: $(READY)
	$(BIN)/python -m pytest

# the engine's whole matrix and 2,000 requests with every kind of preemption; a million steps an allocator; findings elsewhere; winners among equals
soak: $(READY)
	$(BIN)/python tests/soak_engine.py
	$(BIN)/python tests/soak_interrupts.py
	$(BIN)/python tests/soak_allocators.py --steps 1000000
	$(BIN)/python tests/soak_findings.py
	$(BIN)/python tests/soak_recommendation.py

# generated inputs, most of them valid but for one change: make fuzz ARGS='--inputs 100000 --seed 7 --seconds 3600'
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(ARGS)

lab: $(READY)
	$(BIN)/cortexlab lab $(ARGS)

# the explorer as a page of its own
explorer: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[explorer]'
	$(BIN)/voila notebooks/explorer.ipynb $(ARGS)

sweep: $(READY)
	$(BIN)/cortexlab sweep experiments/quickstart.yaml

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
