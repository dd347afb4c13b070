"""Flags, exit codes, and what a process prints when it cannot go on."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from common import cli


def flags():
    return cli.parser("what it does", ["small", "large"])


def test_parse_reads_the_shared_flags(tmp_path):
    arguments = cli.parse(flags(), ["--train", "--model", "small", "--epochs", "3", "--output-dir", str(tmp_path)])
    assert arguments.train
    assert not arguments.load
    assert (arguments.model, arguments.epochs, arguments.seed) == ("small", 3, 0)
    assert arguments.output_dir == tmp_path
    assert arguments.command.endswith(f"--train --model small --epochs 3 --output-dir {tmp_path}")


def test_quick_and_sample_write_into_folders_of_their_own():
    assert cli.parse(flags(), ["--load", "--quick"]).output_dir == cli.REPOSITORY / "runs" / "quick"
    assert cli.parse(flags(), ["--load", "--sample"]).output_dir == cli.REPOSITORY / "runs" / "sample"
    assert cli.parse(flags(), ["--train", "--quick", "--sample"]).output_dir == cli.REPOSITORY / "runs" / "quick"
    assert cli.parse(flags(), ["--load"]).output_dir == cli.REPOSITORY


def test_data_dir_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert cli.parse(flags(), ["--load"]).data_dir == tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --train --load --experiments is required"),
        (["--train", "--load"], "not allowed with"),
        (["--load", "--modle", "small"], "unrecognized arguments: --modle"),
        (["--train", "--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--train", "--epochs", "0"], "'0' is not a whole number from 1 to"),
        (["--train", "--epochs", "many"], "'many' is not a whole number"),
        (["--train", "--epochs", "1000000000"], "is not a whole number from 1 to"),
        (["--train", "--batch-size", "1" + 5000 * "0"], "is not a whole number from 1 to"),
        (["--train", "--model", "medium"], "invalid choice: 'medium'"),
        (["--train", "--seed", "-1"], "'-1' is not a whole number from 0 to 2147483647"),
        (["--load", "--resume"], "--load never trains"),
        (["--load", "--epochs", "2"], "--load never trains"),
        (["--load", "--batch-size", "2"], "--load never trains"),
        (["--load", "--record", "--output-dir", "nowhere"], "--record writes onto the cards in nowhere"),
        (["--train", "--devices", "0"], "'0' is not a whole number from 1 to"),
        (["--load", "--devices", "2"], "--devices is about the training runs of --train"),
        (["--experiments", "--logdir", "logs"], "--logdir is about the training runs of --train"),
        (["--train", "--record"], "--record writes down what --load measures"),
        (["--load", "--record", "--quick"], "--quick measures a few images only"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(argv, message):
    with pytest.raises(cli.UserError, match=message.replace("(", r"\(")):
        cli.parse(flags(), argv)


def test_logdir_without_tensorboard_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match="pip install tensorboard"):
        cli.parse(flags(), ["--train", "--logdir", str(tmp_path)])


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "20.1", "much"])
def test_real_numbers_have_a_range(text):
    convert = cli.number(float, 0, 20)
    assert convert("1.5") == 1.5
    with pytest.raises(cli.argparse.ArgumentTypeError, match="is not a number from 0 to 20"):
        convert(text)


def test_output_dir_that_cannot_be_written_is_said_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.UserError, match="choose another --output-dir"):
        cli.parse(flags(), ["--train", "--output-dir", str(tmp_path / "file")])


def test_data_dir_that_is_a_file_is_called_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.UserError, match="is a file; name the folder"):
        cli.parse(flags(), ["--train", "--data-dir", str(tmp_path / "file"), "--output-dir", str(tmp_path)])


def test_run_prints_one_line_and_exits_with_2(capsys):
    def fail(argv):
        raise cli.UserError("the disk is full;\nfree some space")

    with pytest.raises(SystemExit) as stop:
        cli.run(fail, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full; free some space\n"


def test_run_passes_the_exit_code_on():
    cli.run(lambda argv: 0, [])
    cli.run(lambda argv: None, [])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda argv: 1, [])
    assert stop.value.code == 1


def test_run_leaves_bugs_their_traceback():
    def fail(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(fail, [])


def test_interrupt_exits_with_130(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(interrupt, [])
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().err


def process(code, **environment):
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, text=True, **pipes)


def test_ctrl_c_that_a_library_wraps_in_an_error_of_its_own_is_one_line():
    code = """
from common import cli
def main(argv):
    print("ready", flush=True)
    try:
        import time; time.sleep(60)
    except KeyboardInterrupt as error:
        raise RuntimeError("callback failed") from error
cli.run(main)
"""
    running = process(code)
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors.splitlines() == ["error: interrupted; what was saved stays, continue with --resume"]


def test_ctrl_c_while_keras_is_imported_is_one_line():
    running = process("print('ready', flush=True)\nfrom common import startup", KERAS_BACKEND="tensorflow")
    assert running.stdout.readline() == "ready\n"
    loaded = Path(f"/proc/{running.pid}/maps")
    # However busy the machine is; the file of a process that has ended is empty.
    while running.poll() is None and loaded.exists() and "libtensorflow" not in loaded.read_text():
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.splitlines() == ["error: interrupted while starting"]


def test_unknown_backend_is_one_line():
    _, errors = (running := process("from common import startup", KERAS_BACKEND="theano")).communicate(timeout=60)
    assert running.returncode == 2
    assert errors.splitlines() == [
        "error: the Keras backend 'theano' is not supported; set KERAS_BACKEND to tensorflow or jax"
    ]


STARTS_TRAINING = "import sys; sys.argv.append('--train'); from common import startup"
ADDRESS, COUNT, NUMBER = (f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"))


@pytest.mark.parametrize(
    ("environment", "trouble"),
    [
        ({"KERAS_BACKEND": "tensorflow", "TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, "under TensorFlow"),
        ({"KERAS_BACKEND": "tensorflow", ADDRESS: "localhost:1", COUNT: "2", NUMBER: "0"}, "under TensorFlow"),
        ({"KERAS_BACKEND": "jax", ADDRESS: "localhost:1"}, f"({COUNT!r})"),
        ({"KERAS_BACKEND": "jax", ADDRESS: "localhost:one", COUNT: "2", NUMBER: "0"}, "'one'"),
        ({"KERAS_BACKEND": "jax", ADDRESS: "localhost:1", COUNT: "2", NUMBER: "2"}, "process_id=2, num_processes=2"),
    ],
)
def test_several_processes_that_cannot_start_are_one_line(environment, trouble):
    _, errors = (running := process(STARTS_TRAINING, **environment)).communicate(timeout=60)
    assert running.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert trouble in line
    assert "README.md" in line


def test_a_process_whose_port_is_taken_is_one_line():
    with socket.create_server(("", 0)) as server:
        where = {ADDRESS: f"localhost:{server.getsockname()[1]}", COUNT: "2", NUMBER: "0"}
        _, errors = (running := process(STARTS_TRAINING, KERAS_BACKEND="jax", **where)).communicate()
    assert running.returncode == 2
    assert errors.count("\n") == 1
    assert "Address already in use" in errors


def test_a_closed_pipe_ends_silently():
    running = process("from common import cli\ncli.run(lambda argv: [print('x' * 1000) for _ in range(10000)] and 0)")
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait() == 141


def test_a_terminal_without_unicode_does_not_end_a_run():
    running = process("from common import cli\ncli.run(lambda argv: print('30° ±'))", PYTHONIOENCODING="ascii")
    output, errors = running.communicate(timeout=30)
    assert (running.returncode, errors) == (0, "")
    assert output == "30\\xb0 \\xb1\n"


def test_the_command_line_changes_a_config_where_it_says_so():
    @dataclasses.dataclass(frozen=True)
    class Config:
        epochs: int = 7
        batch_size: int = 64

    def changed(*argv):
        return cli.with_flags(Config(), cli.parse(cli.parser("", ["a"]), ["--train", *argv]))

    assert changed() == Config()
    assert changed("--quick") == Config(epochs=1)
    assert changed("--quick", "--epochs", "3", "--batch-size", "8") == Config(3, 8)
