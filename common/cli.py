"""The flags every script has, seeding, and how a script ends when something is wrong that the user can mend."""

import argparse
import dataclasses
import logging
import os
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A failure that the user can mend. Its text is one line: what happened; what to do."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the scripts."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def parser(description, models):
    """Returns the argument parser with the flags that all scripts share, in the order all scripts share.

    Args:
        description: str, what the script does; shown by `--help` as it is written.
        models: list of str, the names `--model` accepts. A script with a single model gets no `--model` flag.

    Returns:
        `argparse.ArgumentParser`, to which a script may add flags of its own before it calls `parse`. Its attribute
        `modes` is the group of which exactly one flag is given: a script may add to that, too.
    """
    flags = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    mode = flags.modes = flags.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="build, fit, save, evaluate, write figures and results")
    mode.add_argument(
        "--load", action="store_true", help="restore from saved_models/, evaluate, write the same figures"
    )
    mode.add_argument("--experiments", action="store_true", help="the comparison behind the choices; can be resumed")
    if len(models) > 1:
        flags.add_argument("--model", choices=models, help="one of the models (default: all)")
    flags.add_argument("--quick", action="store_true", help="a few batches into runs/quick/: proves that it works")
    flags.add_argument("--epochs", type=positive, metavar="N", help="passes over the training set")
    flags.add_argument("--batch-size", type=positive, metavar="N", help="examples per optimisation step")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    flags.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stopped --train")
    flags.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", REPOSITORY / "data")),
        metavar="DIR",
        help="where datasets are kept (default: $DATA_DIR, else data)",
    )
    flags.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where everything is written, and read by --load (default: the repository; runs/quick with --quick)",
    )
    return flags


def parse(flags, argv=None):
    """Parses the command line.

    Args:
        flags: what `parser` returned.
        argv: list of str, or None for the command line of the process.

    Returns:
        `argparse.Namespace` with one attribute per flag, `output_dir` resolved, and `command`, the command line
        as one would type it again (str).

    Raises:
        UserError: on an unknown flag or a value that makes no sense.
    """
    arguments = flags.parse_args(argv)
    if arguments.output_dir is None:
        arguments.output_dir = REPOSITORY / "runs" / "quick" if arguments.quick else REPOSITORY
    if arguments.resume and arguments.load:
        raise UserError("--resume goes on with a training, --load never trains; leave one of them out")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is out of range; choose one from 0 to {2**32 - 1}")
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else argv)])
    return arguments


def with_flags(recipe, arguments):
    """Returns `recipe`, a dataclass with `epochs` and `batch_size`, with what the command line changes."""
    return dataclasses.replace(
        recipe,
        epochs=arguments.epochs or (1 if arguments.quick else recipe.epochs),
        batch_size=arguments.batch_size or recipe.batch_size,
    )


def positive(text):
    """The type of a flag that takes a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def run(main, argv=None):
    """Runs `main(argv)` and ends the process: exit code 0, 2 for an error the user can mend, 130 for Ctrl-C.

    A `UserError` becomes one line on standard error, without a traceback. Every other exception is a bug and
    keeps its traceback.
    """
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its warnings about tracing help nobody here
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; what was saved stays, go on with --resume", file=sys.stderr)
        sys.exit(130)
