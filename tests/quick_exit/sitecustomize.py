"""Processes that tests start end at once: that Python first searches all of PyTorch for garbage takes a second of each.

Only here: what lies in a cycle is then not finished, such as a file of one's own that was never closed.
"""

import atexit
import gc

atexit.register(gc.freeze)
