"""The machinery of the graders: a registry, cases, and an answer that helps.

A grader is a function without arguments that yields :class:`Case` objects. It carries a `reference` (usually the
package's own function) and `wrong` answers that people really give, each with a word that the hint must contain. One
parametrised test (``tests/exercises/test_graders.py``) holds every grader to them.
"""

import difflib
import importlib
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Solution = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One question to the reader's function.

    Attributes:
        args: what the function is called with. Keep it small enough to read.
        judge: gets the answer; returns ``None`` (or "") if it is right, else what is wrong with it, in a sentence.
        says: what this case is about: "a masked group has −inf, not 0".
        hint: where to look when the answer is wrong.
        kwargs: keyword arguments of the call.
    """

    args: tuple[Any, ...]
    judge: Callable[[Any], str | None]
    says: str
    hint: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grader:
    """A registered exercise: its cases, how long it takes, its solution and typical wrong answers."""

    name: str
    cases: Callable[[], Iterable[Case]]
    minutes: int
    level: str
    reference: Callable[[], Solution]
    wrong: Mapping[str, Callable[[], Solution]]

    def __call__(self, function: Solution) -> "Result":
        passed = 0
        for case in self.cases():
            problem, hint = _ask(function, case)
            if problem == _NOT_WRITTEN:
                return Result(self.name, False, passed, problem)
            if problem:
                return Result(self.name, False, passed, problem, case, hint)
            passed += 1
        return Result(self.name, True, passed)


_NOT_WRITTEN = "nothing here yet: fill in the function above, run its cell, then this one."


@dataclass(frozen=True)
class Result:
    """What `check` answers. True if every case passed; displays the first case that did not, and a hint."""

    name: str
    ok: bool
    passed: int
    problem: str = ""
    case: Case | None = None
    hint: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def _repr_markdown_(self) -> str:
        if self.ok:
            return f"✓ `{self.name}` passes all {self.passed} cases."
        if self.case is None:
            return f"○ `{self.name}`: {self.problem}"
        lines = [f"✗ `{self.name}`, case {self.passed + 1}: {self.case.says}"]
        lines += ["", f"```text\n{_call(self.case)}\n{self.problem}\n```"]
        return "\n".join(lines + (["", f"*Hint:* {self.hint}"] if self.hint else []))

    def __repr__(self) -> str:
        if self.ok or self.case is None:
            return self._repr_markdown_().replace("`", "")
        text = f"✗ {self.name}, case {self.passed + 1}: {self.case.says}\n{_call(self.case)}\n{self.problem}"
        return text + (f"\nHint: {self.hint}" if self.hint else "")


_GRADERS: dict[str, Grader] = {}


def grader(
    name: str,
    *,
    minutes: int,
    reference: Callable[[], Solution],
    wrong: Mapping[str, Callable[[], Solution]],
    level: str = "easy",
) -> Callable[[Callable[[], Iterable[Case]]], Grader]:
    """Register a function that yields cases as the exercise `name`.

    Args:
        name: ``subject.what``; the subject is the file in ``exercises/``.
        minutes: about how long it takes a reader.
        reference: returns the solution (a function of no arguments, so that nothing heavy is imported early).
        wrong: a word that the answer must contain -> a function that returns a typical wrong solution. At least one.
        level: easy, medium or hard.
    """
    if level not in ("easy", "medium", "hard"):
        raise ValueError(f"level of {name} is {level!r}; it must be easy, medium or hard")
    if not wrong:
        raise ValueError(f"grader {name} has no wrong answer: give at least one, with a word its hint must contain")

    def register(cases: Callable[[], Iterable[Case]]) -> Grader:
        if name in _GRADERS:
            raise ValueError(f"two graders are called {name}")
        _GRADERS[name] = Grader(name, cases, minutes, level, reference, dict(wrong))
        return _GRADERS[name]

    return register


def all_graders() -> dict[str, Grader]:
    """Every grader, by name; imports all files of ``exercises/``."""
    package = importlib.import_module("dsv3_book.exercises")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dsv3_book.exercises.{module.name}")
    return dict(sorted(_GRADERS.items()))


def check(name: str, function: Any) -> Result:
    """Run `function` against the cases of the exercise `name`.

    Returns:
        A :class:`Result`: true if all cases pass; in a notebook it shows the first failing case and a hint. An
        error that your function raises is reported with the line of yours that raised it.

    Raises:
        LookupError: there is no such exercise (the message lists those there are).
        TypeError: `function` can't be called.
    """
    subject = name.split(".")[0]
    package = importlib.import_module("dsv3_book.exercises")
    if subject in {module.name for module in pkgutil.iter_modules(package.__path__)}:
        importlib.import_module(f"dsv3_book.exercises.{subject}")
    if name not in _GRADERS:
        names = list(all_graders())
        near = difflib.get_close_matches(name, names, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise LookupError(f"no exercise is called {name!r}.{guess} There are: {', '.join(names) or 'none yet'}")
    if not callable(function):
        raise TypeError(
            f"check({name!r}, …) wants your function, got {type(function).__name__}: pass its name without ()"
        )
    return _GRADERS[name](function)


def _ask(function: Solution, case: Case) -> tuple[str, str]:
    """Call the function on one case. Returns what is wrong ("" if nothing) and a hint."""
    try:
        answer = function(*case.args, **case.kwargs)
    except NotImplementedError:
        return _NOT_WRITTEN, ""
    except Exception as error:
        return _own_lines(error), "The function raised an error; the line is named above."
    if answer is None or answer is Ellipsis:
        empty = not getattr(getattr(function, "__code__", None), "co_names", ("?",)) and answer is None
        return (_NOT_WRITTEN, "") if empty or answer is Ellipsis else ("It returned None.", "Is a `return` missing?")
    try:
        return case.judge(answer) or "", case.hint
    except Exception as error:
        return f"The answer {_short(answer)} could not be compared ({type(error).__name__}: {error}).", case.hint


def _own_lines(error: Exception) -> str:
    """The error and the reader's own lines of its traceback; the grader's frames are left out."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = [f"  line {f.lineno} in {f.name}: {f.line}" for f in frames[-2:] if f.line]
    return "\n".join([f"It raised {type(error).__name__}: {error}", *where])


def _short(value: Any, limit: int = 400) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + " …"


def _call(case: Case) -> str:
    values = [_short(a) for a in case.args] + [f"{k}={_short(v)}" for k, v in case.kwargs.items()]
    lines = [f"called with {values[0]}"] if values else ["called without arguments"]
    return "\n".join(lines + [f"            {value}" for value in values[1:]])


def same(expected: Any) -> Callable[[Any], str | None]:
    """A judge: the answer must equal `expected` (numbers, tuples, strings; tensors element by element, dtype aside)."""

    def judge(answer: Any) -> str | None:
        if hasattr(expected, "shape"):
            import torch

            if not isinstance(answer, torch.Tensor):
                return f"returned a {type(answer).__name__}, expected a tensor of shape {tuple(expected.shape)}"
            if answer.shape != expected.shape:
                return f"returned shape {tuple(answer.shape)}, expected {tuple(expected.shape)}"
            right = bool((answer == expected).all())
        else:
            right = bool(answer == expected)
        return None if right else f"returned  {_short(answer)}\nexpected  {_short(expected)}"

    return judge


def close(expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> Callable[[Any], str | None]:
    """A judge: the answer must have the shape of `expected` and be close to it; names the largest difference."""

    def judge(answer: Any) -> str | None:
        import torch

        want = torch.as_tensor(expected, dtype=torch.float64)
        if isinstance(answer, int | float):
            answer = torch.tensor(answer, dtype=torch.float64)
        if not isinstance(answer, torch.Tensor):
            return f"returned a {type(answer).__name__}, expected a tensor of shape {tuple(want.shape)}"
        if answer.shape != want.shape:
            return f"returned shape {tuple(answer.shape)}, expected {tuple(want.shape)}"
        got = answer.detach().to(torch.float64)
        if torch.allclose(got, want, rtol=rtol, atol=atol, equal_nan=False):
            return None
        gap = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(torch.inf)
        worst = tuple(torch.unravel_index(gap.argmax(), want.shape)) if want.ndim else ()
        at = f" at {[int(i) for i in worst]}" if want.ndim else ""
        return (f"returned  {_short(answer.detach())}\nexpected  {_short(torch.as_tensor(expected))}\n"
                f"largest difference {gap.max():.3g}{at}")  # fmt: skip

    return judge
