"""A run of stages: what is done again, what is not, and what a plan says."""

import json
import shutil

import pytest

from w2s_jax.errors import InputError
from w2s_jax.reasoning import stages
from w2s_jax.reasoning.stages import BEGUN, DONE, Stage, content_digest, plan_stages, run_stages
from w2s_jax.text.rows import locked


class Chain:
    """Three stages: `a` reads a file, `b` reads a, `c` reads a and b; counts what was run."""

    def __init__(self, tmp_path, *, scale=1, fail=None):
        self.root, self.source = tmp_path / "run", tmp_path / "numbers.txt"
        if not self.source.exists():
            self.source.write_text("3")
        self.ran, self.scale, self.fail = [], scale, fail

    def stages(self):
        def step(name, make):
            def work(folder):
                self.ran.append(name)
                (folder / "scratch").write_text("half")
                if self.fail == name:
                    raise KeyboardInterrupt
                (folder / "out").write_text(str(make()))
                return {"value": make()}

            return work

        def value(name):
            return int((self.root / name / "out").read_text())

        out = ("out",)
        number = step("a", lambda: int(self.source.read_text()))
        scaled = step("b", lambda: value("a") % 100 * self.scale)
        total = step("c", lambda: value("a") + value("b"))
        return [
            Stage("a", number, out, reads=(self.source,)),
            Stage("b", scaled, out, {"scale": self.scale}, after=("a",)),
            Stage("c", total, out, after=("a", "b")),
        ]

    def run(self, **options):
        self.ran.clear()
        return {k: v["value"] for k, v in run_stages(self.stages(), self.root, **options).items()}

    def plan(self, **options):
        return {p.stage.name: p.state for p in plan_stages(self.stages(), self.root, **options)}


def test_what_is_done_is_not_done_again(tmp_path):
    chain = Chain(tmp_path)
    assert set(chain.plan().values()) == {"to do"}
    assert not chain.root.exists()
    assert chain.run() == {"a": 3, "b": 3, "c": 6}
    assert chain.ran == ["a", "b", "c"]
    assert chain.run() == {"a": 3, "b": 3, "c": 6}
    assert chain.ran == []
    assert set(chain.plan().values()) == {"done"}


def test_a_changed_input_redoes_what_depends_on_it(tmp_path):
    Chain(tmp_path).run()
    chain = Chain(tmp_path, scale=5)
    assert chain.plan() == {"a": "done", "b": "changed", "c": "changed"}
    assert chain.run() == {"a": 3, "b": 15, "c": 18}
    assert chain.ran == ["b", "c"]
    chain.source.write_text("4")
    assert chain.run() == {"a": 4, "b": 20, "c": 24}
    assert chain.ran == ["a", "b", "c"]


def test_a_stage_that_writes_the_same_again_leaves_what_depends_on_it(tmp_path):
    chain = Chain(tmp_path)
    chain.run()
    shutil.rmtree(chain.root / "b")
    chain.run()
    assert chain.ran == ["b"]


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_a_stage_that_was_cut_off_goes_on_in_its_folder(tmp_path, stage):
    chain = Chain(tmp_path, fail=stage)
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    chain = Chain(tmp_path)
    assert chain.plan()[stage] == "goes on"
    kept = chain.root / stage / "kept"
    kept.write_text("work that goes on")
    assert chain.run() == {"a": 3, "b": 3, "c": 6}
    assert chain.ran[0] == stage
    assert kept.exists()


def test_work_on_other_inputs_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Chain(tmp_path, fail="b").run()
    chain = Chain(tmp_path, scale=7)
    stale = chain.root / "b" / "stale"
    stale.write_text("of scale 1")
    assert chain.run()["b"] == 21
    assert not stale.exists()


@pytest.mark.parametrize("harm", ["remove", "change"])
def test_outputs_that_are_gone_or_changed_are_made_anew(tmp_path, harm):
    chain = Chain(tmp_path)
    chain.run()
    output = chain.root / "a" / "out"
    if harm == "remove":
        output.unlink()
    else:
        output.write_text("30")
    assert chain.plan()["a"] == "changed"
    assert chain.run() == {"a": 3, "b": 3, "c": 6}
    assert chain.ran == ["a"]


def test_a_touched_output_is_compared_by_content(tmp_path):
    chain = Chain(tmp_path)
    chain.run()
    output = chain.root / "a" / "out"
    output.write_text(output.read_text())
    chain.run()
    assert chain.ran == []


def test_a_part_of_the_stages(tmp_path):
    chain = Chain(tmp_path)
    with pytest.raises(InputError, match="stage b reads what a writes, which is not done"):
        chain.run(first="b")
    with pytest.raises(InputError, match="stage b reads what a writes, which is not done"):
        chain.plan(first="b")
    assert chain.run(last="a") == {"a": 3}
    assert chain.plan(first="b", last="b") == {"a": "left out", "b": "to do", "c": "left out"}
    assert chain.run(first="b", last="b") == {"a": 3, "b": 3}
    chain.source.write_text("50")
    assert chain.run(first="b") == {"a": 3, "b": 3, "c": 6}  # a is taken as it is
    with pytest.raises(InputError, match="no stage 'd'; there are a, b, c"):
        chain.run(last="d")
    with pytest.raises(InputError, match="stage c comes after a"):
        chain.run(first="c", last="a")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    chain = Chain(tmp_path)
    (chain.root / "b").mkdir(parents=True)
    (chain.root / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds files of something else"):
        chain.run()
    assert (chain.root / "b" / "thesis.txt").exists()


def test_missing_files_and_damaged_records_are_told_in_one_line(tmp_path):
    chain = Chain(tmp_path)
    chain.source.unlink()
    with pytest.raises(InputError, match=r"numbers.txt: not found; stage a reads it"):
        run_stages(chain.stages(), chain.root)
    chain.source.write_text("1")
    chain.run()
    (chain.root / "a" / DONE).write_text("{")
    with pytest.raises(InputError, match="delete the folder to redo"):
        chain.run()


def test_a_stage_that_does_not_write_what_it_declares_is_a_fault(tmp_path):
    stage = Stage("a", lambda folder: {}, ("out",))
    with pytest.raises(RuntimeError, match="has not written out"):
        run_stages([stage], tmp_path)
    assert json.loads((tmp_path / "a" / BEGUN).read_text())["inputs"]
    assert not (tmp_path / "a" / DONE).exists()


def test_digests_see_names_and_bytes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("1")
    before = content_digest(folder)
    (folder / "x").rename(folder / "y")
    assert content_digest(folder) != before
    (folder / "y").rename(folder / "x")
    assert content_digest(folder) == before
    (folder / "x").write_text("2")
    assert content_digest(folder) != before


def test_a_kill_while_old_work_is_removed_is_gone_on_from(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Chain(tmp_path, fail="b").run()
    (tmp_path / "run" / "b" / "zz").write_text("more")

    class Killed(BaseException):
        pass

    def remove(path, before=stages._remove):
        before(path)
        raise Killed

    chain = Chain(tmp_path, scale=2)
    monkeypatch.setattr(stages, "_remove", remove)
    for _ in range(2):
        with pytest.raises(Killed):
            chain.run()
    monkeypatch.undo()
    (tmp_path / "run" / "b" / BEGUN).unlink(missing_ok=True)
    (tmp_path / "run" / "b" / f"{BEGUN}.part").write_text("{")
    assert chain.run() == {"a": 3, "b": 6, "c": 9}


def test_two_runs_in_one_folder_are_refused(tmp_path):
    chain = Chain(tmp_path)
    with locked(chain.root / "stages"), pytest.raises(InputError, match="another run is writing"):
        chain.run()
    assert chain.run()["c"] == 6


@pytest.mark.parametrize("record", [DONE, BEGUN])
@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_record_of_another_form_is_told(tmp_path, record, content):
    chain = Chain(tmp_path)
    chain.run(last="a")
    (chain.root / "a" / record).write_text(content)
    if record == BEGUN:
        (chain.root / "a" / DONE).unlink()
    with pytest.raises(InputError, match="not the record of a stage"):
        chain.run()


def test_a_file_that_many_stages_read_is_hashed_once(tmp_path, monkeypatch):
    source = tmp_path / "numbers.txt"
    source.write_text("3")
    hashed = []

    def digest(path, before=stages.content_digest):
        hashed.append(path)
        return before(path)

    def work(folder):
        (folder / "out").write_text("x")
        return {}

    monkeypatch.setattr(stages, "content_digest", digest)
    many = [Stage(name, work, ("out",), reads=(source,)) for name in "abcd"]
    run_stages(many, tmp_path / "run")
    assert hashed.count(source) == 1
    before = json.loads((tmp_path / "run" / "d" / DONE).read_text())["inputs"]

    def change(folder):
        source.write_text("4444")
        return work(folder)

    many[0] = Stage("a", change, ("out",), {"changed": True}, reads=(source,))
    run_stages(many, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "d" / DONE).read_text())["inputs"] != before


def test_a_fault_in_a_stage_names_it(tmp_path):
    def work(folder):
        raise InputError("nothing is left")

    with pytest.raises(InputError, match=r"^stage a: nothing is left$"):
        run_stages([Stage("a", work, ("out",))], tmp_path)
