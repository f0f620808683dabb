"""Gives each script its part of ARGS in `make all ARGS="--seeds 5 --prevalence 0.1"`."""

import re

from cxr.errors import Failure

OTHER_COMMANDS = {  # flags with which a script does something else: what to run instead
    "--folds": "make cv",
    "--repeats": "make cv",
    "--sizes": "make curve",
    "--undo": "make split ARGS=--undo",
    "--check": "make check",
    "--from": "make evaluate",
}
MARK = "--args-of-all"  # the Makefile writes it in front of ARGS

SHARED = "--data-dir --classes --seed --skip-bad --debug"
NETWORK = (
    "--checkpoint --results-dir --cache-dir --no-cache --device --feature-batch-size --workers"
)
# The flags that a script gets, which tests/test_make_all.py compares with --help. evaluate.py does
# not get --arch and --threshold, because it reads them from model.json.
FLAGS = {
    "split_val.py": f"{SHARED} --per-class --test --link-from --undo --check --check-first --json",
    "train.py": f"{SHARED} {NETWORK} --arch --weights --views --window --epochs --batch-size --lr "
    "--weight-decay --patience --threshold --no-calibrate --seeds --unfreeze --finetune-epochs "
    "--folds --repeats --sizes --compile",
    "evaluate.py": f"{SHARED} {NETWORK} --split --from --prevalence --compare --also --cam",
}


def own_part(argv, script):
    """Returns a command line without MARK and without the flags that only other scripts get.

    argv: a list of words; those in front of MARK are kept. Raises Failure if a flag behind MARK is
    in OTHER_COMMANDS, or if no script knows it.
    """
    if MARK not in argv:
        return argv
    position = argv.index(MARK)
    own, keep = argv[:position], True
    for word in argv[position + 1 :]:
        if re.match("--?[a-zA-Z]", word):
            flag = word.partition("=")[0]
            if flag in OTHER_COMMANDS:
                raise Failure(f"ARGS: {flag} is not for make all; run {OTHER_COMMANDS[flag]}")
            if flag not in " ".join(FLAGS.values()).split():
                raise Failure(f"ARGS: no script knows the flag {flag} (flags: SCRIPT.py --help)")
            keep = flag in FLAGS[script].split()
        if keep:  # the flag, or its value
            own.append(word)
    return own
