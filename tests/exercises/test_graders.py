"""Every grader passes its reference, and answers each of its typical mistakes with the word that belongs to it."""

import pytest

from dsv3_book.exercises import all_graders, check

GRADERS = all_graders()


@pytest.mark.parametrize("name", GRADERS)
def test_reference_passes(name):
    result = check(name, GRADERS[name].reference())
    assert result, result
    assert result.passed >= 1


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, grader in GRADERS.items() for word in grader.wrong])
def test_mistake_gets_its_hint(name, word):
    result = check(name, GRADERS[name].wrong[word]())
    assert not result, f"{name} lets the mistake {word!r} pass"
    assert word in repr(result)


@pytest.mark.parametrize("name", GRADERS)
def test_a_stub_is_not_a_mistake(name):
    assert "nothing here yet" in repr(check(name, lambda *args, **kwargs: ...))
