"""The flags that every script has, and how a script ends when something is wrong that the user can fix."""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import os
import shlex
import signal
import sys
from pathlib import Path

from common.errors import UserError
from common.files import check_writable, remove_leftovers

REPOSITORY = Path(__file__).resolve().parent.parent
INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the scripts."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def parser(description, models):
    """Returns the argument parser with the flags that all scripts share, in the order that all scripts share.

    `models` are the names that `--model` accepts; a script with a single model gets no `--model` flag. A script may add
    flags of its own, also to the attribute `modes`, the group of which exactly one flag is given.
    """
    flags = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    mode = flags.modes = flags.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="build, fit, measure, save, write results and figures")
    compare = "restore from saved_models/, measure, compare with the recorded numbers, write figures"
    mode.add_argument("--load", action="store_true", help=compare)
    mode.add_argument("--experiments", action="store_true", help="the comparison behind the choices (resumable)")
    if len(models) > 1:
        flags.add_argument("--model", choices=models, help="one of the models (default: all)")
    flags.add_argument("--quick", action="store_true", help="a few batches into runs/quick/: proves that it works")
    tracked = "use the images in data/samples/ instead of the full dataset"
    flags.add_argument("--sample", action="store_true", help=tracked)
    positive, seed = number(int, 1, 100_000), number(int, 0, 2**31 - 1)
    flags.add_argument("--epochs", type=positive, metavar="N", help="passes over the training images")
    flags.add_argument("--batch-size", type=positive, metavar="N", help="examples per optimisation step")
    flags.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of everything random (default: 0)")
    flags.add_argument("--resume", action="store_true", help="resume a stopped training run from its last checkpoint")
    shared = "with --train: share every batch out among so many devices (default: 1)"
    flags.add_argument("--devices", type=number(int, 1, 1024), default=1, metavar="N", help=shared)
    flags.add_argument("--record", action="store_true", help="with --load: write the measured numbers down (authors)")
    folder, data_dir = {"type": Path, "metavar": "DIR"}, Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    kept = "where datasets are kept (default: $DATA_DIR, else data)"
    flags.add_argument("--data-dir", **folder, default=data_dir, help=kept)
    written = "where everything is written, and models are looked for first (default: the repository; "
    written += "runs/quick with --quick, runs/sample with --sample)"
    flags.add_argument("--output-dir", **folder, help=written)
    logged = "with --train: where learning curves and figures go for TensorBoard, too"
    flags.add_argument("--logdir", **folder, help=logged)
    return flags


def parse(flags, argv=None):
    """Parses the command line and makes sure that the output directory can be written. Raises `UserError`.

    The `argparse.Namespace` also has `command`, the command line as one would type it again.
    """
    arguments = flags.parse_args(argv)
    if arguments.output_dir is None:
        folder = "runs/quick" if arguments.quick else "runs/sample" if arguments.sample else "."
        arguments.output_dir = (REPOSITORY / folder).resolve()
    if arguments.resume and arguments.load:
        raise UserError("--resume continues a training run, but --load never trains; leave one of them out")
    for flag, given in (("--devices", arguments.devices > 1), ("--logdir", arguments.logdir is not None)):
        if given and not arguments.train:
            raise UserError(f"{flag} is about the training runs of --train; add --train or leave it out")
    if arguments.logdir and not importlib.util.find_spec("tensorboard"):
        raise UserError("--logdir needs TensorBoard; install it with: pip install tensorboard==2.21.0")
    if arguments.record and not arguments.load:
        raise UserError("--record writes down what --load measures; add --load or leave it out")
    if arguments.record and arguments.quick:
        raise UserError("--quick measures a few images only, which --record must not write down; leave one of them out")
    models = arguments.output_dir / "saved_models"
    if arguments.record and not models.is_dir():  # `--load` reads the models of the repository then
        raise UserError(f"--record writes onto the cards in {models}, which is missing; choose another --output-dir")
    changed = arguments.epochs or arguments.batch_size or getattr(arguments, "model", None)
    if arguments.experiments and changed and not arguments.quick:
        raise UserError("--experiments has a plan of its own; leave --epochs, --batch-size and --model out")
    if (arguments.epochs or arguments.batch_size) and arguments.load:
        raise UserError("--epochs and --batch-size are about training runs, but --load never trains; leave them out")
    if arguments.data_dir.exists() and not arguments.data_dir.is_dir():
        raise UserError(f"--data-dir {arguments.data_dir} is a file; name the folder that holds the datasets")
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else map(str, argv))])
    for folder in filter(None, (arguments.output_dir, arguments.logdir)):
        check_writable(folder)
    for folder in ("saved_models", "report", f"runs/{Path(flags.prog).stem}"):
        remove_leftovers(arguments.output_dir / folder)
    return arguments


def with_flags(config, arguments):
    """Returns `config`, a dataclass with `epochs` and `batch_size`, with what the command line changes."""
    return dataclasses.replace(
        config,
        epochs=arguments.epochs or (1 if arguments.quick else config.epochs),
        batch_size=arguments.batch_size or config.batch_size,
    )


def number(kind, low, high):
    """Returns the type of a flag that takes a number from `low` to `high`; `kind` is int or float."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        words = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {words} from {low} to {high}")

    return convert


@contextlib.contextmanager
def silent_stderr():
    """Keeps off the screen what is written to standard error, also by C code. Yields the descriptor of the screen."""
    screen, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield screen
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(null)


def run(main, argv=None):
    """Runs `main(argv)` and ends the process with the exit code that it returns (None is 0).

    A `UserError` becomes one line on standard error and exit code 2, Ctrl-C one line and 130. Every other exception is
    a bug and keeps its traceback.
    """
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its warnings about tracing help no user
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not end a training run
    interrupted = []

    def interrupt(*received):
        interrupted.append(received)
        raise KeyboardInterrupt

    if argv is None:  # the process is ours; within a test the handler is not
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except BaseException as error:  # TensorFlow and JAX wrap the KeyboardInterrupt of a callback in errors of their own
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        print("error: interrupted; what was saved stays, continue with --resume", file=sys.stderr)
        code = INTERRUPTED
    if code and "KERAS_DISTRIBUTION_PROCESS_ID" in os.environ:  # JAX would wait for processes that wait for this one
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)
