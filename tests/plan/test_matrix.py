"""The matrix of plans with a stand-in for the compiler: cells, files, and going on."""

import json

import pytest

from tests.plan.test_planning import Compiler
from w2s_jax.cli.main import main
from w2s_jax.errors import InputError
from w2s_jax.plan.matrix import Cell, cells, open_records, plan_cell, plan_cells, settings_of
from w2s_jax.plan.meshes import candidates
from w2s_jax.plan.planning import Trying
from w2s_jax.plan.topology import chip_of
from w2s_jax.text.rows import locked

HERE = "Compiled with jax 1, libtpu 2."
MADE = (HERE, settings_of(1))


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
    with pytest.raises(InputError, match="--only 'v5e,search,lora': no cell; lora and full are of"):
        cells("v5e,search,lora")


@pytest.mark.parametrize("devices", [4, 16, 64])
def test_one_example_for_each_device_at_a_time_or_for_four(devices):
    shapes, shared = Cell("v5e", "8B", "sft", "full").shapes(devices)
    assert shapes.rows == shared.rows == max(16, devices)
    assert shapes.rows == shapes.accumulate * devices
    assert shared.rows == shared.accumulate * devices / 4
    assert shapes.lora is None
    assert Cell("v5e", "8B", "dpo", "lora").shapes(devices)[0].objective == "dpo"


def test_a_device_alone_shares_no_example():
    (shapes,) = Cell("v5e", "8B", "sft", "lora").shapes(1)
    assert (shapes.rows, shapes.accumulate) == (16, 16)


def test_small_slices_are_passed_over_and_said_so():
    compiler = Compiler()
    row = plan_cell(Cell("v5e", "8B", "sft", "full"), trying(compiler))
    # 12 bytes a parameter alone are more than eight chips have.
    assert row.plan.topology == "v5e:4x4"
    refused = ["v5e:1x1", *2 * ["v5e:2x2"], *2 * ["v5e:2x4"]]
    assert [topology for topology, _ in row.refused] == refused
    assert all("GiB" in why for _, why in row.refused), row.refused
    assert row.rows == 16
    assert [topology for topology, _ in compiler.seen] == ["v5e:4x4"]
    assert row.as_row()["plan"]["mesh"] == row.plan.mesh


def test_a_slice_is_refused_by_the_mesh_that_needs_least(monkeypatch):
    monkeypatch.setattr("w2s_jax.plan.matrix.topologies", lambda family: ["v6e:2x4"])
    cell = Cell("v6e", "70B", "sft", "full")
    row = plan_cell(cell, trying(Compiler()))
    # 12 bytes of 70.6e9 parameters over eight chips; split over the four of tensor=4, twice that.
    tried = candidates(cell.shapes(8)[1], chip_of("v6e:2x4"), 8)
    judged = [one for one in tried if one.resident_bytes]
    least, most = (pick(one.resident_bytes for one in judged) / 2**30 for pick in (min, max))
    assert 98 < least < 99.5 < most
    assert f": holds {least:.1f} GiB" in dict(row.refused)["v6e:2x4"]


def test_a_cell_that_fits_no_slice(monkeypatch):
    monkeypatch.setattr("w2s_jax.plan.matrix.topologies", lambda family: ["v6e:1x1", "v6e:2x4"])
    row = plan_cell(Cell("v6e", "8B", "dpo", "full"), trying(Compiler(beside=1000)))
    assert row.plan is None
    assert len(row.refused) == 1 + 2
    assert "takes 10" in row.refused[-1][1]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    order, asked = cells(), cells("v5e,8B,sft,dpo,lora")
    table, figures = tmp_path / "plans.md", tmp_path / "plans.json"

    def run(compiler, count):
        records = open_records(table, figures, *MADE)
        lacking = [cell for cell in asked if records.lacks(cell)]
        failed = plan_cells(lacking[:count], trying(compiler), lambda row: records.keep(row, order))
        return [cell.name for cell in lacking], failed

    names = [cell.name for cell in asked]
    assert run(Compiler(), 1) == (names, [])
    first = table.read_text()
    assert run(Compiler(), 9) == (names[1:], [])
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
        open_records(path, None, *MADE)
    with pytest.raises(InputError, match="not figures of"):
        open_records(None, path, *MADE)
    path.unlink()
    records = open_records(path, None, *MADE)
    records.keep(plan_cell(Cell("v5p", "8B", "sft", "full"), trying(Compiler())), cells())
    message = "compiled with jax 1, libtpu 2, and here is jax 1, libtpu 3; name another file"
    with pytest.raises(InputError, match=message):
        open_records(path, None, HERE.replace("libtpu 2", "libtpu 3"), MADE[1])


@pytest.mark.parametrize("kind", ["table", "figures"])
def test_rows_of_other_settings_are_refused(tmp_path, kind):
    path = tmp_path / "plans"
    files = (path, None) if kind == "table" else (None, path)
    cell = Cell("v5p", "8B", "sft", "full")
    open_records(*files, *MADE).keep(plan_cell(cell, trying(Compiler())), cells())
    assert not open_records(*files, *MADE).lacks(cell)
    for other in (settings_of(2), MADE[1].replace("16 prompts", "8 prompts")):
        with pytest.raises(InputError, match="planned with other settings, or with another --try"):
            open_records(*files, HERE, other)


def test_rows_that_are_cut_are_planned_again(tmp_path):
    table, figures = tmp_path / "plans.md", tmp_path / "plans.json"
    cell = Cell("v5p", "8B", "sft", "full")
    open_records(table, figures, *MADE).keep(plan_cell(cell, trying(Compiler())), cells())
    whole = table.read_text()
    assert not open_records(table, figures, *MADE).lacks(cell)
    table.write_text(whole.rstrip("\n").rpartition(" | ")[0] + " |\n")
    assert open_records(table, figures, *MADE).lacks(cell)
    table.write_text(whole)
    found = json.loads(figures.read_text())
    del found["rows"][0]["plan"]
    figures.write_text(json.dumps(found))
    assert open_records(table, figures, *MADE).lacks(cell)


@pytest.mark.parametrize(
    "content",
    [
        b'{"compiler": 5, "rows": []}',
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"rows": {}}',
        b'{"compiler": "a\\nb", "rows": []}',
    ],
)
def test_what_is_neither_table_nor_figures(tmp_path, content):
    path = tmp_path / "plans"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plans: not figures of `w2s plan matrix`; name another"):
        open_records(None, path, *MADE)
    with pytest.raises(InputError, match=r"plans: not a table of `w2s plan matrix`; name another"):
        open_records(path, None, *MADE)


@pytest.fixture
def without_compiler(monkeypatch):
    """`w2s plan matrix` where no cell is planned, so that no compiler is needed."""
    asked = []

    def plan_none(cells, trying, keep):
        asked.append(len(cells))
        return []

    monkeypatch.setattr("w2s_jax.plan.matrix.check_compiler", lambda family: None)
    monkeypatch.setattr("w2s_jax.plan.matrix.compiler_of", lambda: HERE)
    monkeypatch.setattr("w2s_jax.plan.matrix.plan_cells", plan_none)
    return asked


@pytest.mark.parametrize("flag", ["--out", "--json"])
def test_one_run_writes_a_file_at_a_time(tmp_path, capsys, flag, without_compiler):
    path = tmp_path / "plans"
    with locked(path):
        assert main(["plan", "matrix", f"{flag}={path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: another run is writing this output")
    assert error.count("\n") == 1
    assert without_compiler == []
    assert main(["plan", "matrix", f"{flag}={path}"]) == 0
    assert without_compiler == [30]
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_locked_while_cells_are_planned(tmp_path, monkeypatch, without_compiler):
    files = [tmp_path / "plans.md", tmp_path / "plans.json"]

    def plan_cells(asked, trying, keep):
        for path in files:
            with pytest.raises(InputError, match="another run"), locked(path):
                pass
        without_compiler.append("locked")
        return []

    monkeypatch.setattr("w2s_jax.plan.matrix.plan_cells", plan_cells)
    assert main(["plan", "matrix", f"--out={files[0]}", f"--json={files[1]}"]) == 0
    assert without_compiler == ["locked"]


def test_two_kinds_are_not_written_to_one_file(tmp_path, capsys, without_compiler):
    assert main(["plan", "matrix", f"--out={tmp_path}/a", f"--json={tmp_path}/b/../a"]) == 2
    assert "--out and --json are both" in capsys.readouterr().err
    assert without_compiler == []


def test_wrong_words(capsys):
    assert main(["plan", "matrix", "--only=v5e,9B"]) == 2
    assert "no word '9B'" in capsys.readouterr().err
