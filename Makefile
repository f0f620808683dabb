# Nothing needs activating: every target makes the environment it needs. GNU Make 3.81 is enough.
PYTHON ?= python3
PY := .venv/bin/python
VARIABLES := DATA CLASSES RUN MODEL RESULTS PER_CLASS TEST LINK_FROM EPOCHS BATCH_SIZE LR PATIENCE VIEWS WINDOW SEED DEVICE FEATURE_BATCH_SIZE ARCH WEIGHTS WORKERS GPUS IMAGES ARGS PYTHON

# a typo in a variable's name must not be ignored
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
$(if $(filter-out $(VARIABLES) -%,$(given)),$(error unknown variable $(filter-out $(VARIABLES),$(given)); known: $(VARIABLES)))

# RUN=name keeps a run apart; a flag is passed only if its variable was given: the defaults live in the scripts
MODEL := $(if $(RUN),runs/$(RUN)/model.pth)
RESULTS := $(if $(findstring --from,$(ARGS)),,$(if $(RUN),runs/$(RUN)/results))
flag = $(if $($2),--$1 '$(subst ','\'',$($2))')
data_flags = $(call flag,data-dir,DATA) $(if $(CLASSES),--classes $(CLASSES)) $(call flag,seed,SEED)
split_flags = $(data_flags) $(call flag,per-class,PER_CLASS) $(call flag,test,TEST) $(call flag,link-from,LINK_FROM)
run_flags = $(data_flags) $(call flag,checkpoint,MODEL) $(call flag,results-dir,RESULTS) \
	$(call flag,device,DEVICE) $(call flag,feature-batch-size,FEATURE_BATCH_SIZE) $(call flag,workers,WORKERS)
train_flags = $(run_flags) $(call flag,epochs,EPOCHS) $(call flag,batch-size,BATCH_SIZE) $(call flag,lr,LR) $(call flag,patience,PATIENCE) \
	$(call flag,views,VIEWS) $(call flag,window,WINDOW) $(call flag,arch,ARCH) $(call flag,weights,WEIGHTS)
launch = $(if $(GPUS),$(PY) -m torch.distributed.run --standalone --nproc-per-node $(GPUS),$(PY))

.PHONY: FORCE help install split check train cv evaluate predict all demo test matrix fuzz bench lint clean
help:  ## this page
	@echo "make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z]*\):.*## *\(.*\)/  \1 \2/p' Makefile | awk '{ t = $$1; sub(/^ *[a-z]+ /, ""); printf "  %-10s %s\n", t, $$0 }'
	@sed -n 's/^#= //p' Makefile
#= Variables (a script's own default holds where one is not given):
#=   DATA RUN MODEL RESULTS         folder of the images; RUN=name keeps model and report in runs/name/
#=   CLASSES                        names of the class folders, the disease second: CLASSES="healthy sick"
#=   PER_CLASS TEST                 images of a class for val/; for test/, if there is none (TEST=50, or a share: TEST=0.2)
#=   LINK_FROM                      images elsewhere that are only read, linked into DATA
#=   EPOCHS LR PATIENCE BATCH_SIZE  training
#=   VIEWS WINDOW ARCH WEIGHTS      variants and window of an image; network; imagenet, random or a file
#=   SEED DEVICE WORKERS GPUS       seed; cpu, cuda, mps; decoding processes; GPUS=4 shares the pass
#=   FEATURE_BATCH_SIZE             views per batch in the frozen network
#=   IMAGES ARGS PYTHON             for predict; further flags, of train.py in all; makes .venv

# a PYTHON that is given makes .venv anew where it was made by another one
other_python := $(if $(filter command environment,$(origin PYTHON)),$(filter-out $(shell cat .venv/python 2>/dev/null),$(PYTHON)))
.venv/installed: requirements.txt $(if $(other_python),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer needed, found %d.%d: make install PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(if $(other_python),--clear) .venv
	@echo "$(PYTHON)" > .venv/python
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@
.venv/installed-tests: tests/requirements.txt .venv/installed
	$(PY) -m pip install --quiet --requirement tests/requirements.txt
	@touch $@
install: .venv/installed  ## make .venv with the packages of requirements.txt

split: install  ## move whole patients from train/ to val/, with TEST=50 also to test/ (ARGS=--undo: val/ back to train/)
	$(PY) split_val.py $(split_flags) $(ARGS)
check: install  ## look for leaks, duplicates and shortcuts in the data
	$(PY) split_val.py --check $(data_flags) $(ARGS)
train: install  ## train the classifier: model.pth, model.json, curves
	$(launch) train.py $(train_flags) $(ARGS)
cv: install  ## cross-validate instead: the spread of every number
	$(launch) train.py --folds 5 --repeats 5 $(train_flags) $(ARGS)
evaluate: install  ## score the test images: metrics, predictions, pictures
	$(PY) evaluate.py $(run_flags) $(ARGS)
predict: install  ## classify IMAGES="scan.png folder/"
	$(PY) evaluate.py $(run_flags) $(ARGS) $(if $(IMAGES),$(IMAGES),$(error which images? make predict IMAGES="scan.png folder/"))
all: install  ## check, split, train, evaluate
	$(PY) split_val.py $(split_flags) --check-first $(filter --skip-bad,$(ARGS))
	$(launch) train.py $(train_flags) $(ARGS)
	$(PY) evaluate.py $(run_flags)

demo: install  ## the whole chain on drawn radiographs, in demo/: needs neither data nor weights
	$(PY) tests/phantoms.py demo/chestxrays $(if $(CLASSES),--classes $(CLASSES))
	$(MAKE) --no-print-directory all DATA=demo/chestxrays PER_CLASS=15 MODEL=demo/model.pth RESULTS=demo/results WEIGHTS=random
	@echo; echo "Next: put your own images into data/chestxrays/ (see README.md), then make check, then make all"
test: lint  ## everything that is checked before a change lands
	$(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)
matrix:  ## the tests with the oldest Python and lowest versions, and with the newest
	tests/matrix.sh $(ARGS)
fuzz: .venv/installed-tests  ## minutes of damaged images, checkpoints and records, and kills at every step
	$(PY) -m pytest -q -n 2 --dist worksteal tests --fuzz $(ARGS)
bench: .venv/installed-tests  ## the speed table
	$(PY) tests/bench.py $(ARGS)
lint: .venv/installed-tests  ## format, style and import directions
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	.venv/bin/lint-imports --no-logo --no-cache

clean:  ## delete the environment, caches and the demo; data, models and results stay
	rm -rf .venv .matrix .cache demo .pytest_cache .ruff_cache __pycache__ cxr/__pycache__ tests/__pycache__
