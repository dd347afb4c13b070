"""Seeds, comparison with the card, results files and experiment tables."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from PIL import Image

from common import models, results
from common.errors import UserError


def arguments(folder, **changes):
    flags = {"seed": 3, "quick": False, "model": None, "devices": 1, "logdir": None}
    return argparse.Namespace(**{"output_dir": folder, "command": "x"} | flags | changes)


def card(**fields):
    recorded = {"dataset": {"test": 100, "sample": 10, "sha256": "a"}, "model": "cnn"}
    recorded["metrics"] = {"test": {"accuracy": 0.50001, "error": 2.0}, "sample": {"accuracy": 0.6}}
    return {**models.environment(), **recorded, **fields}


def test_training_runs_are_every_model_with_each_of_its_seeds(tmp_path, capsys):
    counts = {"a": 2, "b": 1}
    found = list(results.training_runs("script", arguments(tmp_path), ["a", "b"], counts))
    assert [(model, seed) for model, seed, _ in found] == [("a", 3), ("a", 4), ("b", 3)]
    assert found[1][2] == tmp_path / "runs" / "script" / "a_seed_4"
    assert "training run 3 of 3" in capsys.readouterr().out
    assert len(list(results.training_runs("script", arguments(tmp_path, quick=True), ["a", "b"], counts))) == 2


def test_missing_plots_are_one_line_and_other_import_errors_are_bugs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    assert results.optional_module("plots", "no_such_script") is None
    assert capsys.readouterr().out == "plots/no_such_script.py is missing: figures are skipped\n"
    (tmp_path / "broken_kind").mkdir()
    (tmp_path / "broken_kind" / "script.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        results.optional_module("broken_kind", "script")


def test_metrics_that_differ_are_marked_and_change_the_exit_code(tmp_path, capsys):
    same = {"part": "test", "size": 100, "sha256": "a"}
    rows = results.compare(card(), {"accuracy": 0.5, "error": 2.005, "new": 1}, **same)
    assert [row["agrees"] for row in rows] == [True, False, None]
    assert results.conclude("script", arguments(tmp_path), rows, ["figure.png"]) == 1
    printed = capsys.readouterr().out
    assert "accuracy    0.5000    0.5000  agrees" in printed
    assert "error       2.0050    2.0000  DIFFERS" in printed
    assert "figure.png" in printed
    written = json.loads((tmp_path / "runs" / "script" / "verification.json").read_text())
    assert written["rows"] == rows
    agreeing = results.compare(card(), {"accuracy": 0.5}, **same)
    assert results.conclude("script", arguments(tmp_path), agreeing, []) == 0


def test_another_backend_may_round_differently(tmp_path, capsys):
    same = {"part": "test", "size": 100, "sha256": "a"}
    (row,) = results.compare(card(backend="another"), {"error": 2.005}, **same)
    assert row["agrees"]
    (row,) = results.compare(card(backend="another"), {"error": 2.02}, **same)
    assert row["agrees"] is False
    results.conclude("script", arguments(tmp_path), [row], [])
    assert "differences up to 0.5% are rounding" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_only_bfloat16_is_rounded_differently_by_another_processor(precision, monkeypatch):
    monkeypatch.setattr(models, "fast_precision", lambda: precision)
    (row,) = results.compare(card(hardware="another"), {"error": 2.005}, part="test", size=100, sha256="a")
    assert row["agrees"] is (precision == "mixed_bfloat16")


@pytest.mark.parametrize(
    ("part", "size", "sha256", "compared"),
    [("test", 100, "a", True), ("test", 99, "a", False), ("test", 100, "b", False), ("sample", 10, "b", True)],
)
def test_only_the_same_images_are_compared(part, size, sha256, compared, capsys):
    (row,) = results.compare(card(), {"accuracy": 0.5}, part=part, size=size, sha256=sha256)
    assert (row["recorded"] is not None) is compared
    assert ("not compared" in capsys.readouterr().out) is not compared


@pytest.mark.parametrize(
    ("name", "compared"), [("train_images", True), ("test_images", False), ("train", True), ("test", False)]
)
def test_only_the_checksums_of_the_measured_part_count(name, compared):
    recorded = {"train_images": "a", "test_images": "b"} if "_" in name else {"train": "a", "test": "b"}
    dataset = {"test": 100, "sha256": recorded}
    here = {**recorded, name: "c"}
    (row,) = results.compare(card(dataset=dataset), {"accuracy": 0.5}, part="test", size=100, sha256=here)
    assert (row["recorded"] is not None) is compared


def test_recorded_metrics_replace_those_on_the_card_and_nothing_else(tmp_path):
    path = tmp_path / "model.json"
    fields = {kind: names for kind, names in models.CARD_FIELDS.items() if isinstance(kind, type)}
    before = {name: kind() for kind, names in fields.items() for name in names}
    before |= {"epochs": 1, "seconds": 1.0, "metrics": {"test": {"accuracy": 0.5}}, "dataset": {"test": 100}}
    path.write_text(json.dumps(before))
    results.record_metrics(path.with_suffix(".keras"), sample=(10, {"accuracy": 0.6}))
    after = json.loads(path.read_text())
    assert after["metrics"] == {"test": {"accuracy": 0.5}, "sample": {"accuracy": 0.6}}
    assert after["dataset"] == {"test": 100, "sample": 10}
    assert after["measured_on"] == {"sample": results.conditions()}
    results.record_metrics(path, {"test_images": "b"}, test=(90, {"accuracy": 0.7}))
    recorded = json.loads(path.read_text())
    assert recorded["dataset"] == {"test": 90, "sample": 10, "sha256": {"test_images": "b"}}
    assert recorded["metrics"]["test"] == {"accuracy": 0.7}
    changed = {"metrics", "dataset", "measured_on"}
    assert {key: after[key] for key in after.keys() - changed} == {key: before[key] for key in before.keys() - changed}


def test_metrics_recorded_on_another_machine_than_the_training_run_are_compared_with_that_machine():
    same, metrics = {"size": 10, "sha256": "a"}, {"accuracy": 0.601}
    elsewhere = card(precision="another", measured_on={"sample": results.conditions()})
    (row,) = results.compare(elsewhere, metrics, part="sample", **same)
    assert row["agrees"] is False
    (row,) = results.compare(card(measured_on={"sample": {"backend": "another"}}), metrics, part="sample", **same)
    assert row["agrees"]


def test_results_of_one_model_leave_the_others(tmp_path):
    path = results.write_results("script", arguments(tmp_path), {"models": {"a": {"x": 1}, "b": {"x": 2}}, "test": 1})
    results.write_results("script", arguments(tmp_path, model="b"), {"models": {"b": {"x": 3}}})
    assert json.loads(path.read_text()) == {"models": {"a": {"x": 1}, "b": {"x": 3}}, "test": 1}
    path.write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        results.write_results("script", arguments(tmp_path, model="b"), {"models": {}})


def test_recorded_files_of_the_repository_are_shown_where_the_output_dir_has_none(tmp_path):
    name = "voc_segmentation.json"
    own = tmp_path / "report" / "results" / name
    assert results.recorded_path(arguments(tmp_path, load=True), name) == REPOSITORY / "report" / "results" / name
    assert results.recorded_path(arguments(tmp_path, load=False), name) == own
    own.parent.mkdir(parents=True)
    own.touch()
    assert results.recorded_path(arguments(tmp_path, load=True), name) == own


def test_rows_are_added_and_read_back(tmp_path):
    table = tmp_path / "experiments.csv"
    assert len(results.read_table(table, numbers=["accuracy"], texts=["name"])) == 0
    results.append_row(table, {"name": "a, b", "seed": 0, "widths": (1, 2), "accuracy": 0.5})
    results.append_row(table, {"name": "c", "seed": 1, "widths": (), "accuracy": ""})
    assert table.read_text().splitlines()[1] == '"a, b",0,1 2,0.5'
    read = results.read_table(table, numbers=["accuracy"])
    assert read["name"].tolist() == ["a, b", "c"]
    assert read["accuracy"][0] == 0.5
    assert np.isnan(read["accuracy"][1])
    with pytest.raises(UserError, match="other columns than this version writes"):
        results.append_row(table, {"name": "d"})


@pytest.mark.parametrize(
    "content",
    [b"name,seed,accuracy\na,0,1\nb", b"name,seed,accuracy\na,0,1,2\n", b"", b"\xff\x00\x01", b"name,seed\na,0\n",
     b"name,seed,accuracy\na,0,high\n", b'name,seed,accuracy\n"a,0,1\n'],
)  # fmt: skip
def test_damaged_table_is_a_user_error(content, tmp_path):
    table = tmp_path / "experiments.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .*; move it away to start the experiments over") as error:
        results.read_table(table, numbers=["accuracy"], texts=["name", "seed"])
    assert "\n" not in str(error.value)


def test_finished_runs_are_not_run_again(tmp_path, capsys):
    table = tmp_path / "experiments.csv"
    planned = [{"name": name, "seed": seed} for name in ("a", "b") for seed in (0, 1)]
    for run in results.unfinished(table, planned, limit=3):
        results.append_row(table, {**run, "accuracy": 1.0})
    assert "2 of 4 runs left, about" in capsys.readouterr().out
    assert list(results.unfinished(table, planned)) == [{"name": "b", "seed": 1}]
    assert list(results.unfinished(table, [])) == []


def test_paired_comparison_uses_shared_seeds_and_the_noise_of_the_baseline():
    rows = [("baseline", seed, 0.5 + 0.01 * seed) for seed in range(5)]
    rows += [("better", 3, 0.93), ("better", 4, 0.94), ("same", 0, 0.505), ("same", 1, 0.515)]
    rows += [("unstable", 0, 0.5), ("unstable", 1, 0.91)]
    table = pd.DataFrame(rows, columns=["name", "seed", "accuracy"])
    compared = results.paired_comparison(table, "accuracy")
    assert compared["pairs"].tolist() == [5, 2, 2, 2]
    assert compared["difference"].tolist() == pytest.approx([0, 0.4, 0.005, 0.2])
    assert compared["noise"].tolist() == pytest.approx([np.std([0.0, 0.01, 0.02, 0.03, 0.04], ddof=1)] * 4)
    assert compared["resolved"].tolist() == [False, True, False, False]  # the pairs of the last one differ too much
    single = results.paired_comparison(table[table["seed"] == 0], "accuracy")
    assert single["noise"].isna().all()
    assert not single["resolved"].any()


def test_groups_are_compared_with_their_first_member():
    rows = [("a", 0, 0.5, 1.0), ("a", 1, 0.6, 3.0), ("b", 0, 0.9, 5.0), ("c", 0, np.nan, 7.0), ("d", 0, 0.7, 9.0)]
    table = pd.DataFrame(rows, columns=["name", "seed", "accuracy", "seconds"])
    compared = results.compare_groups(
        table, {"first": ["a", "c", "b"], "second": ["d"], "not run yet": ["e", "a"]}, "accuracy", means=("seconds",)
    )
    assert {title: list(members) for title, members in compared.items()} == {"first": ["a", "b"], "second": ["d"]}
    assert compared["first"]["a"]["values"] == [0.5, 0.6]
    assert compared["first"]["a"]["seconds"] == 2.0
    assert compared["first"]["b"]["difference"] == pytest.approx(0.4)
    assert compared["first"]["b"]["pairs"] == 1


def test_figures_go_to_the_log_folder_too(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "curves.png")
    written = [tmp_path / "curves.png", tmp_path / "results.json"]
    results.conclude("script", arguments(tmp_path, logdir=tmp_path / "logs"), [], written)
    events = accumulators.EventAccumulator(str(tmp_path / "logs" / "script")).Reload()
    assert events.Tags()["tensors"] == ["curves"]
    width, height, png = events.Tensors("curves")[0].tensor_proto.string_val
    assert (width, height) == (b"4", b"3")
    assert png.startswith(b"\x89PNG")
