"""The stages of a weak-to-strong reasoning run (arXiv 2407.13647), and what each of them does.

Models are trained by `w2s sft` and `w2s dpo`, and answer, in separate processes, so that each has
all of a device's memory. Which stages are run again is decided in `stages.py`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from w2s_jax.errors import InputError
from w2s_jax.models.huggingface import is_adapter, locate
from w2s_jax.reasoning.answers import gold_answer, judged, votes
from w2s_jax.reasoning.config import GenerationConfig, ReasonConfig, SetName, StageTwoConfig
from w2s_jax.reasoning.generation import Answering
from w2s_jax.reasoning.measures import accuracy
from w2s_jax.reasoning.questions import (
    Answers,
    draw_demonstrations,
    read_demonstrations,
    read_questions,
    read_responses,
    solution_text,
    solved_row,
)
from w2s_jax.reasoning.selection import WEIGHT, contrastive_pairs, curate, sft_set
from w2s_jax.reasoning.stages import Figures, Stage
from w2s_jax.reasoning.workers import run_module
from w2s_jax.text.rows import Row, read_jsonl, write_jsonl
from w2s_jax.train.export import weights_identity

RAW, GRADED, TRAINING, DEMONSTRATIONS = (
    "responses.jsonl", "graded.jsonl", "training.jsonl", "demonstrations.jsonl",
)  # fmt: skip
SETS: tuple[SetName, ...] = ("weak", "icl", "hybrid")
MODEL, SAMPLES = "model", "samples"
WEAK, ICL = "weak-responses", "icl-responses"


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run, each made by a method that returns a `Stage`.

    A model has a name, and the stage NAME-model trains it: "weak", "naive", "iteration-1-icl",
    "stage-two-1", "ceiling". "strong", and "weak" if it is not trained, are checkpoints of the
    config.

    Attributes:
        config: The run's config.
        data: The folder of its relative paths.
        root: The folder of its stages.
    """

    config: ReasonConfig
    data: Path
    root: Path

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The files that a run reads, by what they hold.

        Raises:
            InputError: If one is missing.
        """
        config, weak = self.config, self.config.weak
        named = {"questions": config.questions, "test": config.test, "weak train": weak.train}
        named |= {"weak responses": weak.responses, "demonstrations": config.demonstrations.file}
        found = {name: self.data / value for name, value in named.items() if value is not None}
        for name, path in found.items():
            if not path.is_file():
                raise InputError(f"{path}: not found; it is the file of {name}")
        return found

    @cached_property
    def questions(self) -> list[Row]:
        """The strong model's questions."""
        return read_questions(self.files["questions"], ids=self.config.ids)

    @cached_property
    def test(self) -> list[Row]:
        """The test questions with their gold answers."""
        return read_questions(self.files["test"], answers_needed=True)

    @cached_property
    def solved(self) -> list[Row]:
        """The questions on which the weak model is trained; empty if it is not trained."""
        if self.config.weak.train is None:
            return []
        return read_questions(self.files["weak train"], answers_needed=True)

    @cached_property
    def ceiling(self) -> bool:
        """Whether a model is trained on the gold answers of the questions."""
        asked = self.config.ceiling
        return all("answer" in row for row in self.questions) if asked is None else asked

    def place(self, checkpoint: str) -> str:
        """Path of a checkpoint of the config: in the folder of the data, or as it is named."""
        return str(self.data / checkpoint) if (self.data / checkpoint).is_dir() else checkpoint

    @cached_property
    def weights(self) -> Mapping[str, str]:
        """A hash of the weights of each checkpoint from which the run starts, by its name."""
        named = {self.config.strong, self.config.weak.model} - {None}
        return {str(name): weights_identity(locate(self.place(str(name)))) for name in named}

    def stages(self) -> list[Stage]:
        """All stages in order."""
        config, count = self.config, f"{len(self.questions):,}"
        found = []
        if config.weak.train is not None:
            shown = f"{len(self.solved):,}"
            found.append(self._fine_tuned("weak", lambda: self._shown(self.solved), shown))
        found += [self._weak_responses(), self._answers(ICL, "strong", is_shown=True)]
        sources = (WEAK, ICL)
        for i in range(1, config.iterations + 1):
            found.append(self._sets(i, sources))
            found += [self._tuned_on(i, name) for name in self._trained_sets(i)]
            if i < config.iterations:
                models = (f"iteration-{i}-weak", f"iteration-{i}-icl")
                found += [self._answers(f"{model}-responses", model) for model in models]
                sources = (f"{models[0]}-responses", f"{models[1]}-responses")
        if config.stage_two is not None:
            for number in range(1, config.stage_two.rounds + 1):
                found += self._round(config.stage_two, number)
        if config.naive:
            found.append(self._fine_tuned("naive", self._all_weak, count, (WEAK,)))
        if self.ceiling:
            found.append(self._fine_tuned("ceiling", lambda: self._shown(self.questions), count))
        if config.test is not None:
            trained = [one.name.removesuffix("-model") for one in found if one.outputs == (MODEL,)]
            first = [] if config.weak.model is None else ["weak"]
            first += ["strong-icl", "naive"] if config.naive else ["strong-icl"]
            # Once each; the baselines first.
            found += map(self._test, dict.fromkeys([*first, *trained]))
        return found

    def _trained_sets(self, iteration: int) -> tuple[SetName, ...]:
        """The sets of an iteration on which a model is trained: those asked for or needed."""
        needed = set(self.config.sets)
        if iteration < self.config.iterations:
            needed |= {"weak", "icl"}
        elif self.config.stage_two is not None:
            needed.add(self.config.stage_two.start)
        return tuple(name for name in SETS if name in needed)

    # --- Models that are trained ------------------------------------------------------------------

    def _tuned_on(self, iteration: int, name: SetName) -> Stage:
        sets = f"iteration-{iteration}-sets"
        most = len(self.questions) * (2 if name == "hybrid" else 1)
        path = self.root / sets / f"{name}.jsonl"
        model = f"iteration-{iteration}-{name}"
        return self._fine_tuned(model, lambda: read_jsonl(path), f"up to {most:,}", (sets,))

    def _fine_tuned(
        self, model: str, rows: Callable[[], list[Row]], count: str, after: tuple[str, ...] = ()
    ) -> Stage:
        """The strong checkpoint, or the weak one, fine-tuned on rows."""
        start, flags, reads = self.config.strong, self.config.sft, self._reads("questions")
        if model == "weak":
            start, reads = str(self.config.weak.model), self._reads("weak train")
            flags = flags | self.config.weak.sft
        cost = f"1 fine-tuning on {count} rows"
        return self._training("sft", model, rows, flags, cost, start, reads, after)

    def _training(
        self,
        command: str,
        model: str,
        rows: Callable[[], list[Row]],
        flags: Mapping[str, Any],
        cost: str,
        start: str | None,
        reads: tuple[Path, ...] = (),
        after: tuple[str, ...] = (),
    ) -> Stage:
        """A model trained by `w2s COMMAND`, with a config file that is kept beside its rows.

        Args:
            command: sft or dpo.
            model: Name of the trained model.
            rows: Makes the rows of training.
            flags: Flags of the command, by name.
            cost: What a plan says of it.
            start: A checkpoint of the config; None for the model of the last stage in `after`.
            reads: Files that it reads from elsewhere.
            after: Stages whose output it reads.
        """

        def work(folder: Path) -> Figures:
            training = rows()
            write_jsonl(folder / TRAINING, training)
            begins = self._whole(after[-1], folder) if start is None else self.place(start)
            own = {"model": begins, "data": str(folder / TRAINING), "output": str(folder)}
            values = {"seed": self.config.seed, **flags, **own}
            source = folder / f"{command}.yaml"
            source.write_text(yaml.safe_dump(values, sort_keys=False))
            hint = f"see its message; what stands under {command} in the config are its flags"
            run_module("w2s_jax", command, "--config", str(source), hint=hint)
            return {"rows": len(training)}

        weights = None if start is None else self.weights[start]
        told = {"model": start, "weights": weights, "flags": flags, "seed": self.config.seed}
        return Stage(f"{model}-model", work, (MODEL,), told, after, reads, cost)

    def _whole(self, stage: str, folder: Path) -> str:
        """A stage's model to train on; an adapter is merged with its base, in `folder`."""
        trained, merged = self.root / stage / MODEL, folder / "start"
        if not is_adapter(trained):
            return str(trained)
        run_module("w2s_jax", "convert", str(trained), str(merged))
        return str(merged)

    def _shown(self, rows: Iterable[Row]) -> list[Row]:
        """Rows to train on with the gold solutions of questions."""
        return [solved_row(row, self.config.kind) for row in rows]

    def _all_weak(self) -> list[Row]:
        """Rows to train on with all weak responses."""
        graded = _by_id(read_jsonl(self._graded(WEAK)))
        return sft_set(self.questions, graded, [row["id"] for row in self.questions])

    # --- Sets and pairs ---------------------------------------------------------------------------

    def _sets(self, iteration: int, sources: tuple[str, str]) -> Stage:
        def work(folder: Path) -> Figures:
            found = curate(
                self.questions,
                *map(_by_id, self._voted(*sources)),
                iteration=iteration,
                published=self.config.published,
                sources=(self._graded(sources[0]), self._graded(sources[1])),
            )
            for name in SETS:
                write_jsonl(folder / f"{name}.jsonl", getattr(found, name))
            return found.as_row()

        outputs = tuple(f"{name}.jsonl" for name in SETS)
        rules = {"published": self.config.published, **self._grading()}
        name, reads = f"iteration-{iteration}-sets", self._reads("questions")
        return Stage(name, work, outputs, rules, sources, reads)

    def _round(self, two: StageTwoConfig, number: int) -> list[Stage]:
        """The stages of a round: samples, pairs, tuning."""
        first, model = f"iteration-{self.config.iterations}-{two.start}", f"stage-two-{number}"
        before = first if number == 1 else f"stage-two-{number - 1}"
        samples, pairs = f"{model}-{SAMPLES}", f"{model}-pairs"
        seed = (self.config.seed + number - 1) % 2**32

        def make_pairs(folder: Path) -> Figures:
            weak, drawn = self._voted(WEAK, samples)
            sources, answers = (self._graded(WEAK), self._graded(samples)), _by_id(weak)
            found = contrastive_pairs(
                self.questions, answers, drawn, two.contrasts, sources=sources
            )
            write_jsonl(folder / TRAINING, found.pairs)
            return found.as_row()

        def rows() -> list[Row]:
            return read_jsonl(self.root / pairs / TRAINING)

        drawing = self.config.generation(**two.drawing, seed=seed)
        rules = {"contrasts": asdict(two.contrasts), **self._grading()}
        weights = {"weight_column": WEIGHT} if two.contrasts.weighted else {}
        flags, after = self.config.dpo | weights | two.dpo, (pairs, f"{before}-model")
        most = len(self.questions) * two.contrasts.pairs_per_question
        cost = f"1 preference tuning on up to {most:,} pairs"
        return [
            self._answers(samples, before, generation=drawing),
            Stage(pairs, make_pairs, (TRAINING,), rules, (WEAK, samples), self._reads("questions")),
            self._training("dpo", model, rows, flags, cost, start=None, after=after),
        ]

    # --- Responses --------------------------------------------------------------------------------

    def _weak_responses(self) -> Stage:
        if self.config.weak.responses is None:
            return self._answers(WEAK, "weak")

        def work(folder: Path) -> Figures:
            found = read_responses(self.files["weak responses"], self.questions)
            return self._grade(folder, list(found.values()), self.config.votes, self.questions)

        reads = self._reads("questions", "weak responses")
        return Stage(WEAK, work, (GRADED,), self._grading(), (), reads)

    def _test(self, model: str) -> Stage:
        """A model's test; "strong-icl" is the strong model after demonstrations."""
        is_shown = model == "strong-icl"
        asked = "strong" if is_shown else model
        return self._answers(f"test-{model}", asked, is_shown=is_shown, is_test=True)

    def _answers(
        self,
        stage: str,
        model: str,
        *,
        is_shown: bool = False,
        is_test: bool = False,
        generation: GenerationConfig | None = None,
    ) -> Stage:
        """Responses of one model to the questions or the test, graded.

        Args:
            stage: Name of the stage.
            model: Name of the model.
            is_shown: Whether demonstrations precede the questions.
            is_test: Whether the test is answered, in place of the questions.
            generation: How responses are sampled; None for the run's settings, greedy.
        """
        config, shown = self.config, self.config.demonstrations
        is_shown = is_shown and shown.count > 0
        decided = generation or config.generation()
        is_guided = decided.method == "cbs"
        checker = config.judge if is_test else config.votes

        def work(folder: Path) -> Figures:
            output = folder / RAW
            if not output.exists():
                demonstrations = self._demonstrations(folder) if is_shown else None
                task = self.answering(model, decided, str(output), demonstrations, is_test=is_test)
                source = folder / "answering.json"
                source.write_text(json.dumps(asdict(task), indent=2) + "\n")
                run_module("w2s_jax.reasoning.generation", str(source))
            rows = self.test if is_test else self.questions
            return self._grade(folder, read_jsonl(output), checker, rows)

        checkpoint = self._checkpoint(model)
        made: tuple[str, ...] = (f"{model}-model",) if checkpoint is None else ()
        made += ("weak-model",) if is_guided else ()
        made += (WEAK,) if is_shown and shown.file is None else ()
        reads = self._reads("questions", *(["test"] if is_test else []))
        reads += self._reads("demonstrations") if is_shown else ()
        settings = {
            "model": checkpoint,
            "weights": None if checkpoint is None else self.weights[checkpoint],
            "generation": asdict(decided) | {"batch_size": None},
            "demonstrations": asdict(shown) if is_shown else None,
            "dtype": config.decoding.dtype,
            **self._grading(),
        }
        count = f"{decided.samples} × " if decided.samples > 1 else ""
        asked = len(self.test if is_test else self.questions)
        cost = f"{count}{asked:,} responses of up to {decided.max_new_tokens} tokens"
        if is_guided:
            cost += f", each a search of {decided.beam_width} × {decided.successors} hypotheses"
        return Stage(stage, work, (GRADED,), settings, made, reads, cost)

    def answering(
        self,
        model: str,
        generation: GenerationConfig,
        output: str = "",
        demonstrations: str | None = None,
        *,
        is_test: bool = False,
    ) -> Answering:
        """The task for the process that answers."""
        config, is_guided = self.config, generation.method == "cbs"
        return Answering(
            model=self._folder(model),
            questions=str(self.files["test" if is_test else "questions"]),
            output=output,
            generation=generation,
            ids="own" if is_test else config.ids,
            demonstrations=demonstrations,
            overflow=config.demonstrations.overflow,
            tuned=self._folder("weak") if is_guided else None,
            untuned=self.place(str(config.weak.model)) if is_guided else None,
            dtype=config.decoding.dtype,
            mesh=config.decoding.mesh,
        )

    def _checkpoint(self, model: str) -> str | None:
        """The config's name of a model that no stage trains; None for others."""
        if model == "weak" and self.config.weak.train is None:
            return self.config.weak.model
        return self.config.strong if model == "strong" else None

    def _folder(self, model: str) -> str:
        named = self._checkpoint(model)
        return str(self.root / f"{model}-model" / MODEL) if named is None else self.place(named)

    def _demonstrations(self, folder: Path) -> str:
        """The file of demonstrations; those drawn from the weak model's responses are written."""
        shown, kind = self.config.demonstrations, self.config.kind
        if shown.file is None:
            place, asked = self._graded(WEAK), self.questions
            graded = _by_id(read_jsonl(place))
            drawn = draw_demonstrations(asked, graded, shown.count, seed=shown.seed, source=place)
        else:
            drawn = read_demonstrations(self.files["demonstrations"])[: shown.count]
        path = folder / DEMONSTRATIONS
        rows = (
            {"question": one.question, "answer": solution_text(one.answer, kind)} for one in drawn
        )
        write_jsonl(path, rows)
        return str(path)

    # --- Graded rows ------------------------------------------------------------------------------

    def _grade(
        self, folder: Path, rows: Sequence[Row], checker: str, solved: Sequence[Row]
    ) -> Figures:
        """Write graded rows; returns figures of their quality, if there are gold answers."""
        kind = self.config.kind
        answers = {row["id"]: gold_answer(row["answer"], kind) for row in solved if "answer" in row}
        graded = judged(rows, answers, checker, self.config.judge, kind)
        write_jsonl(folder / GRADED, graded)
        figures: dict[str, Any] = {
            "rows": len(graded),
            "answered": sum(bool(row["pred"]) for row in graded),
            "unfinished": sum(row.get("finished") is False for row in graded),
        }
        if answers:
            found = accuracy(row["result"] for row in graded if "result" in row)
            figures["accuracy"] = found and asdict(found)
        return figures

    def judged_samples(self, stage: str) -> list[Row]:
        """Graded rows of a stage with several samples per question, with the voting `answer`."""
        rows = read_jsonl(self._graded(stage))
        (voted,) = self._voted(stage)
        return [row | {"answer": vote["pred"]} for row, vote in zip(rows, voted, strict=True)]

    def _voted(self, *stages: str) -> list[list[Row]]:
        """The graded rows of stages, with `pred` in the form that votes."""
        lists = [read_jsonl(self._graded(stage)) for stage in stages]
        if self.config.votes == "published":
            return lists
        every = [row for rows in lists for row in rows]
        voted = iter(votes(every, self.config.votes, self.config.kind))
        return [[next(voted) for _ in rows] for rows in lists]

    def _graded(self, stage: str) -> str:
        """The file of a stage's graded rows."""
        return str(self.root / stage / GRADED)

    def _grading(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("kind", "votes", "judge")}

    def _reads(self, *names: str) -> tuple[Path, ...]:
        """Those of the named files that the run has."""
        return tuple(self.files[name] for name in names if name in self.files)


def _by_id(rows: Iterable[Row]) -> Answers:
    return {row["id"]: row for row in rows}
