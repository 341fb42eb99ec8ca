# Every target runs from a fresh clone: each sets up what it needs first.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin
PARALLEL := --numprocesses=logical --dist=loadfile
SHOWCASES := $(addprefix showcase-,sentiment boolq descriptions docstrings code dpo grpo grpo-number jargon small-vs-large)
.PHONY: help setup demo test test-unit test-k8s test-images bench showcase $(SHOWCASES) lint stubs lock

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@for one in $(SHOWCASES); do printf 'make %-24s Runs this showcase alone; results in docs/showcase.md\n' "$$one"; done

setup: ## Makes .venv with locked dependencies and generated stubs
	@deploy/setup/setup

demo: setup ## Trains two adapters on real data, serves them and compares them with their base (under ten minutes)
	@$(BIN)/graft demo

# A run each, of which only the first uses every core: a process that has been a Ray driver is no place for the gRPC
# servers of unit tests, and a Ray cluster or the whole stack shares two cores with nothing else. The first has a process
# more than there are cores, since some of its modules mostly wait, and begins with tests/integration: they take longest.
# What fails in one keeps none of the others from being run.
test: setup ## Runs every test
	@failed=0; \
	run() { echo "$(BIN)/pytest $$*"; $(BIN)/pytest "$$@" || failed=1; }; \
	run tests/integration tests/unit -m "not ray" --numprocesses=$$(($$(nproc) + 1)) --dist=loadfile --no-loadscope-reorder; \
	run tests/integration -m ray; \
	run tests/e2e; \
	exit $$failed

test-unit: setup ## Runs the tests that need no server
	$(BIN)/pytest tests/unit $(PARALLEL)

test-k8s: setup ## Tests the Helm chart on a real Kubernetes control plane (root; the first time builds it, six minutes)
	@helm/test-k8s

test-images: setup ## Builds both images and runs the chart's release in them (root, buildah, mmdebstrap; half an hour)
	GRAFT_TEST_IMAGES=$${GRAFT_TEST_IMAGES:-fresh} $(BIN)/pytest tests/images

bench: setup ## Measures against TRL, PEFT, vLLM and Ray Serve; BENCH=training runs one, --quick in it a smoke run
	$(BIN)/python -m benchmarks $(BENCH)

showcase: setup ## Runs every showcase on the real base model (hours); showcase-TASK one, QUICK=1 a smoke run
	@$(BIN)/python -m showcase $(if $(QUICK),--quick)

$(SHOWCASES): showcase-%: setup
	@$(BIN)/python -m showcase $* $(if $(QUICK),--quick)

lint: setup ## Runs ruff, mypy, import-linter and buf
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

stubs: setup ## Generates the gRPC stubs from protos/
	$(BIN)/python deploy/setup/stubs.py

lock: setup ## Recompiles the lock from pyproject.toml (needs uv)
	deploy/setup/lock
