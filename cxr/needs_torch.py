"""Imports torch and torchvision, or ends the script with one line. A split needs neither."""

from cxr import import_or_exit

import_or_exit("torch", "torchvision")
