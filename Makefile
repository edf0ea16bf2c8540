# make demo    train a small model on the text every Python ships, end to end
# make test    the quick tests            make test-all   the slow ones
# make lint    ruff and mypy              make bench-cpu  speed beside others, hours; BENCH=--tiny tries it, minutes
# make torture kill a run at 20 random moments and compare
# make bench-gpu  what a card can tell, in one call of 10 minutes
# make clean   remove the environment and everything built
#
# PYTHON=python3.12 picks the interpreter, VENV=path the environment, JOBS=4 how many tests run at once.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BENCH ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.lmssl-installed
EXTRAS := fast,dev
PIP := "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Bytecode is kept: whole runs in processes of their own would compile the package anew, each of them.
export PYTHONDONTWRITEBYTECODE :=
# Nothing asks the hub: tests, demo and benchmark bring or build all they need.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo lint test test-all bench-cpu bench-gpu torture clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# The stamp is written last, so that an interrupted installation is repeated. The build tools come first and without
# build isolation, because an isolated build would take versions that constraints.txt does not name.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lmssl needs Python 3.11 or newer; '$(PYTHON)' is missing or older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	$(PIP) hatchling editables setuptools
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	@touch "$(STAMP)"

demo: install
	"$(BIN)/python" -m lmssl demo

lint: install
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy --strict lmssl

test: install
	"$(BIN)/python" -m pytest -m "not slow" -n $(JOBS) --dist loadfile --durations=10

# In the order of tests/conftest.py: by itself xdist begins with the files of most tests, and the longest have few.
test-all: install
	"$(BIN)/python" -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10

# Peers are installed into .venvs/peers-train by the first that needs them.
# On a machine with a card, with the Python that holds its torch: nothing is installed into it.
bench-gpu:
	bash benchmarks/gpu.sh $(BENCH)
	"$(PYTHON)" benchmarks/report.py || echo "make the report where scipy is installed: python benchmarks/report.py"

# One that fails does not keep the others from the report.
bench-cpu: install
	-"$(BIN)/python" benchmarks/bench_train.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_train.py --objective masked --length 128 --rows 32 $(BENCH)
	-"$(BIN)/python" benchmarks/bench_limit.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_limit.py --objective masked --length 128 --rows 32 $(BENCH)
	-"$(BIN)/python" benchmarks/bench_attention.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_memory.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_scaling.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_time_to_loss.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_head.py $(BENCH)
	-"$(BIN)/python" benchmarks/bench_quality.py --steps 80 --length 128 --rows 32 --peers 1 $(BENCH)
	"$(BIN)/python" benchmarks/report.py

torture: install
	"$(BIN)/python" tests/torture.py --kills 20
	"$(BIN)/python" tests/torture.py --kills 20 --processes 2

clean:
	rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
