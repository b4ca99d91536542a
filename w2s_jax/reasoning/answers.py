"""Final answers: their checkers by name, and the final answer of a gold solution.

Grading many of them, in processes with limits, is in `grading.py`.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, runtime_checkable

from w2s_jax.errors import InputError
from w2s_jax.reasoning.answer_text import after_answer_is, after_hashes, last_box
from w2s_jax.reasoning.harness_answers import HarnessChecker
from w2s_jax.reasoning.math_answers import MathChecker
from w2s_jax.reasoning.published_answers import PublishedChecker

KINDS = ("gsm8k", "math", "olympicarena")
CHECKERS = ("math", "published", "harness", "harness-flexible")
ANTLR = "4.11.0"
MATH_VERIFY = "0.9.0"


@runtime_checkable
class Checker(Protocol):
    """How final answers are found and compared."""

    @property
    def name(self) -> str: ...

    def extract(self, response: str) -> str:
        """The final answer of a response in the checker's normal form; "" where there is none."""
        ...

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether an extracted answer is the gold answer."""
        ...

    def canonical(self, answer: str) -> str:
        """One form for all extracted answers that count as the same vote."""
        ...


def make_checker(name: str, kind: str) -> Checker:
    """A checker by name, for answers of a kind.

    `math` judges by value and reads LaTeX by math-verify's parser; `published` has the rules of the
    code of arXiv 2407.13647; `harness` and `harness-flexible` are lm-evaluation-harness's filters.
    Raises InputError for an unknown name or kind, a harness checker of other answers than GSM8K's,
    and for `math` where math-verify or its ANTLR runtime is missing or of another version.
    """
    if kind not in KINDS:
        raise InputError(f"kind of answers {kind!r}: one of {', '.join(KINDS)} is needed")
    if name == "published":
        return PublishedChecker(kind)
    if name in ("harness", "harness-flexible"):
        if kind != "gsm8k":
            raise InputError(f"checker {name} reads gsm8k answers only, not {kind}; take math")
        return HarnessChecker(flexible=name == "harness-flexible")
    if name != "math":
        raise InputError(f"checker {name!r}: one of {', '.join(CHECKERS)} is needed")
    check_installed(name)
    return MathChecker(kind)


def check_installed(name: str) -> None:
    """InputError where a checker's libraries are missing or of a version that reads LaTeX wrongly.

    Without the one ANTLR runtime its parsers were made for, math-verify reads no LaTeX and would
    silently compare nothing.
    """
    if name != "math":
        return
    for package, wanted in (("math-verify", MATH_VERIFY), ("antlr4-python3-runtime", ANTLR)):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise InputError(
                f"checker math needs {package} {wanted}, and {found} is installed: "
                f"pip install {package}=={wanted}"
            )


def gold_answer(solution: str, kind: str) -> str:
    r"""The final answer at the end of a gold solution, as it is written there.

    GSM8K: behind the last "####"; math and olympicarena: in the last \boxed{..}, or behind
    "The answer is:"; a text of one line without any of these is the bare answer itself.
    Raises InputError for a solution without a final answer, and an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"kind of answers {kind!r}: one of {', '.join(KINDS)} is needed")
    hashes, box, stated = after_hashes(solution), last_box(solution), after_answer_is(solution)
    marked = (hashes, box, stated) if kind == "gsm8k" else (box, stated, hashes)
    for place, answer in marked:
        if place >= 0 and answer.strip():
            return answer.strip()
    bare = solution.strip()
    if not bare or ("\n" in bare and "\\begin{" not in bare):
        where = "#### " if kind == "gsm8k" else "\\boxed{"
        raise InputError(f'a solution without a final answer (no "{where}..."): {bare[:60]!r}')
    return bare
