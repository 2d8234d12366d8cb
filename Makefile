# Everything a stranger needs. Each target makes its own environment in .venv, once.

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types notebook clean

VENV := .venv
BIN := $(VENV)/bin
DEPENDS := setup.cfg constraints.txt .ci/environment
RUN ?= runs/demo

help:
	@echo "make demo      train configs/demo.py on this machine's CPU and sample from it (about 10 minutes)"
	@echo "make test      the test suite"
	@echo "make test-slow the long tests, which make test leaves out"
	@echo "make lint      formatting and lint"
	@echo "make types     static types"
	@echo "make notebook  open notebooks/quickstart on the demo's run"
	@echo "make clean     remove the environment and build products (never runs/)"

demo: $(VENV)/base.stamp
	@$(BIN)/python -m experiments.train demo --workdir $(RUN)
	@echo && echo "A sample:"
	@$(BIN)/python -m experiments.generate $(RUN) --prompt "def " --max-new-tokens 200 --temperature 0.7
	@echo && echo "To type the commands above in this shell, first: source $(BIN)/activate"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --max-worker-restart 0

test-slow: $(VENV)/test.stamp $(VENV)/aot.stamp $(VENV)/aot_gpu.stamp
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --max-worker-restart 0

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/pyright --pythonpath $(BIN)/python

notebook: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt jupyterlab
	SCANROUTE_RUN=$(abspath $(RUN)) $(BIN)/jupyter lab notebooks/quickstart.ipynb

$(VENV)/base.stamp: $(DEPENDS)
	@.ci/environment $(VENV) .
	@touch $@

$(VENV)/test.stamp: $(DEPENDS)
	@.ci/environment $(VENV) ".[test]"
	@touch $(VENV)/base.stamp $@

# libtpu compiles for TPUs that are not there. Beside the environment: installed in it, JAX would look for a TPU at every start.
$(VENV)/aot.stamp: $(VENV)/test.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		--target $(VENV)/aot libtpu || echo "No libtpu for this machine: tests that compile for TPUs are skipped."
	@touch $@

# The same for an H200: JAX's CUDA plugin and ptxas, in a folder of their own for the same reason.
$(VENV)/aot_gpu.stamp: $(VENV)/test.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		--target $(VENV)/aot_gpu jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm \
		|| echo "No CUDA plugin for this machine: tests that compile for GPUs are skipped."
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
