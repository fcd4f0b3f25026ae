# make demo   slims a vision transformer on handwritten digits, in minutes on a laptop's CPU
# make test   runs the tests
# make docs   builds the documentation's site into build/site
# All make .venv from requirements.txt first, when it is missing or older than that file. The tests also take PyTorch,
# ONNX and Playwright (requirements-export.txt), Gradio (-demo) and what builds the site (-docs).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits

.PHONY: help demo test test-slow lint typecheck docs lock clean

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# PyTorch, ONNX and Playwright are large, and only tests need them.
$(VENV)/export: $(VENV)/ready requirements-export.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	@touch $@

$(VENV)/docs: $(VENV)/ready requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(VENV)/demo: $(VENV)/ready requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@

demo: $(VENV)/ready
	$(BIN)/sit train --config configs/digits.py --workdir $(WORKDIR) --resume

test: $(VENV)/export $(VENV)/docs $(VENV)/demo
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# The TPU compiler stays out of .venv: JAX would look for chips whenever it starts.
LIBTPU := build/libtpu

$(LIBTPU)/ready: $(VENV)/export
	rm -rf $(LIBTPU)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LIBTPU) \
		"$$($(BIN)/python -c 'from sit_jax.analysis.plan import libtpu_requirement; print(libtpu_requirement())')"
	@touch $@

test-slow: $(LIBTPU)/ready $(VENV)/docs $(VENV)/demo
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m pytest -n auto --dist loadfile -m slow

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/shellcheck --external-sources launch/*.sh launch/slurm.sbatch .ci/run

typecheck: $(VENV)/export $(VENV)/demo
	$(BIN)/mypy

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Refreshes the requirements files: the newest versions that pyproject.toml admits, and all that they need. Each of the
# smaller files is made over the large one.
FREEZE := build/lock/bin/python -m pip freeze --all --exclude sit-jax --exclude pip
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade ".[dev]" "pillow<13"  # Gradio takes no 13 yet.
	$(FREEZE) > build/base.txt
	for file in export:onnx,browser docs:docs demo:demo; do \
		rm -rf build/lock && $(PYTHON) -m venv build/lock && \
		build/lock/bin/python -m pip install --quiet --constraint build/base.txt ".[dev,$${file#*:}]" && \
		$(FREEZE) | grep -vxFf build/base.txt > build/$${file%:*}.txt || exit 1; \
	done
	for name in base export docs demo; do \
		file=requirements$$(test $$name = base || echo -$$name).txt; \
		{ sed -n '/^#/p' $$file; cat build/$$name.txt; } > build/new.txt && mv build/new.txt $$file; \
	done

clean:
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .pytest_cache
