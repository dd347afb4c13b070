"""Imports Keras with clean output: `from common import startup`, before Keras is imported anywhere.

TensorFlow writes messages to standard error from C++ before any log level is read; they would bury the one line that an
error of ours is. Python errors are not touched: they are printed after standard error is back. Before `--train`, where
the environment names several processes of JAX, it waits for all of them.
"""

import concurrent.futures
import importlib.util
import os
import re
import signal
import socket
import sys
import threading

from common.cli import INTERRUPTED, silent_stderr
from common.errors import reason

BACKENDS = ("tensorflow", "jax")  # names of packages, too
PROCESSES = [f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")]
PATIENCE = 120  # seconds in which all processes must have started


def _end(trouble, code=2, leave=sys.exit):
    os.write(_screen, f"error: {trouble}\n".encode())
    leave(code)


def _join_processes():
    """Waits for the other processes. JAX then has the devices of all of them."""
    import jax

    try:
        addresses, count, number = (os.environ[name] for name in PROCESSES)
        host, port = addresses.split(",")[0].rsplit(":", 1)
        if int(number) == 0:  # where the port is taken, JAX would crash
            socket.create_server(("", int(port))).close()
        where = f"{host}:{port}", int(count), int(number)
        print("process {2} waits for all {1} at {0}".format(*where), flush=True)
        thread = concurrent.futures.ThreadPoolExecutor(1)  # JAX neither sees Ctrl-C nor survives its own time limit
        thread.submit(jax.distributed.initialize, *where, initialization_timeout=2 * PATIENCE).result(PATIENCE)
        sys.excepthook = lambda *error: (sys.__excepthook__(*error), os._exit(1))  # JAX would wait for the others
    except (LookupError, OSError, OverflowError, RuntimeError, ValueError) as error:
        trouble = f"cannot start several processes ({reason(error)})"
        _end(f"{trouble}; README.md says how to set {', '.join(PROCESSES)}", leave=os._exit)  # a thread may still wait


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_screen, _backend = 2, os.environ.get("KERAS_BACKEND") or "tensorflow"
_training = "--train" in sys.argv  # nothing else waits for other processes
_several = _training and any(name in os.environ for name in PROCESSES)
if _backend not in BACKENDS or importlib.util.find_spec(_backend) is None:
    _trouble = "is not installed" if _backend in BACKENDS else "is not supported"
    _end(f"the Keras backend {_backend!r} {_trouble}; set KERAS_BACKEND to tensorflow or jax")
_workers = len(re.findall(r':\d+"', os.environ.get("TF_CONFIG", ""))) if _training else 0
if _backend == "tensorflow" and (_several or _workers > 1):
    _end("Keras cannot train in several processes under TensorFlow; set KERAS_BACKEND=jax, as README.md says")
# TensorFlow writes logs under JAX, and JAX measures FID under TensorFlow: neither may take all memory of a GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
if _backend == "tensorflow":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")  # with it, SIGTERM would not end a process
_handler = signal.getsignal(signal.SIGINT)
_main_thread = threading.current_thread() is threading.main_thread()  # only that one may set handlers
with silent_stderr() as _screen:
    if _main_thread:  # Ctrl-C while TensorFlow is being imported would end in a traceback of a hundred lines.
        signal.signal(signal.SIGINT, lambda *_: _end("interrupted while starting", INTERRUPTED, os._exit))
    try:
        if _several:
            _join_processes()
        import keras

        keras.ops.zeros(())  # TensorFlow looks for a GPU, and says that there is none, in its first operation
    finally:
        if _main_thread:
            signal.signal(signal.SIGINT, _handler)
