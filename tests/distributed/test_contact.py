"""Preflight and first contact with real processes: everybody is told the same, and whoever is silent is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.contact import Contact, NoWord, measure
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.machine import Facts
from dsv3_book.train.preflight import PreflightError
from dsv3_book.train.presets import preset

pytestmark = pytest.mark.distributed
CONFIG = preset("tiny", "runs/none")


def attempt(config: TrainConfig, liar: int | None = None, lie: Any = None) -> tuple[str, list[str]]:
    """Preflight's error here ("" if none) and what it said; `lie` makes the facts of rank `liar` other ones."""
    from dsv3_book.train import preflight

    world, said, look = DataParallel.from_environment(), [], preflight.look
    try:
        if world.rank == liar:
            preflight.look = lambda *args: lie(look(*args))
        preflight.preflight(config, world, said.append)
    except PreflightError as error:
        return str(error), said
    finally:
        preflight.look = look
    return "", said


def test_three_processes_agree(pool, tmp_path):
    config = preset("tiny", tmp_path, batch=dataclasses.replace(CONFIG.batch, start=24, end=24, multiple=24))
    (error, said), *others = pool(3).run(attempt, config)
    assert error == "" and others == [("", [])] * 2
    assert "preflight: 3 processes on 1 host(s)" in said[-1] and "sum of 4 MiB over all" in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_everybody_is_told_of_the_one_who_differs(pool, tmp_path):
    def lie(facts: Facts) -> Facts:
        return dataclasses.replace(facts, versions={**facts.versions, "torch": "1.0"}, host="elsewhere")

    answers = pool(2).run(attempt, preset("tiny", tmp_path), 1, lie)
    assert answers[0] == answers[1]
    assert "torch differs: 1.0 for rank 1 on elsewhere" in answers[0][0] or "for rank 0 on" in answers[0][0]
    assert list(tmp_path.iterdir()) == []


def elsewhere(config: TrainConfig, out: str) -> str:
    """Rank 1 plays another host, whose folder of that name is another, or can't be written to."""
    from dsv3_book.train import preflight

    world = DataParallel.from_environment()
    look, file = preflight.look, preflight._file
    try:
        if world.rank == 1:
            preflight.look = lambda *args: dataclasses.replace(look(*args), host="elsewhere", local_rank=0)
            preflight._file = lambda _, nonce: file(Path(out), nonce)
        preflight.preflight(config, world)
    except PreflightError as error:
        return str(error)
    finally:
        preflight.look, preflight._file = look, file
    return ""


def test_a_folder_that_is_not_shared(pool, tmp_path):
    config = preset("tiny", tmp_path / "run", parallel=dataclasses.replace(CONFIG.parallel, ranks_per_node=1))
    (tmp_path / "local").mkdir()
    one, two = pool(2).run(elsewhere, config, str(tmp_path / "local"))
    assert one == two and "rank 1 on elsewhere doesn't see in --out" in one
    assert "all hosts must share that folder" in one and list((tmp_path / "run").iterdir()) == []


def silent(seconds: float) -> str:
    """Rank 1 says nothing."""
    parallel = DataParallel.from_environment()
    conversation = Contact(parallel, seconds)
    if parallel.rank == 1:
        return ""
    try:
        conversation.settle(parallel.rank, sum)
    except NoWord as error:
        return str(error)
    return "?"


def test_who_is_silent_is_named(pool):
    assert pool(3).run(silent, 0.5) == ["no word from rank 1 within 0.5 s", "", "no word from rank 1 within 0.5 s"]
    assert pool(3).run(contacted) == [[3, 0, 1, 2]] * 3  # and the next conversation is another


def contacted() -> list[int]:
    parallel = DataParallel.from_environment()
    return Contact(parallel, 30).settle(parallel.rank, lambda ranks: [len(ranks), *ranks])


def unheard() -> dict[str, Any]:
    """Rank 1 takes no part."""
    parallel = DataParallel.from_environment()
    return {} if parallel.rank == 1 else measure(parallel, 0.5)


def test_messages_that_never_come(tmp_path):
    from dsv3_book.parallel.workers import Pool

    with Pool(2) as own:  # it is of no use afterwards
        assert own.run(unheard) == [{"error": "no message from rank 1 within 0.5 s"}, {}]


def test_a_broken_network_is_everybodys_error(pool, tmp_path):
    def broken(config: TrainConfig) -> str:
        from dsv3_book.train import preflight

        world, before = DataParallel.from_environment(), preflight.measure
        preflight.measure = lambda *_: (
            {"error": "no message from rank 0 within 9 s"} if world.rank else {"ping": 0, "sum": 0}
        )
        try:
            preflight.preflight(config, world)
        except PreflightError as error:
            return str(error)
        finally:
            preflight.measure = before
        return ""

    one, two = pool(2).run(broken, preset("tiny", tmp_path))
    assert (
        one == two
        and "the network doesn't carry messages: rank 1 on" in one
        and "no message from rank 0 within 9 s" in one
    )
