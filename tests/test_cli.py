import dataclasses

import pytest

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


def test_quick_writes_into_its_own_folder():
    assert cli.parse(flags(), ["--load", "--quick"]).output_dir == cli.REPOSITORY / "runs" / "quick"
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
        (["--train", "--epochs", "0"], "0 is not a positive number"),
        (["--train", "--epochs", "many"], "invalid"),
        (["--train", "--model", "medium"], "invalid choice: 'medium'"),
        (["--train", "--seed", "-1"], "--seed -1 is out of range"),
        (["--load", "--resume"], "--load never trains"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(argv, message):
    with pytest.raises(cli.UserError, match=message.replace("(", r"\(")):
        cli.parse(flags(), argv)


def test_run_prints_one_line_and_exits_with_2(capsys):
    def fail(argv):
        raise cli.UserError("the disk is full; free some space")

    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full; free some space\n"


def test_run_leaves_bugs_their_traceback():
    def fail(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(fail)


def test_interrupt_exits_with_130(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(interrupt)
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().err


def test_the_command_line_changes_a_recipe_where_it_says_so():
    @dataclasses.dataclass(frozen=True)
    class Recipe:
        epochs: int = 7
        batch_size: int = 64

    def changed(*argv):
        return cli.with_flags(Recipe(), cli.parse(cli.parser("", ["a"]), ["--train", *argv]))

    assert changed() == Recipe()
    assert changed("--quick") == Recipe(epochs=1)
    assert changed("--quick", "--epochs", "3", "--batch-size", "8") == Recipe(3, 8)
