# make demo      set up, train a small generator, draw cells with it, write a page about it: runs/demo/report.html
# make test      the tests, 5 minutes on 2 quiet cores      make test-all   with those that take minutes each
# make tables    the tables of docs/results.md and docs/speed.md, from the result files; needs no packages
# make lint      ruff, as in CI                   make clean      remove the environment and caches; runs/ stays
#
# PYTHON=python3.12 chooses the interpreter, VENV=FOLDER the virtual environment, WORKERS=8 the processes of the tests.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
TOOLS = $(VENV)/.installed-dev

.PHONY: demo test test-all tables lint clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(RUN) gan.py --output_dir runs/demo --n_epochs 4 --eval_every 2
	$(RUN) generate_archs.py --checkpoint runs/demo/generator.pt --num_archs 20 --evaluate --output_dir runs/demo/archs
	$(RUN) visualize.py --arch runs/demo/archs --output_dir runs/demo/figures
	$(RUN) report.py runs/demo runs/demo/archs --out runs/demo/report.html
	@echo
	@echo "runs/demo/report.html shows the run and its cells; open it in a browser."
	@echo "The best cell of the highest class is drawn in runs/demo/figures. Next, train it on CIFAR-10 (days on a CPU):"
	@echo
	@echo "    $(RUN) train_cifar.py --arch runs/demo/archs"

test: $(TOOLS)
	$(RUN) -m pytest -n $(WORKERS) --durations=10

test-all: $(TOOLS)
	$(RUN) -m pytest -n $(WORKERS) --durations=10 -m ""

tables:
	$(PYTHON) benchmarks/tables.py

lint: $(TOOLS)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last: an interrupted installation is taken up again by the next make.
$(INSTALLED): requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(TOOLS): $(INSTALLED) requirements-dev.txt
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@
