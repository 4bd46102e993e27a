# make demo: set-up, then train, register and use a classifier. make test: set-up, then the whole suite.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test slow portable lint bench docs clean
setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Fovea needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …'; exit 1; }
	@[ ! -L .venv ] || { echo '.venv is a link, and what it leads to may lack something of requirements.txt. If it has all, touch .venv/.installed; if not, run make setup where it lies, or remove the link.'; exit 1; }
	@$(PYTHON) -m venv .venv || { echo 'Python lacks venv here. On Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@awk '/^uv==/ {on=1} on; on && !/\\$$/ {exit}' requirements.txt > .venv/uv.txt
	$(BIN)/pip install -q --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync -q --require-hashes --compile-bytecode requirements.txt --python $(BIN)/python
	@touch $@

demo: setup
	$(BIN)/python -m pipelines.demo

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

# The suite as other processors would compute it, with one thread and with two: over an hour on two cores. TESTS="FILE -k NAME" runs a part.
portable: setup
	@for threads in 1 2; do for isa in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE; do \
		echo "$$isa, $$threads threads"; env $$isa THREADS=$$threads $(BIN)/python -m pytest -q $(TESTS) || exit 1; \
	done; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fovea.py modules datamodules pipelines examples

bench: setup
	$(BIN)/python -m benchmarks.ratios

# The pages and the API reference, in site/; open site/index.html. Any warning fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

clean:
	rm -rf .venv
