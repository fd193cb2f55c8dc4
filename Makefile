# Every target makes what it needs: a virtual environment in .venv, with the project and its developer tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Other versions of packages, such as TORCH="torch==2.11.* torchvision==0.26.* triton==3.6.*".
TORCH ?=

SCENES := from pathlib import Path; from fastprompt.demo.scenes import write_dataset; \
	write_dataset(Path('SCENES'), train=2, test=1, domain_test=1, ood=1)

.PHONY: help demo test-fast test oldest torture matrix bench lint format docs wheel clean

help:
	@echo "make demo    train zero-shot, CoOp and GalLoP on the built-in scenes; writes runs/demo/report.html"
	@echo "make test-fast run the quick ones: without Triton kernels, compilers and whole experiments"
	@echo "make test    run the test suite"
	@echo "make oldest  compile the kernels with the oldest Triton that is allowed"
	@echo "make torture run the tests that take minutes: many malformed inputs, many kills"
	@echo "make matrix  install every supported pair of torch and Triton (6 GB each, an hour), and try it"
	@echo "make bench   measure ours beside its peers; appends to benchmarks/results/"
	@echo "make docs    build the documentation site in build/docs"
	@echo "make wheel   build the wheel, install it by itself, and train with it"
	@echo "make lint    check style; 'make format' repairs what can be repaired"

$(VENV)/installed: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --editable . $(TORCH) --group dev
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastprompt demo --out runs/demo

# A process a core, of one thread each: the interpreter of Triton, which takes most of the time, has no use for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-fast: $(VENV)/installed
	$(PYTEST) -m "not interpreter and not compile and not slow and not torture"

test: $(VENV)/installed
	$(PYTEST)

build/triton-3.6.0: | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

# Beside the torch that is installed: compiling ahead of time needs no other.
oldest: $(VENV)/installed build/triton-3.6.0
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python -m pytest tests/kernels/test_kernel_resources.py -k telling

torture: $(VENV)/installed
	$(PYTEST) -m torture

matrix:
	$(PYTHON) -m benchmarks.toolchains

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks topk_similarity
	$(BIN)/python -m benchmarks patch_statistics
	$(BIN)/python -m benchmarks call_overhead
	$(BIN)/python -m benchmarks break_even
	$(BIN)/python -m benchmarks text_encoder
	$(BIN)/python -m benchmarks train_step
	$(BIN)/python -m benchmarks train_step --profile
	$(BIN)/python -m benchmarks conditional
	$(BIN)/python -m benchmarks plot

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without warnings, or not at all.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	@echo build/docs/index.html

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What a user installs: the wheel with what it needs and no extra, used outside of the checkout.
wheel:
	rm -rf build/lib build/wheel dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	build/wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	cd build/wheel && bin/fastprompt --version && bin/python -c "import fastprompt, fastprompt_kernels"
	cd build/wheel && bin/python -c "$(SCENES)" && bin/fastprompt train coop SCENES --backbone demo --shots 2 --epochs 1

clean:
	rm -rf $(VENV) build dist *.egg-info
