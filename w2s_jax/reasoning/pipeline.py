"""The stages of a weak-to-strong reasoning run (arXiv 2407.13647), and what each of them does.

Models are trained by `w2s sft` and `w2s dpo`, and answer, in processes of their own; what is done
again and what is not is for `stages.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from w2s_jax.reasoning.answering import Answering, write_task
from w2s_jax.reasoning.answers import gold_answer
from w2s_jax.reasoning.config import ReasonConfig, SetName, StageTwoConfig, resolved
from w2s_jax.reasoning.contrasts import WEIGHT, contrastive_pairs
from w2s_jax.reasoning.curation import curate, sft_set
from w2s_jax.reasoning.generation import GenerationConfig
from w2s_jax.reasoning.grading import judged, votes
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
from w2s_jax.reasoning.stages import Stage
from w2s_jax.reasoning.workers import run_module
from w2s_jax.text.rows import Row, read_jsonl, write_jsonl

RAW, GRADED, TRAINING, DEMONSTRATIONS = (
    "responses.jsonl", "graded.jsonl", "training.jsonl", "demonstrations.jsonl",
)  # fmt: skip
MODEL, START, SAMPLES = "model", "start", "samples"
WEAK_MODEL, WEAK, ICL = "weak-model", "weak-responses", "icl-responses"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A run's config, the folder its relative paths are in, and the folder it writes in.

    The methods that return a `Stage` say what it reads and writes; `stages` puts them in order.
    """

    config: ReasonConfig
    data: Path
    root: Path

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """What the run reads, by name; raises InputError for a file that is missing."""
        return resolved(self.config, self.data)

    @cached_property
    def questions(self) -> list[Row]:
        """The strong model's questions."""
        return read_questions(self.files["questions"], ids=self.config.ids)

    @cached_property
    def test(self) -> list[Row]:
        """The questions of the test, each with its gold answer."""
        return read_questions(self.files["test"], answers_needed=True)

    @cached_property
    def ceiling(self) -> bool:
        """Whether a model is trained on the gold answers of the questions."""
        if self.config.ceiling is None:
            return all("answer" in row for row in self.questions)
        return self.config.ceiling

    def place(self, checkpoint: str) -> str:
        """Where a checkpoint of the config is: in the folder of the data, or as it is named."""
        return str(self.data / checkpoint) if (self.data / checkpoint).is_dir() else checkpoint

    @cached_property
    def weights(self) -> Mapping[str, str]:
        """A hash of the weights of each checkpoint that the run begins with, by its name."""
        from w2s_jax.models.huggingface import locate
        from w2s_jax.train.reference import weights_identity

        named = {self.config.strong, self.config.weak.model} - {None}
        return {str(name): weights_identity(locate(self.place(str(name)))) for name in named}

    def stages(self) -> list[Stage]:
        """All stages in order; the models that are tested are told by `tested`."""
        config = self.config
        found: list[Stage] = [] if config.weak.train is None else [self._weak_model()]
        found += [self._weak_responses(), self._icl_responses()]
        sources = (WEAK, ICL)
        for i in range(1, config.iterations + 1):
            found.append(self._sets(i, sources))
            found += [self._tuned_on(i, name) for name in self._trained_sets(i)]
            if i < config.iterations:
                found += [self._responses_of(i, name) for name in ("weak", "icl")]
                sources = (_name(i, "weak", "responses"), _name(i, "icl", "responses"))
        if config.stage_two is not None:
            for number in range(1, config.stage_two.rounds + 1):
                found += self._round(config.stage_two, number)
        if config.naive:
            found.append(self._full("naive-model", WEAK))
        if self.ceiling:
            found.append(self._ceiling())
        if config.test is not None:
            found += [self._test(name, *place) for name, place in self.tested.items()]
        return found

    @cached_property
    def tested(self) -> dict[str, tuple[str | None, str | None]]:
        """For each model that is tested its name, the stage that trained it, a checkpoint if none.

        "strong-icl" is the strong model behind the demonstrations.
        """
        config = self.config
        found: dict[str, tuple[str | None, str | None]] = {}
        if config.weak.model is not None:
            trained = config.weak.train is not None
            found["weak"] = (WEAK_MODEL, None) if trained else (None, config.weak.model)
        found["strong-icl"] = (None, config.strong)
        if config.naive:
            found["naive"] = ("naive-model", None)
        for i in range(1, config.iterations + 1):
            for name in self._trained_sets(i):
                found[f"iteration-{i}-{name}"] = (_name(i, name, MODEL), None)
        if config.stage_two is not None:
            for number in range(1, config.stage_two.rounds + 1):
                found[f"stage-two-{number}"] = (f"stage-two-{number}-model", None)
        if self.ceiling:
            found["ceiling"] = ("ceiling-model", None)
        return found

    def _trained_sets(self, iteration: int) -> tuple[SetName, ...]:
        """The sets of an iteration on which a model is trained: those asked for, those needed."""
        needed: set[SetName] = set(self.config.sets)
        if iteration < self.config.iterations:
            needed |= {"weak", "icl"}
        elif self.config.stage_two is not None:
            needed.add(self.config.stage_two.start)
        order: tuple[SetName, ...] = ("weak", "icl", "hybrid")
        return tuple(name for name in order if name in needed)

    def _weak_model(self) -> Stage:
        weak, place = self.config.weak, self.files["weak train"]
        assert weak.model is not None

        def work(folder: Path) -> Figures:
            rows = read_questions(place, answers_needed=True)
            write_jsonl(folder / TRAINING, [solved_row(row, self.config.kind) for row in rows])
            return self._train("sft", folder, self.place(str(weak.model)), weak.sft)

        settings = self._training(weak.model, self.config.sft | weak.sft)
        cost = _tuning_cost(len(read_questions(place, answers_needed=True)))
        return Stage(WEAK_MODEL, work, (MODEL,), settings, (), (place,), cost)

    def _weak_responses(self) -> Stage:
        weak = self.config.weak
        if weak.responses is not None:
            place = self.files["weak responses"]

            def work(folder: Path) -> Figures:
                found = read_responses(place, self.questions)
                return self._grade(folder, list(found.values()), self.config.votes)

            return Stage(WEAK, work, (GRADED,), self._grading(), (), self._reads(place))
        trained = weak.train is not None
        return self._answers(WEAK, None if trained else weak.model, WEAK_MODEL if trained else None)

    def _icl_responses(self) -> Stage:
        return self._answers(ICL, self.config.strong, None, shown=True)

    def _responses_of(self, iteration: int, name: SetName) -> Stage:
        return self._answers(
            _name(iteration, name, "responses"), None, _name(iteration, name, MODEL)
        )

    def _sets(self, iteration: int, sources: tuple[str, str]) -> Stage:
        def work(folder: Path) -> Figures:
            weak, icl = self._voted(*(self._graded(name).values() for name in sources))
            found = curate(
                self.questions,
                _by_id(weak),
                _by_id(icl),
                iteration=iteration,
                published=self.config.published,
                sources=self._places(*sources),
            )
            for name, rows in (("weak", found.weak), ("icl", found.icl), ("hybrid", found.hybrid)):
                write_jsonl(folder / f"{name}.jsonl", rows)
            return found.as_row()

        settings = {"published": self.config.published, **self._grading()}
        outputs = ("weak.jsonl", "icl.jsonl", "hybrid.jsonl")
        return Stage(f"iteration-{iteration}-sets", work, outputs, settings, sources, self._reads())

    def _tuned_on(self, iteration: int, name: SetName) -> Stage:
        sets = f"iteration-{iteration}-sets"

        def work(folder: Path) -> Figures:
            write_jsonl(folder / TRAINING, read_jsonl(self.root / sets / f"{name}.jsonl"))
            return self._train("sft", folder, self.place(self.config.strong), {})

        most = len(self.questions) * (2 if name == "hybrid" else 1)
        return self._tuning(_name(iteration, name, MODEL), work, (sets,), _tuning_cost(most, True))

    def _full(self, stage: str, source: str) -> Stage:
        def work(folder: Path) -> Figures:
            answers = self._graded(source)
            rows = sft_set(self.questions, answers, [row["id"] for row in self.questions])
            write_jsonl(folder / TRAINING, rows)
            return self._train("sft", folder, self.place(self.config.strong), {})

        return self._tuning(stage, work, (source,), _tuning_cost(len(self.questions)))

    def _ceiling(self) -> Stage:
        def work(folder: Path) -> Figures:
            rows = [solved_row(row, self.config.kind) for row in self.questions]
            write_jsonl(folder / TRAINING, rows)
            return self._train("sft", folder, self.place(self.config.strong), {})

        return self._tuning("ceiling-model", work, (), _tuning_cost(len(self.questions)))

    def _tuning(self, name: str, work: Any, after: tuple[str, ...], cost: str) -> Stage:
        settings = self._training(self.config.strong, self.config.sft)
        return Stage(name, work, (MODEL,), settings, after, self._reads(), cost)

    def _round(self, config: StageTwoConfig, number: int) -> list[Stage]:
        """Samples, pairs, tuning."""
        before = _name(self.config.iterations, config.start, MODEL)
        if number > 1:
            before = f"stage-two-{number - 1}-model"
        samples, pairs, tuned = (f"stage-two-{number}-{what}" for what in (SAMPLES, "pairs", MODEL))
        generation = self.generation(
            **config.drawing(), seed=(self.config.seed + number - 1) % 2**32
        )
        drawn = self._answers(samples, None, before, generation=generation)

        def make_pairs(folder: Path) -> Figures:
            graded = read_jsonl(self.root / samples / GRADED)
            weak, rows = self._voted(self._graded(WEAK).values(), graded)
            found = contrastive_pairs(
                self.questions,
                _by_id(weak),
                rows,
                config.contrasts,
                sources=self._places(WEAK, samples),
            )
            write_jsonl(folder / TRAINING, found.pairs)
            return found.as_row()

        weights = {"weight_column": WEIGHT} if config.contrasts.weighted else {}
        preferences = weights | config.dpo

        def tune(folder: Path) -> Figures:
            write_jsonl(folder / TRAINING, read_jsonl(self.root / pairs / TRAINING))
            start = _whole(self.root / before / MODEL, folder / START)
            return self._train("dpo", folder, start, preferences)

        rules = {"contrasts": _plain(config.contrasts), **self._grading()}
        made = Stage(pairs, make_pairs, (TRAINING,), rules, (WEAK, samples), self._reads())
        flags = self._training(None, self.config.dpo | preferences)
        most = len(self.questions) * config.contrasts.pairs_per_question
        cost = f"1 preference tuning on up to {most:,} pairs"
        last = Stage(tuned, tune, (MODEL,), flags, (pairs, before), (), cost)
        return [drawn, made, last]

    def _test(self, name: str, trained: str | None, checkpoint: str | None) -> Stage:
        shown = name == "strong-icl"
        return self._answers(f"test-{name}", checkpoint, trained, shown=shown, test=True)

    def _answers(
        self,
        stage: str,
        checkpoint: str | None,
        trained: str | None,
        *,
        shown: bool = False,
        test: bool = False,
        generation: GenerationConfig | None = None,
    ) -> Stage:
        """Responses of one model to the questions or the test, graded.

        shown: whether demonstrations stand before them.
        """
        shown = shown and self.config.demonstrations.count > 0
        place = self.files["test" if test else "questions"]
        decided = generation or self.generation()
        guided = decided.method == "cbs"

        def work(folder: Path) -> Figures:
            if not (folder / RAW).exists():
                demonstrations = self._demonstrations(folder) if shown else None
                task = Answering(
                    model=self.place(checkpoint) if checkpoint else self._model_of(trained),
                    questions=str(place),
                    output=str(folder / RAW),
                    generation=decided,
                    ids="own" if test else self.config.ids,
                    demonstrations=demonstrations,
                    overflow=self.config.demonstrations.overflow,
                    tuned=self._model_of(WEAK_MODEL) if guided else None,
                    untuned=self.place(str(self.config.weak.model)) if guided else None,
                    dtype=self.config.decoding.dtype,
                    mesh=self.config.decoding.mesh,
                )
                write_task(task, folder / "answering.json")
                run_module("w2s_jax.reasoning.answering", str(folder / "answering.json"))
            rows = read_jsonl(folder / RAW)
            checker = self.config.judge if test else self.config.votes
            return self._grade(folder, rows, checker, self.test if test else None)

        made: tuple[str, ...] = () if trained is None else (trained,)
        made += (WEAK_MODEL,) if guided else ()
        made += (WEAK,) if shown and self.config.demonstrations.file is None else ()
        shown_file = self.files.get("demonstrations") if shown else None
        reads = self._reads(*([place] if test else []), *([shown_file] if shown_file else []))
        settings = {
            "model": checkpoint,
            "weights": None if checkpoint is None else self.weights[checkpoint],
            "generation": _plain(decided) | {"batch_size": None},
            "demonstrations": _plain(self.config.demonstrations) if shown else None,
            "dtype": self.config.decoding.dtype,
            **self._grading(),
        }
        count = f"{decided.samples} × " if decided.samples > 1 else ""
        asked = len(self.test if test else self.questions)
        cost = f"{count}{asked:,} responses of up to {decided.max_new_tokens} tokens"
        if guided:
            cost += f", each a search of {decided.beam_width} × {decided.successors} hypotheses"
        return Stage(stage, work, (GRADED,), settings, made, reads, cost)

    def _demonstrations(self, folder: Path) -> str:
        """The file of demonstrations; those drawn from the weak model's responses are written."""
        shown = self.config.demonstrations
        path = folder / DEMONSTRATIONS
        if shown.file is None:
            drawn = draw_demonstrations(
                self.questions,
                self._graded(WEAK),
                shown.count,
                seed=shown.seed,
                source=str(self.root / WEAK / GRADED),
            )
        else:
            drawn = read_demonstrations(self.files["demonstrations"])[: shown.count]
        kind = self.config.kind
        write_jsonl(
            path,
            [
                {"question": one.question, "answer": solution_text(one.answer, kind)}
                for one in drawn
            ],
        )
        return str(path)

    def _grade(
        self, folder: Path, rows: Sequence[Row], checker: str, golds: Sequence[Row] | None = None
    ) -> Figures:
        """Write graded rows; figures of how good they are where there are gold answers."""
        kind, solved = self.config.kind, self.questions if golds is None else golds
        answers = {row["id"]: gold_answer(row["answer"], kind) for row in solved if "answer" in row}
        graded = judged(rows, answers, checker, self.config.judge, kind)
        write_jsonl(folder / GRADED, graded)
        figures: Figures = {
            "rows": len(graded),
            "answered": sum(bool(row["pred"]) for row in graded),
            "unfinished": sum(row.get("finished") is False for row in graded),
        }
        if answers:
            found = accuracy(row["result"] for row in graded if "result" in row)
            figures["accuracy"] = None if found is None else found.as_row()
        return figures

    def judged_samples(self, stage: str) -> list[Row]:
        """Graded rows of a stage that drew several a question, with the `answer` that votes."""
        rows = read_jsonl(self.root / stage / GRADED)
        (voted,) = self._voted(rows)
        return [row | {"answer": vote["pred"]} for row, vote in zip(rows, voted, strict=True)]

    def _places(self, weak: str, other: str) -> tuple[str, str]:
        """The files of two stages' graded rows, for messages."""
        return str(self.root / weak / GRADED), str(self.root / other / GRADED)

    def _graded(self, stage: str) -> Answers:
        return _by_id(read_jsonl(self.root / stage / GRADED))

    def _voted(self, *sources: Iterable[Mapping[str, Any]]) -> list[list[Row]]:
        """The rows of each source with `pred` in the form that it votes for."""
        lists = [[dict(row) for row in rows] for rows in sources]
        if self.config.votes == "published":
            return lists
        voted = iter(
            votes([row for rows in lists for row in rows], self.config.votes, self.config.kind)
        )
        return [[next(voted) for _ in rows] for rows in lists]

    def generation(self, **options: Any) -> GenerationConfig:
        """How responses are written, greedily but for the options."""
        return self.config.decoding.generation(**{"seed": self.config.seed} | options)

    def _model_of(self, stage: str | None) -> str:
        return str(self.root / str(stage) / MODEL)

    def _train(self, command: str, folder: Path, model: str, flags: Mapping[str, Any]) -> Figures:
        """Run `w2s COMMAND` on the folder's rows, by a config file that is kept beside them."""
        shared = self.config.sft if command == "sft" else self.config.dpo
        own = {"model": model, "data": str(folder / TRAINING), "output": str(folder)}
        values = {"seed": self.config.seed} | shared | dict(flags) | own
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(dict(values), sort_keys=False))
        where = f"see its message; what stands under {command} in the config are its flags"
        config = str(folder / f"{command}.yaml")
        run_module("w2s_jax", command, "--config", config, hint=where)
        return {"rows": len(read_jsonl(folder / TRAINING))}

    def _training(self, model: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
        weights = None if model is None else self.weights[model]
        return {"model": model, "weights": weights, "flags": dict(flags), "seed": self.config.seed}

    def _grading(self) -> dict[str, Any]:
        config = self.config
        return {"kind": config.kind, "votes": config.votes, "judge": config.judge}

    def _reads(self, *others: Path) -> tuple[Path, ...]:
        return (self.files["questions"], *others)


def _by_id(rows: Iterable[Mapping[str, Any]]) -> Answers:
    return {row["id"]: row for row in rows}


def _name(iteration: int, name: str, what: str) -> str:
    return f"iteration-{iteration}-{name}-{what}"


def _plain(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def _whole(model: Path, target: Path) -> str:
    """A checkpoint that can be trained on: an adapter is merged with its base into `target`."""
    from w2s_jax.models.huggingface import is_adapter

    if not is_adapter(model):
        return str(model)
    run_module("w2s_jax", "convert", str(model), str(target))
    return str(target)


def _tuning_cost(rows: int, up_to: bool = False) -> str:
    return f"1 fine-tuning on {'up to ' if up_to else ''}{rows:,} rows"
