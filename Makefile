# Nothing needs activating: every target makes the environment it needs. GNU Make 3.81 is enough.
PYTHON ?= python3
PY := .venv/bin/python
VARIABLES := DATA CLASSES RUN MODEL RESULTS PER_CLASS TEST LINK_FROM EPOCHS BATCH_SIZE LR PATIENCE VIEWS WINDOW UNFREEZE SEED DEVICE FEATURE_BATCH_SIZE ARCH WEIGHTS WORKERS GPUS IMAGES ALSO ARGS PYTHON

# a typo in a variable's name must not be ignored
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
$(if $(filter-out $(VARIABLES) -%,$(given)),$(error unknown variable $(filter-out $(VARIABLES),$(given)); known: $(VARIABLES)))

# RUN=name keeps a run apart; a flag is passed only if its variable was given: the defaults live in the scripts
MODEL := $(if $(RUN),runs/$(RUN)/model.pth)
RESULTS := $(if $(findstring --from,$(ARGS)),,$(if $(RUN),runs/$(RUN)/results))
# each flag brings the space in front of it, so that the commands on the screen have no gaps
quote = '$(subst ','\'',$1)'
flag = $(if $($2), --$1 $(call quote,$($2)))
data_flags = $(call flag,data-dir,DATA)$(if $(CLASSES), --classes $(CLASSES))$(call flag,seed,SEED)
split_flags = $(data_flags)$(call flag,per-class,PER_CLASS)$(call flag,test,TEST)$(call flag,link-from,LINK_FROM)
machine_flags = $(call flag,device,DEVICE)$(call flag,feature-batch-size,FEATURE_BATCH_SIZE)$(call flag,workers,WORKERS)
run_flags = $(data_flags)$(call flag,checkpoint,MODEL)$(call flag,results-dir,RESULTS)$(machine_flags)
loop_flags = $(call flag,epochs,EPOCHS)$(call flag,batch-size,BATCH_SIZE)$(call flag,lr,LR)$(call flag,patience,PATIENCE)
variant_flags = $(call flag,views,VIEWS)$(call flag,window,WINDOW)$(call flag,arch,ARCH)$(call flag,weights,WEIGHTS)$(call flag,unfreeze,UNFREEZE)
train_flags = $(run_flags)$(loop_flags)$(variant_flags)
also = $(if $(ALSO), $(foreach folder,$(ALSO),--also $(call quote,$(folder))))
args = $(if $(ARGS), $(ARGS))
# in make all, each script leaves out the flags that only other scripts know
all_args = $(if $(ARGS), --args-of-all $(ARGS))
# a name that exists is one name, also with spaces; otherwise IMAGES are several names, with or without quotes
open := (
close := )
escaped = $(subst $(open),\$(open),$(subst $(close),\$(close),$(IMAGES)))
several = $(if $(findstring ',$(IMAGES))$(findstring ",$(IMAGES)),$(IMAGES),$(escaped))
images = $(if $(shell test -e $(call quote,$(IMAGES)) && echo yes),$(call quote,$(IMAGES)),$(several))
launch = $(if $(GPUS),$(PY) -m torch.distributed.run --standalone --nproc-per-node $(GPUS),$(PY))

.PHONY: FORCE help install split check train cv curve evaluate predict all demo test page-test matrix fuzz bench lint clean
help:  ## this page
	@echo "make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z-]*\):.*## *\(.*\)/  \1 \2/p' Makefile | awk '{ t = $$1; sub(/^ *[a-z-]+ /, ""); printf "  %-10s %s\n", t, $$0 }'
	@sed -n 's/^#= //p' Makefile
#= Variables (a script's own default holds where one is not given):
#=   DATA RUN MODEL RESULTS         folder of the images; RUN=name keeps model and report in runs/name/
#=   CLASSES                        names of the class folders, the disease second: CLASSES="healthy sick"
#=   PER_CLASS TEST                 images of a class for val/; for test/, if there is none (TEST=50, or a share: TEST=0.2)
#=   LINK_FROM                      images elsewhere that are only read, linked into DATA
#=   EPOCHS LR PATIENCE BATCH_SIZE  training
#=   VIEWS WINDOW ARCH WEIGHTS      variants and window of an image; network; imagenet, random or a file
#=   UNFREEZE                       also train this module and all that follow it: UNFREEZE=layer4
#=   SEED DEVICE WORKERS GPUS       seed; cpu, cuda, mps; decoding processes; GPUS=4 shares the pass
#=   FEATURE_BATCH_SIZE             views per batch in the frozen network
#=   ALSO                           for evaluate: data folders of other hospitals, ALSO="DIR DIR"
#=   IMAGES ARGS PYTHON             for predict; further flags (in all: of any script); makes .venv

# a PYTHON that is given makes .venv anew where it was made by another one
other_python := $(if $(filter command environment,$(origin PYTHON)),$(filter-out $(shell cat .venv/python 2>/dev/null),$(PYTHON)))
.venv/installed: requirements.txt $(if $(other_python),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer needed, found %d.%d: make install PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv$(if $(other_python), --clear) .venv
	@echo "$(PYTHON)" > .venv/python
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@
.venv/installed-tests: tests/requirements.txt .venv/installed
	$(PY) -m pip install --quiet --requirement tests/requirements.txt
	@touch $@
install: .venv/installed  ## make .venv with the packages of requirements.txt

split: install  ## move whole patients from train/ to val/, with TEST=50 also to test/ (ARGS=--undo: val/ back to train/)
	$(PY) split_val.py$(split_flags)$(args)
check: install  ## look for leaks, duplicates and shortcuts in the data
	$(PY) split_val.py --check$(data_flags)$(args)
train: install  ## train the classifier: model.pth, model.json, curves
	$(launch) train.py$(train_flags)$(args)
cv: install  ## cross-validate instead: the spread of every number
	$(launch) train.py --folds 5 --repeats 5$(train_flags)$(args)
curve: install  ## how much more images would help: the scores with 25, 50, 100 and 200 training images
	$(launch) train.py --folds 10 --repeats 5 --sizes 25,50,100,200$(train_flags)$(args)
evaluate: install  ## score the test images: metrics, predictions, pictures
	$(PY) evaluate.py$(run_flags)$(also)$(args)
predict: install  ## classify IMAGES="scan.png folder/": a table and a page
	$(PY) evaluate.py$(run_flags)$(args) $(if $(IMAGES),$(images),$(error which images? make predict IMAGES="scan.png folder/"))
all: install  ## check, split, train, evaluate
	$(PY) split_val.py$(split_flags) --check-first$(all_args)
	$(launch) train.py$(train_flags)$(all_args)
	$(PY) evaluate.py$(run_flags)$(also)$(all_args)

demo: install  ## the whole chain on drawn radiographs, in demo/: needs neither data nor weights
	$(PY) tests/phantoms.py demo/chestxrays$(if $(CLASSES), --classes $(CLASSES))
	$(MAKE) --no-print-directory all DATA=demo/chestxrays PER_CLASS=15 MODEL=demo/model.pth RESULTS=demo/results WEIGHTS=random
	@echo; echo "Next: put your own images into data/chestxrays/ (see README.md), then make check, then make all"
# two test processes on two cores: with more threads, they would wait for each other
test fuzz: export OMP_NUM_THREADS := 1
test: lint  ## everything that is checked before a change lands
	$(PY) -m pytest -q -n 2 --dist worksteal$(args)
page-test: .venv/installed-tests  ## the report page in a browser (Chromium or Chrome); part of make test
	$(PY) -m pytest -q -rs tests/test_browser.py$(args)
matrix:  ## the tests with the oldest Python and lowest versions, and with the newest
	tests/matrix.sh$(args)
fuzz: .venv/installed-tests  ## minutes of damaged images, checkpoints and records, and kills at every step
	$(PY) -m pytest -q -n 2 --dist worksteal tests --fuzz$(args)
bench: .venv/installed-tests  ## the speed table
	$(PY) tests/bench.py$(args)
lint: .venv/installed-tests  ## format, style and import directions
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	.venv/bin/lint-imports --no-logo --no-cache

clean:  ## delete the environment, caches and the demo; data, models and results stay
	rm -rf .venv .matrix .cache demo .pytest_cache .ruff_cache __pycache__ cxr/__pycache__ tests/__pycache__
