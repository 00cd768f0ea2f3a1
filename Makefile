# Each target sets up what it needs: an environment in .venv, the packages in it, then its work.
# With a GPU that FAISS should use: make demo FLUXCLIP_EXTRAS=gpu,demo,dev

FLUXCLIP_EXTRAS ?= cpu,demo,dev

PYTHON = $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
UV := $(BIN)/uv pip

.PHONY: demo test lint wheel clean extras

demo: $(INSTALLED)
	$(BIN)/fluxclip demo

test: lint
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(INSTALLED)
	$(BIN)/hatchling build --target wheel

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find fluxclip retrieval scripts tests -name __pycache__ -prune -exec rm -rf {} +

# Both FAISS packages go before one of them comes: they overwrite each other's files.
$(INSTALLED): pyproject.toml constraints.txt .venv/.extras | $(BIN)/uv
	$(UV) uninstall --quiet --python $(BIN)/python faiss-cpu faiss-gpu
	$(UV) install --python $(BIN)/python --constraint constraints.txt --editable '.[$(FLUXCLIP_EXTRAS)]'
	@touch $@

# Changes only when FLUXCLIP_EXTRAS does, so that other extras are installed and equal ones are not.
.venv/.extras: extras | $(BIN)/uv
	@echo '$(FLUXCLIP_EXTRAS)' | cmp -s - $@ || echo '$(FLUXCLIP_EXTRAS)' > $@

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "FluxCLIP needs Python 3.11 or newer: none of python3.13, python3.12, python3.11, python3 on the PATH is one" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
