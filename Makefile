# Every target does its own set-up: a virtual environment in .venv, everything else under ~/.cache/mmlane (MMLANE_CACHE).
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
BENCH := $(VENV)/.bench
V ?= 0.5.12.post1
GPU_PYTHON ?= python3
PROSE := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs/*.md changelog.d/*.md .github/*.md
# For tests that wait more than they compute: four at once, handed out one by one, so that long ones begin first.
AT_ONCE := -n 4 --maxschedchunk 1

# The others: in as many processes as there are cores, each takes what the others have not begun.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test lint lint-check lint-format lint-types lint-imports lint-prose lint-workflows lint-docs unit lane thorough \
	contract install engine matrix transcripts matrix-new fresh fingerprints table docs bench gpu gpu-bundle coverage pythons mutants dist changelog \
	changelog-check clean

# The real engine on this machine's CPU, TP 2, with the plugin and without, answering image requests.
demo: $(INSTALLED)
	$(RUN) -m devkit.demo --engine $(V)

# Everything that has to hold: checks, unit, lane and contract tests, installations, and six engine releases for real.
test: lint unit lane contract install engine

# The hooks of .pre-commit-config.yaml call these seven.
lint: lint-check lint-format lint-types lint-imports lint-prose lint-workflows lint-docs

lint-check: $(READY)
	$(VENV)/bin/ruff check .

lint-format: $(READY)
	$(VENV)/bin/ruff format --check .

lint-types: $(READY)
	$(VENV)/bin/mypy

lint-imports: $(READY)
	$(VENV)/bin/lint-imports --no-cache

# Spelling, phrases that say nothing, and words for which tools/plain_words.yaml has plainer ones.
lint-prose: $(READY)
	$(VENV)/bin/codespell $(PROSE) plugin patches tests tools devkit bench Makefile
	$(VENV)/bin/proselint check --config tools/proselint.json $(PROSE)
	$(RUN) -m tools.prose

# Workflows and forms of the forge against its schemas, each job with a time limit, and what is known to be unsafe there.
SCHEMA := $(VENV)/bin/check-jsonschema --quiet --builtin-schema
lint-workflows: $(READY)
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-actions .github/actions/*/action.yml
	$(VENV)/bin/zizmor --offline --quiet --no-progress --config .github/zizmor.yml .github

# The site is built without a warning: every link and anchor is there, and every page is in the menu. Not --quiet: with
# it, warnings count for nothing.
lint-docs: docs

docs: $(READY)
	$(RUN) -m tools.compat_table --check
	$(RUN) -m tools.settings_table --check
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

unit: $(READY)
	$(RUN) -m pytest tests/unit $(PARALLEL)

# The lane in real processes, killed at every step; a soak of SOAK seconds among them. On a GPU where there is one.
lane: $(READY)
	$(RUN) -m pytest tests/lane $(AT_ONCE) $(if $(SOAK),--soak $(SOAK))
	$(RUN) -m pytest tests/gpu

# Unit and lane tests with ten times as many examples, others in every run, and a soak of two minutes.
thorough: $(READY)
	$(RUN) -m pytest tests/unit tests/lane $(AT_ONCE) --hypothesis-profile thorough $(if $(SOAK),--soak $(SOAK))

contract: $(READY)
	$(RUN) -m pytest tests/contract

# mmlane installed in several ways: what the doctor says of each, and what is left of it. More ways in `make matrix`.
install: $(READY)
	$(RUN) -m pytest tests/install $(PARALLEL)

engine: $(READY)
	$(RUN) -m pytest tests/engine

# The same on every supported release; ONLY=0.5.9,0.5.23 chooses some. What has passed is run again with AGAIN=1 only.
matrix: $(READY)
	$(RUN) -m tools.matrix $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again)

# The commands of README.md in a clone of what is committed, with an empty cache and a clean environment.
fresh:
	tools/fresh

# What releases do without mmlane, run again and written to tests/engine/transcripts: make transcripts ONLY=0.5.9,0.5.23
transcripts: $(READY)
	$(RUN) -m pytest tests/engine/test_transcripts.py --transcripts anew --engines $(or $(ONLY),all)

# Which cells of the table need a person, for a release nobody has seen: make matrix-new V=0.5.24
matrix-new: $(READY)
	$(RUN) -m tools.matrix_new $(V)

fingerprints: $(READY)
	$(RUN) -m tools.fingerprints

table: $(READY)
	$(RUN) -m tools.compat_table
	$(RUN) -m tools.settings_table

# Which lines of the plugin the tests without an engine run, child processes included; a report to read, no limit.
# It comes in any case; the exit status is that of the tests.
# What a process ran that was killed with SIGKILL is not counted. The page is build/coverage/html/index.html.
coverage: $(READY)
	rm -rf build/coverage
	trap 'exit 130' INT; status=0; \
	$(RUN) -m coverage run -m pytest tests/unit $(PARALLEL) || status=1; \
	$(RUN) -m coverage run -m pytest tests/lane || status=1; \
	$(RUN) -m coverage run -m pytest tests/contract || status=1; \
	$(RUN) -m coverage combine --quiet && $(RUN) -m coverage html --quiet && $(RUN) -m coverage report || status=1; \
	exit $$status

# The unit tests on the other Pythons that are supported, where they are installed. TORCH=no leaves out what needs it;
# ONLY=3.12 takes one, and fails where it is not installed.
pythons: $(READY)
	$(RUN) -m tools.pythons $(if $(ONLY),--required $(ONLY)) $(if $(filter no,$(TORCH)),--without-torch)

# What is released, in dist: an sdist and a wheel, checked; the sdist builds the same wheel.
dist: $(READY)
	rm -rf dist
	$(RUN) -m tools.dist

# The entries in changelog.d as they will be in CHANGELOG.md; docs/releasing.md.
changelog: $(READY)
	$(RUN) -m towncrier build --draft

# Whether what is committed since BASE added an entry: make changelog-check BASE=origin/main
changelog-check: $(READY)
	$(RUN) -m towncrier check --compare-with $(BASE)

# Changes to the lane that no test minds: make mutants M=ticket, M="ticket protocol"; all modules take hours.
mutants: $(READY)
	$(RUN) -m tools.mutants $(M)

# All that needs a GPU, in parts that can be resumed; with GPU_PYTHON, which has torch for CUDA. Without a network
# there: WHEELS=DIRECTORY, which `make gpu-bundle WHEELS=DIRECTORY` fills on another machine.
gpu:
	$(GPU_PYTHON) -m tools.gpu $(if $(WHEELS),--wheels $(WHEELS))

gpu-bundle: $(READY)
	$(RUN) -m tools.gpu --bundle $(or $(WHEELS),build/gpu-bundle)

# Figures: the startup hook, the lane beside the engine's transports and others, the engine with and without the plugin,
# what text-only requests pay, and the way to a GPU where there is one; plots and tables in bench/out. It takes hours;
# QUICK=1 takes a part of them, and ends with the ratios that moved since those in git (tools/ratios.py).
bench: $(BENCH)
	$(RUN) -m bench.startup
	$(RUN) -m bench.transport $(if $(QUICK),--quick)
	$(RUN) -m bench.engine $(if $(QUICK),--quick)
	$(RUN) -m bench.launches $(if $(QUICK),--rounds 1 --requests 4)
	$(RUN) -m bench.text
	$(RUN) -m bench.gpu $(if $(QUICK),--quick)
	$(if $(QUICK),$(RUN) -m tools.ratios)

# What a user gets, and what the checks need on top of that.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(READY): $(INSTALLED) requirements-dev.txt requirements-test.txt
	$(PIP) -r requirements-dev.txt
	touch $@

$(BENCH): $(READY) bench/requirements.txt
	$(PIP) -r bench/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
