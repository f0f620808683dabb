# Nothing needs activating: every target makes the environment it needs. GNU Make 3.81 is enough.
PYTHON ?= python3
RUN := .venv/bin/python
VARIABLES := DATA MODEL RESULTS EPOCHS BATCH_SIZE LR PATIENCE VIEWS SEED DEVICE ARCH WEIGHTS WORKERS GPUS IMAGES ARGS PYTHON

# a typo in a variable's name must not be ignored
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
$(if $(filter-out $(VARIABLES) -%,$(given)),$(error unknown variable $(filter-out $(VARIABLES),$(given)); known: $(VARIABLES)))

# a flag is passed only if its variable was given: the defaults live in the scripts
flag = $(if $($2),--$1 "$($2)")
split_flags = $(call flag,data-dir,DATA) $(call flag,seed,SEED)
run_flags = $(split_flags) $(call flag,checkpoint,MODEL) $(call flag,results-dir,RESULTS) \
	$(call flag,device,DEVICE) $(call flag,batch-size,BATCH_SIZE) $(call flag,workers,WORKERS)
train_flags = $(run_flags) $(call flag,epochs,EPOCHS) $(call flag,lr,LR) $(call flag,patience,PATIENCE) \
	$(call flag,views,VIEWS) $(call flag,arch,ARCH) $(call flag,weights,WEIGHTS)
launch = $(if $(GPUS),$(RUN) -m torch.distributed.run --standalone --nproc-per-node $(GPUS),$(RUN))

.PHONY: help install split check train cv evaluate predict all demo test fuzz bench lint clean

help:  ## this page
	@echo "make TARGET [VARIABLE=value ...]"
	@sed -n 's/^\([a-z]*\):.*## *\(.*\)/  \1 \2/p' Makefile | awk '{ t = $$1; sub(/^ *[a-z]+ /, ""); printf "  %-10s %s\n", t, $$0 }'
	@sed -n 's/^#= //p' Makefile
#= Variables (a script's own default holds where one is not given):
#=   DATA MODEL RESULTS             folder of the images, checkpoint, folder of the report
#=   EPOCHS LR PATIENCE BATCH_SIZE  training
#=   VIEWS ARCH WEIGHTS             variants of a training image; network; imagenet, random or a file
#=   SEED DEVICE WORKERS GPUS       seed; cpu, cuda, mps; decoding processes; GPUS=4 shares the pass (train, cv, all)
#=   IMAGES ARGS PYTHON             for predict; further flags, of train.py in all (ARGS=--help); makes .venv

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	$(RUN) -m pip install --quiet --requirement tests/requirements.txt
	@touch $@

install: .venv/installed  ## make .venv with the packages of requirements.txt

split: install  ## move 50 images a class from train/ into val/ (ARGS=--undo puts them back)
	$(RUN) split_val.py $(split_flags) $(ARGS)
check: install  ## look for leaks, duplicates and shortcuts in the data
	$(RUN) split_val.py --check $(split_flags) $(ARGS)

train: install  ## train the classifier: model.pth, model.json, curves
	$(launch) train.py $(train_flags) $(ARGS)
cv: install  ## cross-validate instead: the spread of every number
	$(launch) train.py --folds 5 --repeats 5 $(train_flags) $(ARGS)

evaluate: install  ## score the test images: metrics, predictions, pictures
	$(RUN) evaluate.py $(run_flags) $(ARGS)
predict: install  ## classify IMAGES="scan.png folder/"
	$(RUN) evaluate.py $(run_flags) $(ARGS) $(if $(IMAGES),$(IMAGES),$(error which images? make predict IMAGES="scan.png folder/"))
all: install  ## split, train, evaluate
	$(RUN) split_val.py $(split_flags)
	$(launch) train.py $(train_flags) $(ARGS)
	$(RUN) evaluate.py $(run_flags)

demo: install  ## the whole chain on drawn radiographs, in demo/: needs neither data nor weights
	$(RUN) tests/phantoms.py demo/chestxrays
	$(RUN) split_val.py --data-dir demo/chestxrays --per-class 15
	$(RUN) train.py --data-dir demo/chestxrays --checkpoint demo/model.pth --results-dir demo/results --weights random
	$(RUN) evaluate.py --data-dir demo/chestxrays --checkpoint demo/model.pth --results-dir demo/results
test: lint  ## everything that is checked before a change lands
	$(RUN) -m pytest -q $(ARGS)

fuzz: .venv/installed-tests  ## minutes of damaged images, checkpoints and records, and kills at every step
	$(RUN) -m pytest -q tests --fuzz $(ARGS)
bench: .venv/installed-tests  ## the speed table of the README
	$(RUN) tests/bench.py $(ARGS)

lint: .venv/installed-tests  ## format and style
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

clean:  ## delete the environment, caches and the demo; data, model and results stay
	rm -rf .venv .cache demo .pytest_cache .ruff_cache __pycache__ tests/__pycache__
