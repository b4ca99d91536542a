import json
import sys

import pytest

from w2s_jax.cli.main import COMMANDS, main
from w2s_jax.cli.plot import Plot
from w2s_jax.errors import InputError
from w2s_jax.train.curves import choose_panels, draw, read_run, run_names

PREFERENCES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def write_run(folder, *, names=("loss", "grad_norm", "learning_rate"), steps=(10, 20, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": s, "seconds": s / 10} | {name: 1 / (s + i) for i, name in enumerate(names)}
        for s in steps
    ]
    rows.append({"step": 30, "seconds": 3.1, "eval/loss": 0.5, "eval/openings": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def size_of(png):
    """(width, height) from the header of a PNG."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_run_is_read_as_curves(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    assert run["loss"] == ([10, 20, 30], [1 / 10, 1 / 20, 1 / 30])
    assert run["eval/loss"] == ([30], [0.5])
    assert "step" not in run


def test_panels_hold_what_the_runs_have_and_evaluations_join_their_metric(tmp_path):
    runs = [read_run(write_run(tmp_path / "a"))]
    assert choose_panels(runs) == {
        "loss": ["loss", "eval/loss"],
        "learning rate": ["learning_rate"],
        "gradient norm": ["grad_norm"],
        "eval/openings": ["eval/openings"],
    }
    runs.append(read_run(write_run(tmp_path / "b", names=PREFERENCES)))
    assert choose_panels(runs)["rewards"] == list(PREFERENCES[:3])
    assert choose_panels(runs)["accuracy"] == ["rewards/accuracies"]
    assert choose_panels(runs, ["seconds"]) == {"seconds": ["seconds"]}
    with pytest.raises(InputError, match=r"--metrics lost: not in these runs; they have seconds, "):
        choose_panels(runs, ["lost"])


def test_runs_of_one_name_are_called_by_their_paths():
    assert run_names(["out/a", "out/b"]) == ["a", "b"]
    assert run_names(["x/run", "y/run"]) == ["x/run", "y/run"]


def test_a_folder_without_metrics_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, ("plot",), ("plot", "Plot", "draw the curves of a run"))
    assert main(["plot", str(tmp_path), "--metrics", "loss"]) == 2
    told = capsys.readouterr().err
    assert told == f"error: {tmp_path}/metrics.jsonl: no rows; name the folder of a training run\n"


def test_curves_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "a")
    Plot((str(first),)).run()
    assert capsys.readouterr().out.strip() == str(first / "curves.png")
    wide, high = size_of(first / "curves.png")
    second = write_run(tmp_path / "b", names=PREFERENCES)
    output = tmp_path / "both.png"
    Plot((str(first), str(second)), output=str(output)).run()
    assert size_of(output) == (wide, high)  # six panels in place of four: three columns, two lines
    Plot((str(first),), output=str(output), metrics=("loss",)).run()
    assert size_of(output)[0] < wide / 2


def test_each_run_has_its_colour_and_evaluations_are_dots(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    kept = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: kept.append(self))
    runs = [read_run(write_run(tmp_path / name)) for name in "ab"]
    draw(runs, ["a", "b"], tmp_path / "x.png")
    loss = kept[0].axes[0]
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["a loss", "a eval/loss", "b loss", "b eval/loss"]
    colours = [line.get_color() for line in loss.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [line.get_marker() for line in loss.lines] == ["None", "o", "None", "o"]
    assert list(loss.lines[0].get_ydata()) == [1 / 10, 1 / 20, 1 / 30]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"pip install 'w2s-jax\[plot\]'"):
        Plot((str(write_run(tmp_path / "a")),)).run()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"step": "x", "loss": 1}', "line 1: step is 'x', no whole number"),
        ('{"step": null, "loss": 1}', "step is None"),
        ('{"step": 1e400, "loss": 1}', "step is inf"),
        ('{"step": 1, "loss": "a"}', "no numbers beside steps"),
        ('{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}', "no numbers beside steps"),
        (f'{{"step": 1, "loss": {"9" * 400}}}', "no numbers beside steps"),
    ],
)
def test_a_file_of_another_kind_is_told(tmp_path, capsys, rows, message):
    (tmp_path / "metrics.jsonl").write_text(rows + "\n")
    assert main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_no_run_at_all_is_told(capsys):
    assert main(["plot"]) == 2
    assert "RUN_DIR is missing" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_drawing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("w2s_jax.train.curves.draw", lambda *args: pytest.fail("was drawn"))
    assert main(["plot", str(write_run(tmp_path / "a")), "--output", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
