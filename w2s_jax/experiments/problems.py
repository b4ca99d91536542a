"""Word problems with several steps of arithmetic from a seed, and general text about them.

Uses no model and no file. A problem is a function of (seed, index); some wordings are held out.
"""

import operator
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Literal

from w2s_jax.errors import InputError
from w2s_jax.reasoning.questions import prompt_of
from w2s_jax.text.rows import Row

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry",
    "Ida", "Jonas", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "eggs", "flowers", "keys", "marbles",
    "nuts", "pears", "pens", "shells", "stamps", "stones", "tickets", "toys",
)  # fmt: skip
PACKS = ("bags", "boxes", "baskets", "jars")

Operation = Literal["add", "subtract", "multiply", "packs", "share", "compare"]

WORDINGS: dict[Operation, tuple[str, ...]] = {
    "add": (
        "{name} finds {n} more {items}.",
        "{name} buys {n} {items}.",
        "{friend} gives {n} {items} to {name}.",
        "Then {name} gets {n} new {items}.",
        "{name} takes {n} {items} from {friend}.",
    ),
    "subtract": (
        "{name} loses {n} {items}.",
        "{name} sells {n} {items}.",
        "{name} gives {n} {items} to {friend}.",
        "Then {n} {items} break.",
        "{friend} takes {n} {items} from {name}.",
    ),
    "multiply": (
        "Then {name} has {n} times as many {items} as before.",
        "The number of {items} grows to {n} times what it was.",
        "{name} works until there are {n} times as many {items}.",
        "Then there are {n} times as many {items} as before.",
    ),
    "packs": (
        "{name} buys {m} {packs} of {n} {items}.",
        "{friend} brings {m} {packs} with {n} {items} each.",
        "{name} finds {m} {packs}, each with {n} {items}.",
        "{name} gets {m} new {packs} of {n} {items}.",
    ),
    "share": (
        "{name} puts the {items} into {n} equal {packs} and keeps one.",
        "{name} shares the {items} equally among {n} friends, and one of them is {name}.",
        "{name} keeps one of {n} equal parts of the {items}.",
        "{name} puts the {items} into {n} equal parts and keeps one.",
    ),
    "compare": (
        "{friend} has {n} more {items} than {name}.",
        "{friend} has {n} fewer {items} than {name}.",
        "{friend} has {n} times as many {items} as {name}.",
        "{name} has {n} fewer {items} than {friend}.",
    ),
}
"""Sentences of each operation. The last one is held out; few of its words are not in the others."""
OPENINGS = (
    "{name} has {n} {items}.",
    "At first {name} has {n} {items}.",
    "{name} owns {n} {items}.",
)
ASIDES = ("{friend} has {n} {others}.", "{name} has {n} {others} too.")
QUESTIONS = (
    "How many {items} does {name} have now?",
    "How many {items} are left with {name}?",
    "What is the number of {items} that {name} has in the end?",
)
TOGETHER = ("How many {items} do they have together?", "How many {items} do the two have in total?")

Wordings = Literal["shown", "held out", "all"]


@dataclass(frozen=True)
class ProblemConfig:
    """How hard problems are.

    Attributes:
        steps: Possible numbers of operations in a problem, from 2 to 5.
        largest: Largest number in a problem.
        asides: Share of problems with an irrelevant number.
        wordings: "shown" has no held-out wording, "held out" at least one.
    """

    steps: tuple[int, ...] = (2, 3, 4, 5)
    largest: int = 60
    asides: float = 0.2
    wordings: Wordings = "shown"

    def __post_init__(self) -> None:
        if not self.steps or not all(2 <= number <= 5 for number in self.steps):
            raise InputError(f"steps {self.steps}: numbers from 2 to 5 are needed")
        if self.largest < 12:
            raise InputError(f"largest {self.largest}: problems need numbers up to 12 at least")


@dataclass(frozen=True)
class Line:
    """One operation of a solution: `{before}{left} {sign} {right} = {value}{after}`.

    `left_from` and `right_from` are the lines whose values the operands are, None for operands in
    the question.
    """

    before: str
    left: int
    sign: str
    right: int
    value: int
    after: str
    left_from: int | None = None
    right_from: int | None = None


@dataclass(frozen=True)
class Problem:
    """A question, the lines that solve it, and its wordings.

    Attributes:
        question: The question.
        lines: The lines of its solution.
        wordings: (operation, number in WORDINGS) of each sentence that changes the count.
    """

    question: str
    lines: tuple[Line, ...]
    wordings: tuple[tuple[Operation, int], ...]

    @property
    def answer(self) -> int:
        """The final answer."""
        return self.lines[-1].value

    @property
    def held_out(self) -> bool:
        """Whether it has a held-out wording."""
        return any(is_held_out(*wording) for wording in self.wordings)

    @property
    def solution(self) -> str:
        """The solution step by step; it ends in `#### ANSWER` as in GSM8K."""
        return _solution(self.lines)


def is_held_out(operation: Operation, number: int) -> bool:
    """Whether a wording is only for tests."""
    return number == len(WORDINGS[operation]) - 1


def make_problem(seed: int, index: int, config: ProblemConfig | None = None) -> Problem:
    """The problem of a seed and an index."""
    config = config or ProblemConfig()
    rng = random.Random(f"problem {seed} {index}")
    while True:
        found = _try(rng, config)
        if found is not None and (config.wordings != "held out" or found.held_out):
            return found


def make_problems(
    number: int, seed: int, config: ProblemConfig | None = None, *, without: Collection[str] = ()
) -> list[Problem]:
    """Problems of a seed by ascending index, without duplicates and those in `without`."""
    return list(islice(_distinct(seed, config, without), number))


def question_rows(problems: Sequence[Problem], prefix: str) -> list[Row]:
    """Problems as rows of questions with gold solutions."""
    return [
        {
            "id": f"{prefix}{index}",
            "question": problem.question,
            "answer": problem.solution,
            "steps": len(problem.lines),
        }
        for index, problem in enumerate(problems)
    ]


def general_text(
    number: int,
    seed: int,
    config: ProblemConfig | None = None,
    *,
    without: Collection[str] = (),
    shown: tuple[int, int] = (2, 4),
    careless: float = 0.2,
) -> list[str]:
    """Texts for pre-training, which contain no question in `without`, and no answer to one.

    Half are demonstrations: solved problems in the published format. The others tell a story with
    the count after each sentence, do sums, or ask without an answer. Held-out wordings occur only
    in stories.

    Args:
        number: Number of texts.
        seed: Seed of the texts.
        config: How hard problems are.
        without: Questions to leave out.
        shown: Smallest and largest number of problems in a text of demonstrations.
        careless: Share of these texts whose solver sometimes errs, which teaches that solutions are
            as good as those before them.
    """
    config = config or ProblemConfig()
    rng = random.Random(f"general {seed}")
    problems = _distinct(seed, config, without)
    texts = []
    for _ in range(number):
        kind = rng.random()
        if kind < 0.5:
            solved = list(islice(problems, rng.randint(*shown)))
            texts.append(_block(solved, 0.3 if rng.random() < careless else 0.0, rng))
        elif kind < 0.75:
            texts.append(_story(rng, config))
        elif kind < 0.95:
            texts.append(_sums(rng, config.largest))
        else:
            texts.append(" ".join(p.question for p in islice(problems, 2)))
    return texts


def _distinct(
    seed: int, config: ProblemConfig | None, without: Collection[str]
) -> Iterator[Problem]:
    seen = set(without)
    misses = 0
    for index in count():
        problem = make_problem(seed, index, config)
        misses = misses + 1 if problem.question in seen else 0
        if misses > 10_000:
            raise InputError("there are not so many different problems; ask for fewer")
        if misses == 0:
            seen.add(problem.question)
            yield problem


_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass
class _Telling:
    """A problem in the making: the count so far, and the line of the solution that gave it."""

    rng: random.Random
    config: ProblemConfig
    names: dict[str, str]
    value: int
    told: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    wordings: list[tuple[Operation, int]] = field(default_factory=list)
    last: int | None = None

    def pick(self, operation: Operation, among: Sequence[int] | None = None) -> str:
        """Draw one of an operation's wordings."""
        numbers = range(len(WORDINGS[operation])) if among is None else among
        if self.config.wordings == "shown":
            numbers = [number for number in numbers if not is_held_out(operation, number)]
        number = self.rng.choice(numbers)
        self.wordings.append((operation, number))
        return WORDINGS[operation][number]

    def say(self, wording: str, **numbers: int) -> None:
        self.told.append(wording.format(**self.names, **numbers))

    def work(self, before: str, left: int, sign: str, right: int, *sources: int | None) -> int:
        """Add a line, with its operands' source lines; returns its value, the count stays."""
        value = _OPERATORS[sign](left, right)
        before, after = (text.format(**self.names) for text in (before, " {items}."))
        self.lines.append(Line(before, left, sign, right, value, after, *sources))
        return value

    def change(self, sign: str, right: int, right_from: int | None = None) -> None:
        """Change the count, with a line of the solution."""
        self.value = self.work("Then {name} has ", self.value, sign, right, self.last, right_from)
        self.last = len(self.lines) - 1


def _begin(rng: random.Random, config: ProblemConfig, *, items: int) -> _Telling:
    """A problem that has told the initial count; a second kind of items is for asides."""
    name, friend = rng.sample(NAMES, 2)
    things = dict(zip(("items", "others"), rng.sample(ITEMS, items), strict=False))
    names = {"name": name, "friend": friend, **things, "packs": rng.choice(PACKS)}
    told = _Telling(rng, config, names, rng.randint(3, config.largest // 2))
    told.say(rng.choice(OPENINGS), n=told.value)
    return told


def _try(rng: random.Random, config: ProblemConfig) -> Problem | None:
    """A problem, or None if the numbers drawn allow no further step."""
    told = _begin(rng, config, items=2)
    steps = rng.choice(config.steps)
    compares = rng.random() < 0.3
    while room := max(0, steps - 2 * compares - len(told.lines)):
        if not _step(told, room):
            return None
    if rng.random() < config.asides:
        place = rng.randint(1, len(told.told))
        told.say(rng.choice(ASIDES), n=rng.randint(2, config.largest // 2))
        told.told.insert(place, told.told.pop())
    if compares and not _compare(told):
        return None
    told.say(rng.choice(TOGETHER if compares else QUESTIONS))
    return Problem(" ".join(told.told), tuple(told.lines), tuple(told.wordings))


# Kinds of steps, repeated by their weight in the draw.
_DRAWN: tuple[Operation, ...] = (
    "add", "add", "subtract", "subtract", "multiply", "share", "packs",
)  # fmt: skip


def _step(told: _Telling, room: int) -> bool:
    """Add one operation, of at most `room` lines."""
    rng, largest, value = told.rng, told.config.largest, told.value
    sizes = [(m, n) for m in range(2, 7) for n in range(2, 10) if value + m * n <= largest]
    fit: dict[Operation, tuple[str, Sequence[Any]]] = {
        "add": ("+", range(2, min(30, largest - value) + 1)),
        "subtract": ("-", range(2, value - 1)),
        "multiply": ("*", [n for n in range(2, 6) if value * n <= largest]),
        "share": ("/", [n for n in range(2, 7) if value % n == 0 and value > n]),
        "packs": ("*", sizes if room >= 2 else []),
    }
    kinds = [kind for kind in _DRAWN if fit[kind][1]]
    if not kinds:
        return False
    kind = rng.choice(kinds)
    wording, (sign, numbers) = told.pick(kind), fit[kind]
    n = rng.choice(numbers)
    if kind == "packs":
        m, n = n
        told.say(wording, m=m, n=n)
        product = told.work("The {packs} hold ", m, sign, n)
        told.change("+", product, len(told.lines) - 1)
    else:
        told.say(wording, n=n)
        told.change(sign, n)
    return True


def _compare(told: _Telling) -> bool:
    """Tell what another person has, and both together; False if that exceeds the largest."""
    value, room = told.value, told.config.largest - 2 * told.value
    choices: tuple[tuple[str, Sequence[int]], ...] = (
        ("+", range(2, room + 1)),
        ("-", range(max(2, -room), value - 1)),
        ("*", [n for n in range(2, 5) if value * (n + 1) <= told.config.largest]),
        ("+", range(2, room + 1)),
    )
    fit = {
        number: (sign, numbers)
        for number, (sign, numbers) in enumerate(choices)
        if numbers and not (told.config.wordings == "shown" and is_held_out("compare", number))
    }
    if not fit:
        return False
    wording = told.pick("compare", list(fit))
    sign, numbers = fit[told.wordings[-1][1]]
    n = told.rng.choice(numbers)
    told.say(wording, n=n)
    other = told.work("{friend} has ", value, sign, n, told.last)
    told.work("Together they have ", value, "+", other, told.last, len(told.lines) - 1)
    return True


def _solution(lines: Sequence[Line]) -> str:
    told = (f"{at.before}{at.left} {at.sign} {at.right} = {at.value}{at.after}\n" for at in lines)
    return f"{''.join(told)}#### {lines[-1].value}"


def _slipped(lines: Sequence[Line], chance: float, rng: random.Random) -> list[Line]:
    """The lines of a solver who errs at some of them, and continues from the wrong values."""
    found: list[Line] = []
    for line in lines:
        left = line.left if line.left_from is None else found[line.left_from].value
        right = line.right if line.right_from is None else found[line.right_from].value
        value = max(1, _OPERATORS[line.sign](left, right))
        if rng.random() < chance:
            value = max(1, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        found.append(replace(line, left=left, right=right, value=value))
    return found


def _block(problems: Sequence[Problem], slips: float, rng: random.Random) -> str:
    """Demonstrations whose solver errs in a share `slips` of the lines."""
    return "\n\n".join(
        f"{prompt_of(problem.question)} {_solution(_slipped(problem.lines, slips, rng))}"
        for problem in problems
    )


def _story(rng: random.Random, config: ProblemConfig) -> str:
    """Sentences with the count after each, held-out wordings included, and no question."""
    told = None
    steps = rng.randint(2, 4)
    open_config = replace(config, asides=0.0, wordings="all")
    while told is None:
        told = _begin(rng, open_config, items=1)
        name, friend, items = (told.names[role] for role in ("name", "friend", "items"))
        for _ in range(steps):
            if not _step(told, 2):
                told = None
                break
            told.told.append(f"Now {name} has {told.value} {items}.")
        if told is not None and rng.random() < 0.3:
            lines = len(told.lines)
            if _compare(told):
                told.told.append(f"So {friend} has {told.lines[lines].value} {items}.")
    return " ".join(told.told)


def _sums(rng: random.Random, largest: int) -> str:
    """A few sums with numbers of the problems' size."""
    found: list[str] = []
    while len(found) < 8:
        sign = rng.choice("++--*/")
        if sign == "+":
            left = rng.randint(1, largest - 1)
            right = rng.randint(1, largest - left)
        elif sign == "-":
            left = rng.randint(2, largest)
            right = rng.randint(1, left - 1)
        else:
            left, right = rng.randint(2, 12), rng.randint(2, 9)
            if left * right > largest:
                continue
            left = left * right if sign == "/" else left
        found.append(f"{left} {sign} {right} = {_OPERATORS[sign](left, right)}")
    return "\n".join(found)
