# make demo      set up, train a small generator, draw cells with it
# make test      the tests, 5 minutes on 2 quiet cores      make test-all   with those that take minutes each
# make lint      ruff, as in CI                   make clean      remove the environment and caches; runs/ stays
#
# PYTHON=python3.12 chooses the interpreter, VENV=FOLDER the virtual environment, WORKERS=8 the processes of the tests.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all lint clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(RUN) gan.py --output_dir runs/demo --n_epochs 9 --eval_every 3
	$(RUN) generate_archs.py --checkpoint runs/demo/generator.pt --num_archs 20 --output_dir runs/demo/archs
	$(RUN) visualize.py --arch runs/demo/archs/best.json --output_dir runs/demo/figures
	@echo
	@echo "The cells are drawn in runs/demo/figures. Next, train one of them on CIFAR-10:"
	@echo
	@echo "    $(RUN) train_cifar.py --arch runs/demo/archs/best.json"

test: $(INSTALLED)
	$(RUN) -m pytest -n $(WORKERS) --durations=10

test-all: $(INSTALLED)
	$(RUN) -m pytest -n $(WORKERS) --durations=10 -m ""

lint: $(INSTALLED)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last: an interrupted installation is taken up again by the next make.
$(INSTALLED): requirements.txt requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@
