# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test unit lint oracle bench bench-verify bench-weights gpu-proof chaos soak verify-hostile reproduce-demo clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

KERNELS := kernels/build.py kernels/hatch_build.py $(wildcard kernels/csrc/*.h kernels/csrc/*/*)
$(VENV)/.core: pyproject.toml .ci/install .ci/overrides.txt $(KERNELS)
	.ci/install $(VENV)
	@touch $@

$(VENV)/.dev: pyproject.toml .ci/install .ci/overrides.txt $(KERNELS)
	.ci/install $(VENV) dev cpu oracle
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core ## Set up .venv and train the miniature R1 into runs/demo (about 5 minutes on 2 cores)
	$(BIN)/treadle demo --fresh

# A process per part: what one leaves behind (process groups, Ray's environment) cannot reach the next. Three at
# a time on two cores, because most of them wait for processes to start.
PYTEST := $(BIN)/python -m pytest -q -m "not oracle and not hostile and not chaos"
PARTS := kills runs cluster learner plain rollout verify broadcast backends
test: $(VENV)/.dev lint ## Everything CI checks: style, types, floors, tests
	$(MAKE) --no-print-directory -k -j3 -Otarget $(PARTS:%=test-%)

test-kills: TESTS := e2e/test_kill_and_resume.py
test-runs: TESTS := $(patsubst %,e2e/test_%.py,bad_input cluster_runs documents full_disk gamedays mirror)
# The chaos suite is only collected here: what no longer imports must not wait for the next `make chaos`.
test-plain: TESTS := actors/test_mail.py actors/test_deaths.py actors/test_calls.py platform workflows kernels dashboards benchmarks chaos test_packaging.py
test-verify: TESTS := actors/verify contracts/test_verifier_contract.py contracts/test_verifiers_contract.py
test-broadcast: TESTS := actors/broadcast contracts/test_broadcast_contract.py contracts/test_transport_contract.py
test-rollout: TESTS := actors/rollout e2e/test_weights.py $(patsubst %,contracts/test_%_contract.py,engine rollouts)
test-learner: TESTS := actors/learner contracts/test_learner_contract.py
test-backends: TESTS := contracts/test_learner_backend_contract.py
test-cluster: TESTS := cluster $(patsubst %,e2e/test_%.py,verifier_faults recovery elastic take_over)
test-%: $(VENV)/.dev
	$(PYTEST) $(TESTS:%=tests/%)

NOTHING_STARTED := not processes and not ray and not deepspeed and not vllm and not mlflow and not s3 and not browser and not oracle and not slow and not hostile and not chaos
unit: $(VENV)/.dev ## The tests that start nothing: under 90 s
	$(MAKE) --no-print-directory -k -j4 -Otarget unit-verify unit-actors unit-kernels unit-rest

unit-verify: TESTS := tests/actors/verify
unit-actors: TESTS := tests/actors tests/contracts --ignore=tests/actors/verify
unit-kernels: TESTS := tests/kernels
unit-rest: TESTS := tests $(patsubst %,--ignore=tests/%,actors contracts kernels oracle)
unit-%: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "$(NOTHING_STARTED)" $(TESTS)

lint: $(VENV)/.dev ## Format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

oracle: $(VENV)/.dev ## Every objective against an independent one, and against TRL
	$(BIN)/python -m pytest -m oracle tests/oracle

bench: $(VENV)/.dev ## Measure, side by side with what is claimed against; writes bench.json
	$(BIN)/python -m tests.benchmarks

verify-hostile: $(VENV)/.dev ## All hostile texts and programs, in every sandbox, as root and as nobody (a quarter of an hour)
	$(BIN)/python -m pytest -q tests/actors/verify/test_hostile_text.py tests/actors/verify/programs

soak: $(VENV)/.dev ## Half an hour of faults at random; writes soak.json
	$(BIN)/python -m tests.chaos.soak

chaos: export TREADLE_CHAOS_OUT = chaos.json
chaos: $(VENV)/.dev ## The failure matrix, a test per row; writes chaos.json
	rm -f chaos.json
	$(BIN)/python -m pytest -q -m chaos tests; status=$$?; $(BIN)/python -m tests.chaos.book; exit $$status

bench-verify: $(VENV)/.dev ## The verifiers alone: against math-verify, with hostile company, and programs
	$(BIN)/python -m tests.benchmarks.bench_verify
	$(BIN)/python -m tests.benchmarks.bench_programs

bench-weights: $(VENV)/.dev ## Weights: size and speed of deltas, chains over slow links, real updates
	$(BIN)/python -m tests.benchmarks.bench_kernels
	$(BIN)/python -m tests.benchmarks.bench_weights

gpu-proof: PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu-proof: ## Every kernel on this machine's GPU, with PYTHON's torch; writes gpu-proof.json (at most 8 minutes)
	PYTHONPATH=kernels $(PYTHON) -m tests.benchmarks.gpu_proof

reproduce-demo: $(VENV)/.core ## The demo with three seeds, and with shuffled rewards (a quarter of an hour)
	$(BIN)/python -m tests.benchmarks.reproduce_demo

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs bench.json gpu-proof.json chaos.json soak.json kernels/treadle/kernels/*.so
