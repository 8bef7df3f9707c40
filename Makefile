# The two commands of the README: `make bench` and `make test`. Both prepare what they need.
SHELL := bash
PYTHON ?= python3
VENV := .venv
RUNNER := $(VENV)/bin/runner
PIP := $(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)gpu)
comma := ,

.PHONY: bench test half other-half slurm unit setup system-packages lint roles clean help

help:
	@echo "make bench   install into .venv and benchmark this machine (about a minute without a GPU)"
	@echo "make test    everything that CI runs; installs the system packages that it needs"
	@echo "make slurm   every test that has Slurm, on nodes of another release (RELEASE=trixie); see benchmarks/results"
	@echo "make unit    the fast tests alone"
	@echo "make lint    ruff, import-linter, mypy"
	@echo "make roles   the tables of variables in the roles' READMEs, from their specifications"

bench: setup
	$(RUNNER) bench -i inventory/local --model tiny

setup: $(VENV)/.stamp

# constraints.txt pins every package that was tested, torch's exact build number among them.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@testbed/install-system-packages.sh python
	@echo "installing into $(VENV), once: PyTorch and what else is needed, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
	@echo "installed into $(VENV)"

system-packages:
	testbed/install-system-packages.sh

# Where the time goes: each stage's at its end, and the slowest tests' in pytest's own lists. Testbeds and the roles' scenarios
# often wait for connections and services, so that two processes, which take as long as each other, share the processors.
test:
	time $(MAKE) --no-print-directory system-packages setup
	time $(MAKE) --no-print-directory lint
	time $(MAKE) --no-print-directory -j2 --output-sync=target half other-half

HALF := tests/roles tests/unit tests/faults/test_workflow_faults.py $(addprefix tests/local/test_,accelerate_on_cpu.py collectives.py \
		data_prepare.py gsm8k_hub.py launch_here.py node.py publish_ssh.py ray_on_loopback.py ray_supervisor.py real_modules.py \
		rl_on_cpu.py sft.py sft_attention.py sft_layers.py sft_matmul.py sft_recompute.py sft_speed_on_cpu.py sft_versions.py \
		sync_ssh.py tune_on_cpu.py verl_contract.py) \
	$(addprefix tests/testbed/test_,joints.py newer_slurm.py)

half:
	$(VENV)/bin/pytest $(HALF)

other-half:
	$(VENV)/bin/pytest $(HALF:%=--ignore %)

RELEASE ?= trixie

slurm: system-packages setup
	$(VENV)/bin/python benchmarks/slurm_releases.py --release $(RELEASE)

unit: setup
	$(VENV)/bin/pytest tests/unit

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

roles: setup
	$(VENV)/bin/python roles/readme.py

clean:
	rm -rf $(VENV) build *.egg-info
