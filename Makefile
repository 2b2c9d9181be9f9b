# demo, test, lint, bench: each sets up .venv when it must; test-keras and test-oldest environments of their own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
KERAS  ?= .venv-keras
OLDEST ?= .venv-oldest
OUT    ?= demo

.PHONY: help demo test test-keras test-oldest test-faults test-slurm test-netns lint bench clean
help:
	@echo "make demo   simulate 32 sequences, rank all metrics on them, and write $(OUT)/results/report/index.html"
	@echo "make test   run the tests"
	@echo "make test-keras   run those of the Keras models, under TensorFlow"
	@echo "make test-oldest   run one test of every stage on the lowest versions that pyproject.toml allows"
	@echo "make test-faults   run those of faults, the long ones too: what dies, fills up or is damaged (root for some)"
	@echo "make test-slurm   run those that need SLURM: two virtual nodes on this machine, started for them (root)"
	@echo "make test-netns   run those that need hosts: network namespaces, made for them (root)"
	@echo "make lint   ruff (format and lint) and mypy"
	@echo "make bench  run the benchmarks"

# Dependencies are installed again only when what they are made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; pass PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/lsim run demo --out $(OUT)

# Two files at a time: tests of clusters wait, others compute.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# TensorFlow has an environment of its own, so that nothing else depends on its choice of versions. Not compiled
# ahead: most of it is never imported.
$(KERAS)/.installed: pyproject.toml constraints.txt
	test -x $(KERAS)/bin/python || $(PYTHON) -m venv $(KERAS)
	$(KERAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		-e ".[keras]" tensorflow-cpu pytest pytest-timeout
	@touch $@

test-keras: $(KERAS)/.installed
	LSIM_TEST_KERAS=1 $(KERAS)/bin/python -m pytest tests/test_export_keras.py

# The lowest version of each dependency that pyproject.toml names, and the newest of what these need. torch is that
# of constraints.txt, installed by pip as elsewhere: PyPI has no CPU builds for Linux, and older ones lie nowhere else.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		-c constraints.txt -e ".[test]"
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m smoke

test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not netns and not slurm' tests/faults tests/test_verify.py tests/test_integrity.py

test-slurm: $(VENV)/.installed
	tests/debian.sh slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
	$(BIN)/python -m pytest -m slurm tests/slurm

test-netns: $(VENV)/.installed
	tests/debian.sh iproute2
	$(BIN)/python -m pytest -m netns tests/netns

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/preprocess.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/rollouts.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/object_stores.py
	$(BIN)/python benchmarks/integrity.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/simulate.py --families 2
	$(BIN)/python benchmarks/graph.py --blocks 10000

clean:
	rm -rf $(VENV) $(KERAS) $(OLDEST) $(OUT) build dist *.egg-info
