# make demo: SFT -> reference table -> value model, one policy for every N, vBoN, KL-RL -> comparison, on film reviews.
# make family: every method and decoder, trained at one budget and compared on one sheet; SEEDS="0 1 2" for several seeds.
# make test: the whole test suite.   make lint: ruff, mypy, and the documentation.   make docs: the documentation, in site/.
# make notebooks: run notebooks/ again, in place.
# All make the environment first, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
SEEDS ?= 0
STAMP := $(VENV)/.installed

.PHONY: demo family test lint docs notebooks clean

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" bash configs/demo/run.sh

family: $(STAMP)
	$(BIN)/python -m experiments.family.run --seeds "$(SEEDS)"

# A file stays in one process: its fixtures are made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet, which hides warnings from --strict as well.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --group dev -e ".[demo,gguf,lora,verify]" -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site
