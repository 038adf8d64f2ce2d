# Every target sets up what it needs. Options of a command go in ARGS: make run ARGS="--preset fast"
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
OLDEST_TRITON := $(shell sed -n 's/.*"triton>=\([0-9.]*\).*/triton==\1/p' pyproject.toml)
LESSONS := $(sort $(wildcard notebooks/*.ipynb)) $(sort $(wildcard notebooks/studios/*.ipynb))
NOTEBOOKS := $(if $(LESSONS),--nbval-lax --nbval-current-env $(LESSONS))
# One process a core, four at most; the cells of a lesson, and the tests of a file, stay together.
BESIDE := -n logical --maxprocesses 4 --dist loadscope
MODULES := --doctest-modules minirlhf kernels/minirlhf_kernels notebooks/minirlhf_course

.DEFAULT_GOAL := help
.PHONY: help setup run lab notebooks test fast lint world checkpoints figures bench proof budgets clean

help:  ## this list
	@echo "minirlhf: from REINFORCE to InstructGPT"
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo 'Options of a command go in ARGS: make run ARGS="--preset fast --seed 1"'

setup: .venv/.stamp  ## make .venv with the exact tested versions

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minirlhf needs Python 3.11 or newer; make setup PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv: the first time it downloads PyTorch, which takes a few minutes"
	@# torch first and by itself: a build that already stands in .venv (CPU or CUDA) is kept.
	@$(PIP) install -qq $(TORCH)
	@$(PIP) install -qq -c constraints.txt -e ".[dev]"
	@touch $@

run: setup  ## from a folder of text to an aligned model and a report
	@# Threads that stay on their own core: two that share one wait for each other, ten times slower at this size.
	@# And large pieces of memory that the C library keeps, in place of getting them back page by page.
	@OMP_PROC_BIND=$${OMP_PROC_BIND:-true} MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1000000000 \
		$(BIN)/minirlhf run $(ARGS)

lab: setup  ## open the lessons in JupyterLab
	@$(BIN)/jupyter lab $(ARGS) notebooks/00_map_and_setup.ipynb

notebooks: setup  ## run every lesson in place, from top to bottom
	@$(BIN)/python notebooks/execute.py $(ARGS)

test: setup lint  ## everything that CI runs: lint, types, layers, tests, lessons
	@$(BIN)/pytest $(BESIDE) tests $(MODULES) $(NOTEBOOKS) $(ARGS)

fast: setup  ## the quick tests
	@$(BIN)/pytest $(BESIDE) tests $(MODULES) -m "not slow" $(ARGS)

lint: setup  ## style, types and layers only
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

world: setup  ## rebuild data/small_world from its seed
	@rm -rf build/small_world
	@$(BIN)/minirlhf world --out build/small_world --seed 0
	@if diff -rq data/small_world build/small_world; then \
		rm -rf build/small_world; echo "data/small_world: the same, byte for byte"; \
	else \
		rm -rf data/small_world && mv build/small_world data/small_world && echo "data/small_world: replaced"; \
	fi

checkpoints: setup  ## rebuild data/checkpoints, which the lessons start from: the default run of seed 0
	@$(MAKE) run ARGS="--out runs/checkpoints --seed 0"
	@$(BIN)/python -m minirlhf_course.export runs/checkpoints data/checkpoints

figures: setup  ## rerun the long experiments that the lessons show (data/results)
	@for script in benchmarks/ppo_ablation.py benchmarks/figure_*.py benchmarks/readme_picture.py; do echo "$$script"; $(BIN)/python $$script || exit 1; done

bench: setup  ## measure the kernels and their rivals, without a time limit
	@# Threads that stay on their own core, as in `make run`: all providers' times scatter less.
	@OMP_PROC_BIND=$${OMP_PROC_BIND:-true} $(BIN)/python kernels/benchmarks/on_gpu.py all $(ARGS)
	@$(BIN)/python kernels/benchmarks/report.py

proof: setup  ## install what lets `make test` prove more of the kernels: ttsem, and the oldest triton that they run on
	@# Each without what it asks for: that would be other versions of torch and triton.
	@$(PIP) install -qq --no-deps --ignore-requires-python ttsem==0.1.0
	@test -d build/triton-oldest || $(PIP) install -qq --no-deps --target build/triton-oldest $(OLDEST_TRITON)

budgets: proof  ## count what the kernels' machine code costs, and make that its budget
	@$(BIN)/python tests/kernels/compile_ahead.py --write $(ARGS)

clean:  ## remove caches and build outputs; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -path ./runs -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
