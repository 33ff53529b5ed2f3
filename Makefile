# make demo: SFT -> reference table -> value model, one policy for every N, vBoN, KL-RL -> comparison, on film reviews.
# make test: the whole test suite.   make lint: ruff and mypy.   make notebooks: run notebooks/ again, in place.
# All make the environment first, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint notebooks clean

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" bash configs/demo/run.sh

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --group dev -e ".[demo,gguf,lora,verify]" -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
