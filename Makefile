# make demo   everything on small images, ten minutes
# make test   the tests
# Both make the environment first where it is missing: tools/setup_env.sh,
# docs/install.md

# Which set of versions: the living forks where Python 3.12 is at hand, else
# OpenMMLab's (main); or as you say: make test SET=main
SET ?= $(shell tools/setup_env.sh which)
VENV ?= $(if $(filter main,$(SET)),.venv,.venv-$(SET))
VENV_MODERN ?= .venv-modern
# what depends on torch; the rest of the tests is the same on both sets
MODERN_TESTS = tests/test_factorization tests/test_layers tests/test_running \
	tests/test_planning tests/test_compression tests/test_models \
	tests/test_hooks
SOURCES = mmbasis tools tests configs setup.py
# two processes with one thread each are faster than one with two
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# on a busy machine, threads that spin while they wait make the demo four times
# as long (821 s against 192 s): hence OMP_WAIT_POLICY below

.PHONY: help env env-modern demo test test-modern test-gpu lint format clean

help:
	@echo 'make demo | test | test-modern | test-gpu | lint | format | env |' \
		'clean'
	@echo 'with SET=main (OpenMMLab) or SET=forks (onedl); here: $(SET)'

env:
	@VENV=$(VENV) tools/setup_env.sh $(SET)

env-modern:
	@VENV=$(VENV_MODERN) tools/setup_env.sh modern

demo: env
	OMP_WAIT_POLICY=passive $(VENV)/bin/python tools/demo/run_demo.py $(ARGS)

test: env
	$(THREADS) $(VENV)/bin/python -m pytest tests $(ARGS)

test-modern: env-modern
	$(THREADS) $(VENV_MODERN)/bin/python -m pytest \
		$(wildcard $(MODERN_TESTS)) $(ARGS)

# where there is a GPU: docs/gpu.md
test-gpu: env
	PYTHON=$(VENV)/bin/python tools/gpu_suite.sh '' $(LOG)

lint: env
	VENV=$(VENV) tools/lint.sh $(SOURCES)

format: env
	$(VENV)/bin/ruff check --fix --show-fixes $(SOURCES)

clean:
	rm -rf build dist work_dirs/demo .*_cache mmbasis.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
