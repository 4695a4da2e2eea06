"""What `check` answers: right, wrong, unfinished, raised, and asked for something that isn't there."""

import pytest

from dsv3_book.exercises import grading
from dsv3_book.exercises.grading import Case, check, close, grader, same


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(grading, "_GRADERS", dict(grading._GRADERS))

    @grader("sample.double", minutes=1, reference=lambda: lambda x: 2 * x, wrong={"twice": lambda: lambda x: x})
    def cases():
        yield Case((1,), same(2), says="one", hint="Add it twice.")
        yield Case((3,), same(6), says="three")

    return cases


def test_right(double):
    result = check("sample.double", lambda x: x + x)
    assert result
    assert repr(result) == "✓ sample.double passes all 2 cases."


def test_wrong_names_the_case_the_numbers_and_a_hint(double):
    result = check("sample.double", lambda x: x)
    assert not result
    for word in ("case 1: one", "called with 1", "returned  1", "expected  2", "Hint: Add it twice."):
        assert word in repr(result)
    assert "*Hint:* Add it twice." in result._repr_markdown_()


def test_unfinished(double):
    def stub(x): ...

    def stub2(x):
        raise NotImplementedError

    for function in (stub, stub2, lambda x: ...):
        result = check("sample.double", function)
        assert not result
        assert "nothing here yet" in repr(result)
    forgot = check("sample.double", lambda x: print(end=""))
    assert "returned None" in repr(forgot)
    assert "return" in forgot.hint


def test_an_error_shows_the_readers_line_only(double):
    def broken(x):
        return x / 0

    text = repr(check("sample.double", broken))
    assert "ZeroDivisionError" in text
    assert "return x / 0" in text
    assert "grading.py" not in text


def test_unknown_and_uncallable(double):
    with pytest.raises(
        LookupError, match=r"'sample.duoble'. Did you mean 'sample.double'\? There are: .*sample.double"
    ):
        check("sample.duoble", len)
    with pytest.raises(TypeError, match="pass its name without"):
        check("sample.double", 3)


def test_registry_asks_for_what_it_needs(double):
    with pytest.raises(ValueError, match="two graders"):
        grader("sample.double", minutes=1, reference=lambda: len, wrong={"a": lambda: len})(list)
    with pytest.raises(ValueError, match="no wrong answer"):
        grader("sample.x", minutes=1, reference=lambda: len, wrong={})
    with pytest.raises(ValueError, match="easy, medium or hard"):
        grader("sample.x", minutes=1, reference=lambda: len, wrong={"a": lambda: len}, level="mean")


def test_judges():
    import torch

    want = torch.tensor([1.0, 2.0])
    assert close(want)(want + 1e-8) is None
    assert "shape (1,), expected (2,)" in (close(want)(torch.ones(1)) or "")
    assert "largest difference 1 at [1]" in (close(want)(torch.tensor([1.0, 3.0])) or "")
    assert "largest difference inf" in (close(want)(torch.tensor([1.0, torch.nan])) or "")
    assert "returned a str" in (close(want)("x") or "")
    assert same(want)(want.double()) is None
    assert "expected a tensor" in (same(want)([1.0, 2.0]) or "")
    assert "shape" in (same(want)(torch.ones(3)) or "")
