# Two commands set everything up: `make demo` shows the main job on the bundled model, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench docs format clean

demo: $(VENV)/.installed
	$(BIN)/qwen-scope demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

bench: $(VENV)/.installed
	mkdir -p build
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/encode.py --threads 1
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/layers.py --folder build
	$(BIN)/python benchmarks/load.py --folder build
	$(BIN)/python benchmarks/harvest.py --folder build
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/classify.py --folder build
	$(BIN)/python benchmarks/footprints.py --folder build
	$(BIN)/python benchmarks/pipeline.py --folder build
	$(BIN)/python benchmarks/steer.py
	$(BIN)/python benchmarks/sasft.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/app.py
	$(BIN)/python benchmarks/table.py

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis

# torch alone first, pinned: so pip takes whatever build of this version it is set up to find, such as a CPU one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer as $(PYTHON), found " + sys.version.split()[0] + "; run make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,index,server,data,evidence,app,finetune]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,index,server,data,evidence,app,finetune,ray,dev]'
	touch $@
