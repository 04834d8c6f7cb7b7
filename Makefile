# make demo: text from the model in the box, and a page that shows which experts wrote it.
# make test: lint, types and tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# For what is installed and for what builds it; pip knows the second by another name since 25.3.
PINNED := PIP_CONSTRAINT='$(abspath constraints.txt)' PIP_BUILD_CONSTRAINT='$(abspath constraints.txt)'

.PHONY: demo test test-slow clean

# The extension is compiled in build/, which is kept: a change compiles what it touches.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python (%d.%d) must be >= 3.11. Set PYTHON=python3.11 or newer." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PINNED) $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot,test]'
	touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/mixtura generate "def read_json(path):" --max-new-tokens 96 --temperature 0.7 --top-p 0.9 --seed 2
	@$(BIN)/mixtura inspect --html mixtura-inspect.html --png mixtura-inspect.png

test: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check

test-slow: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check --slow

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	rm -f mixtura-inspect.html mixtura-inspect.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
