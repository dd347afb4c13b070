"""Imports Keras with clean output: `from common import startup`, before Keras is imported anywhere.

TensorFlow writes messages to standard error from C++ before any log level is read; they would bury the one line that an
error of ours is. Python errors are not touched: they are printed after standard error is back.
"""

import importlib.util
import os
import signal
import sys
import threading

from common.cli import INTERRUPTED, silent_stderr

BACKENDS = ("tensorflow", "jax")  # names of packages, too

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
if _backend not in BACKENDS or importlib.util.find_spec(_backend) is None:
    _trouble = "is not installed" if _backend in BACKENDS else "is not supported"
    _way_out = "set KERAS_BACKEND to tensorflow or jax"
    print(f"error: the Keras backend {_backend!r} {_trouble}; {_way_out}", file=sys.stderr)
    sys.exit(2)
if _backend == "jax":  # TensorFlow, which writes logs, would otherwise take all memory of a GPU
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
_handler = signal.getsignal(signal.SIGINT)
_main_thread = threading.current_thread() is threading.main_thread()  # only that one may set handlers
with silent_stderr() as _screen:

    def _stop(number, frame):
        os.write(_screen, b"error: interrupted while starting\n")
        os._exit(INTERRUPTED)

    if _main_thread:  # Ctrl-C while TensorFlow is being imported would end in a traceback of a hundred lines.
        signal.signal(signal.SIGINT, _stop)
    try:
        import keras

        keras.ops.zeros(())  # TensorFlow looks for a GPU, and says that there is none, in its first operation
    finally:
        if _main_thread:
            signal.signal(signal.SIGINT, _handler)
