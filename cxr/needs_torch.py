"""Imports torch and torchvision, or ends the script with one line. A split needs neither."""

import gc

from cxr import import_or_exit

# These packages create half a million objects that stay to the end. If the garbage collector does
# not look at them, again and again and at the exit, every command is a second faster.
gc.disable()
import_or_exit("torch", "torchvision")
gc.freeze()
gc.enable()
