# The two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(BIN)/modernbert demo

test: $(VENV)/installed
	$(BIN)/pytest -n auto --dist worksteal

# The editable install is an import hook, which mypy does not follow: it checks the built wheel, from
# a folder outside the checkout, with the packages of the environment beside it.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(BIN)/python -m build --outdir "$$out" . >"$$out/log" 2>&1 || { cat "$$out/log"; exit 1; }; \
	$(BIN)/pip install --quiet --no-deps --target "$$out/site" "$$out"/*.whl; \
	root=$$PWD; cd "$$out"; MYPYPATH=site "$$root/$(BIN)/mypy" -p modernbert \
		--config-file "$$root/pyproject.toml" --cache-dir "$$root/.mypy_cache"

bench: $(VENV)/installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/bench.py --preset cpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[test]"
	touch $@
