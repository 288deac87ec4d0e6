# make demo | make test | make test-all | make real GIM_MODELS=dir | make faithfulness GIM_MODELS=dir |
# make circuits GIM_MODELS=dir | make answers GIM_MODELS=dir | make facts GIM_MODELS=dir | make lint | make bench; each
# creates .venv itself when it is missing. make gpu OUT=dir installs nothing: it runs what needs a GPU with the Python that is there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LIGHT := .venv/.demo
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "gim-kernels needs Python 3.11 or newer, found " + sys.version)
PACKAGES := gim gim_kernels tests benchmarks examples

.PHONY: demo test test-all real faithfulness circuits answers facts lint format bench gpu gpu-cache clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,transformer-lens]'
	# Its import name is ours, so it is put where only the test that runs it in another process looks.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/gim-explain --upgrade gim-explain==0.1.4
	touch $(STAMP)

# What the demo needs, and no more.
$(LIGHT): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	touch $(LIGHT)

demo: $(LIGHT)
	$(BIN)/gim demo --html demo.html --json demo.json

# One worker for each core; a test that needs a GPU is for `make gpu`. What compiles kernels or whole models, measures
# memory again and again, or repeats a proof on further models is marked slow, and is for `make test-all`.
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu and not slow and not real' -n auto --dist worksteal

test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu and not real' -n auto --dist worksteal

# One process: the models are large.
real: export GIM_MODELS := $(GIM_MODELS)
real: $(STAMP)
	$(BIN)/python -m pytest -m real

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The figures of the documents on this machine: about an hour. `gim bench quick` takes two minutes.
bench: $(STAMP)
	for suite in attention pointwise explain memory; do \
		$(BIN)/python -m benchmarks $$suite --json benchmarks/results --budget 1200 || exit $$?; \
	done
	$(BIN)/python -m benchmarks.documents

# What the documents say of faithfulness, on the two models in GIM_MODELS: hours. The same command goes on from where it
# was stopped; STATE keeps what is finished.
STATE ?= build/faithfulness
faithfulness: $(STAMP)
	$(BIN)/python -m benchmarks.faithfulness --models '$(GIM_MODELS)' --state $(STATE)
	$(BIN)/python -m benchmarks.documents

# What the documents say of circuits, likewise.
circuits: STATE := build/circuits
circuits: $(STAMP)
	$(BIN)/python -m benchmarks.circuits --models '$(GIM_MODELS)' --state $(STATE)
	$(BIN)/python -m benchmarks.documents

# What the documents say of measures for whole answers, likewise; the state is one file.
answers: STATE := build/answers.jsonl
answers: $(STAMP)
	mkdir -p $(dir $(STATE))
	$(BIN)/python -m benchmarks.answer_measures --models '$(GIM_MODELS)' --state $(STATE)
	$(BIN)/python -m benchmarks.documents

# How often a fact's subject comes first: half an hour.
facts: $(STAMP)
	$(BIN)/python -m benchmarks.facts --models '$(GIM_MODELS)'
	$(BIN)/python -m benchmarks.documents

OUT ?= gpu-results
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(OUT)

# What make gpu would compile, built without a GPU by the triton of $(PYTHON): that of the machine with the GPU.
gpu-cache:
	PYTHONPATH=.:$(PYTHONPATH) $(PYTHON) -m benchmarks.gpu_cache gpu-cache

clean:
	rm -rf .venv gpu-cache build dist *.egg-info demo.html demo.json
