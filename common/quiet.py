"""Imports Keras without the messages TensorFlow writes to standard error when it starts: `from common import quiet`.

They come from C++ before any log level is read, and would bury the one line that an error of ours is. Python errors are
not touched: they are printed after standard error is back.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_standard_error = os.dup(2)
_nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 2)
try:
    import keras

    keras.ops.zeros(())  # the first operation is when TensorFlow looks for a GPU and says that there is none
finally:
    os.dup2(_standard_error, 2)
    os.close(_standard_error)
    os.close(_nowhere)
