"""Imports Keras with clean output: `from common import startup`, before Keras is imported anywhere.

TensorFlow writes messages to standard error from C++ before any log level is read; they would bury the one line that an
error of ours is. Python errors are not touched: they are printed after standard error is back.
"""

import importlib.util
import os
import signal
import sys
import threading

BACKENDS = {"tensorflow": "tensorflow", "jax": "jax"}  # of Keras, and the package that each needs


def _stop(message, code):
    os.dup2(_standard_error, 2)
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_standard_error = os.dup(2)
_backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
if _backend not in BACKENDS or importlib.util.find_spec(BACKENDS[_backend]) is None:
    _trouble = "is not installed" if _backend in BACKENDS else "is not supported"
    _stop(f"the Keras backend {_backend!r} {_trouble}; set KERAS_BACKEND to tensorflow or jax", 2)
# Ctrl-C while TensorFlow is being imported would end in a traceback of a hundred lines.
_handler = signal.getsignal(signal.SIGINT)
_main_thread = threading.current_thread() is threading.main_thread()  # only that one may set handlers
if _main_thread:
    signal.signal(signal.SIGINT, lambda number, frame: _stop("interrupted while starting", 130))
_devnull = os.open(os.devnull, os.O_WRONLY)
os.dup2(_devnull, 2)
try:
    import keras

    keras.ops.zeros(())  # TensorFlow looks for a GPU, and says that there is none, in its first operation
finally:
    os.dup2(_standard_error, 2)
    os.close(_devnull)
    if _main_thread:
        signal.signal(signal.SIGINT, _handler)
