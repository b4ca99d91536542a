"""The matrix of plans with a stand-in for the compiler: cells, files, and going on."""

import json

import pytest

from tests.plan.test_trials import Compiler
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.plan.matrix import Cell, cells, plan_cell, plan_cells
from w2s_jax.plan.records import open_records
from w2s_jax.plan.trials import Trying

HERE = "Compiled with jax 1, libtpu 2."


def trying(compiler):
    return Trying(1, compile_as=compiler)


def test_the_matrix_has_every_cell_once():
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names) == 3 * 2 * (1 + 2 * 2)
    assert {"v5e 8B search", "v6e 70B dpo full"} <= set(names)
    assert [cell.name for cell in cells("v5e,8B,dpo")] == ["v5e 8B dpo lora", "v5e 8B dpo full"]
    assert len(cells("sft,lora")) == 6
    assert len(cells("v5e,v6e,search")) == 4
    with pytest.raises(InputError, match="--only 'v5e,9B': no word '9B'; the words are v5e, v5p"):
        cells("v5e,9B")


@pytest.mark.parametrize("devices", [4, 16, 64])
def test_one_example_for_each_device_at_a_time(devices):
    shapes = Cell("v5e", "8B", "sft", "full").shapes(devices)
    assert shapes.rows == max(16, devices)
    assert shapes.rows == shapes.accumulate * devices
    assert shapes.lora is None
    assert Cell("v5e", "8B", "dpo", "lora").shapes(devices).objective == "dpo"


def test_small_slices_are_passed_over_and_said_so():
    compiler = Compiler()
    row = plan_cell(Cell("v5e", "8B", "sft", "full"), trying(compiler))
    # 12 bytes a parameter alone are more than eight chips have.
    assert row.plan.topology == "v5e:4x4"
    assert [topology for topology, _ in row.refused] == ["v5e:2x2", "v5e:2x4"]
    assert [topology for topology, _ in compiler.seen] == ["v5e:4x4"]
    assert row.as_row()["plan"]["mesh"] == row.plan.mesh


def test_a_cell_that_fits_no_slice():
    row = plan_cell(Cell("v6e", "8B", "dpo", "full"), trying(Compiler(beside=1000)))
    assert row.plan is None
    assert len(row.refused) == 7
    assert "takes 10" in row.refused[-1][1]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    order, asked = cells(), cells("v5e,8B,sft,dpo")
    table, figures = tmp_path / "plans.md", tmp_path / "plans.json"

    def run(compiler, count):
        records = open_records(table, figures, HERE)
        lacking = [cell for cell in asked if records.lacks(cell)]
        failed = plan_cells(lacking[:count], trying(compiler), lambda row: records.keep(row, order))
        return [cell.name for cell in lacking], failed

    names = [cell.name for cell in asked]
    assert run(Compiler(), 2) == (names, [])
    first = table.read_text()
    assert run(Compiler(), 9) == (names[2:], [])
    whole = table.read_text()
    assert run(Compiler(), 9) == ([], [])
    assert table.read_text() == whole
    lines = table.read_text().splitlines()
    assert set(first.splitlines()) <= set(lines)
    rows = [line for line in lines if line.startswith("| v5e")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    assert all(row.count(" | ") == lines[lines.index(HERE) + 2].count(" | ") for row in rows)
    assert [row["cell"] for row in json.loads(figures.read_text())["rows"]] == names


def test_a_fault_in_one_cell_leaves_the_others(tmp_path):
    class Faulty(Compiler):
        def __call__(self, shapes, topology, mesh, tell):
            if getattr(shapes, "objective", "") == "sft":
                raise RuntimeError("INTERNAL: a fault\nof the compiler")
            return super().__call__(shapes, topology, mesh, tell)

    kept = []
    asked = cells("v5e,8B,sft,dpo,lora")
    assert plan_cells(asked, trying(Faulty()), kept.append) == ["v5e 8B sft lora"]
    assert [row.cell.name for row in kept] == ["v5e 8B dpo lora"]


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "plans"
    path.write_text("{}")
    with pytest.raises(InputError, match="not a table of"):
        open_records(path, None, HERE)
    with pytest.raises(InputError, match="not figures of"):
        open_records(None, path, HERE)
    path.unlink()
    records = open_records(path, None, HERE)
    records.keep(plan_cell(Cell("v5p", "8B", "sft", "full"), trying(Compiler())), cells())
    message = "compiled with jax 1, libtpu 2, and here is jax 1, libtpu 3; name another file"
    with pytest.raises(InputError, match=message):
        open_records(path, None, HERE.replace("libtpu 2", "libtpu 3"))


def test_wrong_words(capsys):
    assert main(["plan", "matrix", "--only=v5e,9B"]) == 2
    assert "no word '9B'" in capsys.readouterr().err
