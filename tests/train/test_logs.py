"""What lands in a rank's log, line by line, and what must not stop a run."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_book.train.logs import close_log, rank_log, starts


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    shown = warnings.showwarning
    yield
    close_log()
    warnings.showwarning = shown


def lines(out: Path, rank: int = 0) -> list[str]:
    """What was written, without the time of day, which must be there."""
    found = (out / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8").splitlines()
    stamp = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
    assert stamp.match(found[0])
    assert stamp.sub("", found[0]).startswith(f"INFO    log of process {os.getpid()} on ")
    return [text for line in found if " log of process " not in (text := stamp.sub("", line))]


def test_every_line_is_on_disk_at_once_and_goes_to_the_end(tmp_path) -> None:
    rank_log(tmp_path, 3).info("step %d: %.2f s", 1, 0.5)
    assert lines(tmp_path, 3) == ["INFO    step 1: 0.50 s"]
    rank_log(tmp_path, 3).info("again")
    assert lines(tmp_path, 3) == ["INFO    step 1: 0.50 s", "INFO    again"]


def test_starts_are_counted(tmp_path) -> None:
    assert starts(tmp_path) is None
    rank_log(tmp_path, 1)
    for _ in range(3):
        rank_log(tmp_path, 0).info("something")
    assert starts(tmp_path) == 3


def test_an_error_with_its_whole_traceback(tmp_path) -> None:
    log = rank_log(tmp_path, 0)
    try:
        raise RuntimeError("no luck")
    except RuntimeError:
        log.exception("failed in step %d", 2)
    found = lines(tmp_path)
    assert found[0] == "ERROR   failed in step 2" and found[1].startswith("Traceback")
    assert found[-1] == "RuntimeError: no luck" and any("test_logs.py" in line for line in found)


def test_warnings_and_torchs_log_are_in_it_and_still_shown(tmp_path, capsys, monkeypatch) -> None:
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: seen.append(str(message)))
        rank_log(tmp_path, 0)
        rank_log(tmp_path, 0)  # once more doesn't write twice
        warnings.warn("too hot", UserWarning, stacklevel=1)
    logging.getLogger("torch.distributed.something").warning("slow %s", "network")
    assert seen == ["too hot"]
    first, second = lines(tmp_path)
    assert first.startswith("WARNING ") and first.endswith("UserWarning: too hot") and "test_logs.py" in first
    assert second == "WARNING slow network"


def test_the_screen_gets_nothing(tmp_path, capsys) -> None:
    rank_log(tmp_path, 0).warning("for the file")
    assert capsys.readouterr().err == ""


def test_another_run_has_another_log(tmp_path) -> None:
    rank_log(tmp_path / "a", 0).info("one")
    rank_log(tmp_path / "b", 1).info("two")
    assert lines(tmp_path / "a") == ["INFO    one"] and lines(tmp_path / "b", 1) == ["INFO    two"]
    close_log()
    logging.getLogger("dsv3_book.train").info("to nobody")
    assert lines(tmp_path / "b", 1) == ["INFO    two"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path, capsys) -> None:
    (tmp_path / "logs").mkdir()
    os.symlink("/dev/full", tmp_path / "logs" / "rank-0.log")
    log = rank_log(tmp_path, 0)
    log.info("one")
    log.info("two")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "rank-0.log gets no more lines" in said[0] and "No space left" in said[0]
