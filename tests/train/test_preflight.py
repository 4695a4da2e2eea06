"""Preflight: what it compares, what it tries, and that everybody is told the same."""

import dataclasses
import shutil
import time
from typing import Any

import pytest
import torch
from trainkit import small

from dsv3_book.parallel import DataParallel, contact
from dsv3_book.parallel.contact import measure
from dsv3_book.train import machine, preflight
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.machine import Facts
from dsv3_book.train.preflight import PreflightError, checkpoint_bytes, disagreements, warnings
from dsv3_book.train.presets import preset
from dsv3_book.train.trainer import Trainer


def fact(rank: int, **changes: Any) -> Facts:
    """Of one of four processes with a GPU each, two on each of two hosts."""
    usual: dict[str, Any] = {
        "rank": rank,
        "host": f"host-{'ab'[rank // 2]}",
        "local_rank": rank % 2,
        "local_size": 2,
        "versions": {"Python": "3.11.9", "torch": "2.13.0"},
        "source": "abc",
        "settings": {"steps": 10, "optim": {"lr": 1e-3}},
        "data": {"/texts": "3 file(s), 100 bytes"},
        "cores": 8,
        "threads": 4,
        "gpu": f"{rank % 2} (H800)",
        "gpus": 2,
        "address": f"10.0.0.{rank // 2 + 1}",
    }
    return Facts(**usual | changes)


CONFIG = preset("tiny", "runs/none")
CPU: dict[str, Any] = {"gpu": None, "gpus": 0}


def found(*facts: Facts, config: TrainConfig = CONFIG) -> list[str]:
    return list(disagreements(config, list(facts)))


def test_equal_processes_agree():
    assert found(*map(fact, range(4))) == [] and list(warnings([fact(rank) for rank in range(4)])) == []
    assert found(*(fact(rank, **CPU) for rank in range(4))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {2: {"versions": {"Python": "3.11.9", "torch": "2.12.0"}}},
            "torch differs: 2.12.0 for rank 2 on host-b, but 2.13.0 elsewhere: install the same on all hosts",
        ),
        (
            {0: {"versions": {"Python": "3.12.1", "torch": "2.13.0"}}},
            "Python differs: 3.12.1 for rank 0 on host-a, but 3.11.9 elsewhere",
        ),
        (
            {2: {"source": "xyz"}, 3: {"source": "xyz"}, 1: {"source": "xyz"}},
            "the code of dsv3_book differs: abc for rank 0 on host-a, but xyz elsewhere: copy the same to all hosts",
        ),
        (
            {3: {"settings": {"steps": 10, "optim": {"lr": 1e-4}}}},
            "rank 3 on host-b was started with other settings than rank 0 (optim.lr: 0.001 → 0.0001)",
        ),
        (
            {2: {"local_size": 1}},
            "the number of processes of a host differs: 1 for rank 2 on host-b, but 2 elsewhere: give all --nproc-per",
        ),
        (
            {1: {"host": "host-b", "gpu": "0 (H800)"}, 2: {"host": "host-a", "gpu": "1 (H800)"}},
            "ranks don't follow each other on a host (rank 1 on host-b, but rank 0 on host-a)",
        ),
        (
            {2: {"data": {"/texts": "nothing"}}, 3: {"data": {"/texts": "nothing"}}},
            "there is nothing to read at /texts for rank 2, 3 on host-b: every host needs it there, shared or copied",
        ),
        (
            {3: {"data": {"/texts": "2 file(s), 90 bytes"}}},
            "what lies at /texts differs: 2 file(s), 90 bytes for rank 3 on host-b, but 3 file(s), 100 bytes elsewhere",
        ),
        ({1: CPU}, "some processes compute on GPUs, but rank 1 on host-a has none"),
        ({2: {"gpus": 1}}, "host-b has 1 GPU(s) for 2 processes: start 1 (--nproc-per-node)"),
        ({1: {"gpu": "0 (H800)"}}, "rank 0 on host-a and rank 1 compute on the same GPU 0 (H800)"),
    ],
)
def test_what_differs_is_named_with_the_remedy(changes, message):
    problems = found(*(fact(rank, **changes.get(rank, {})) for rank in range(4)))
    assert len(problems) == 1 and problems[0].startswith(message)


def test_several_problems_are_told_at_once():
    problems = found(fact(0), fact(1), fact(2, source="x"), fact(3, versions={"Python": "3.13", "torch": "2.13.0"}))
    assert [problem.partition(" differs")[0] for problem in problems] == ["Python", "the code of dsv3_book"]


def test_many_hosts_are_not_all_listed():
    facts = [fact(0, host="h0", local_size=1)]
    facts = [dataclasses.replace(facts[0], rank=r, host=f"h{r}", source="new" if r > 4 else "old") for r in range(9)]
    (problem,) = (p for p in found(*facts) if "code" in p)
    assert problem.startswith(
        "the code of dsv3_book differs: new for rank 5 on h5 and rank 6 on h6 and rank 7 on h7 and 1 m"
    )


def test_the_layout_must_fit_the_processes():
    parallel = dataclasses.replace(CONFIG.parallel, pp=3)
    (problem,) = found(*map(fact, range(4)), config=dataclasses.replace(CONFIG, parallel=parallel))
    assert "4 processes don't divide into pipelines of parallel.pp = 3" in problem
    played = dataclasses.replace(CONFIG, parallel=dataclasses.replace(CONFIG.parallel, ranks_per_node=1))
    assert found(*(fact(rank, host="one", address="") for rank in range(4)), config=played) == [
        "rank 0 on one and rank 2 compute on the same GPU 0 (H800): give each one of its own"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {2: {"threads": 8}, 3: {"threads": 8}},
            "2 process(es) with 8 thread(s) each on the 8 core(s) of host-b get in",
        ),
        ({2: {"address": "127.0.1.1"}}, "the name of host-b leads to 127.0.1.1 there"),
        ({3: {"address": ""}}, "the name of host-b leads to nothing there"),
        ({2: {"gpu": "0 (H100)"}}, "GPUs differ ((H100), (H800)): the slowest sets the pace"),
    ],
)
def test_warnings(changes, message):
    (warning,) = warnings([fact(rank, **changes.get(rank, {})) for rank in range(4)])
    assert warning.startswith(message)


def test_an_interface_settles_the_address():
    assert list(warnings([fact(rank, address="127.0.1.1", interface="eth0") for rank in range(4)])) == []
    assert list(warnings([fact(rank, host="one", address="127.0.1.1") for rank in range(2)])) == []


@pytest.mark.parametrize(
    ("here", "environment", "warned"),
    [
        ("127.0.1.1", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
        ("", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
        ("10.0.0.1", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ("127.0.1.1", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False),
        ("127.0.1.1", {}, False),
        ("127.0.1.1", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth0"}, False),
    ],
)
def test_a_host_name_that_leads_nowhere_is_told_before_joining(monkeypatch, here, environment, warned):
    monkeypatch.setattr(machine, "address", lambda: here)
    warning = machine.hostname_warning(environment)
    assert (warning is not None) == warned
    if warning:
        assert "GLOO_SOCKET_IFNAME" in warning and (here or "leads nowhere") in warning


def test_what_is_looked_at(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text("{}")
    data = (str(tmp_path / "a.txt"), f"shards:{tmp_path / 'shards'}", "hf:someone/texts", str(tmp_path / "none.txt"))
    config = preset(
        "tiny", tmp_path, data=data, text=dataclasses.replace(CONFIG.text, tokenizer=str(tmp_path / "t.json"))
    )
    found = machine.looked_at(config)
    assert found[data[0]] == "1 file(s), 5 bytes"
    assert found[data[1]].startswith("shards ") and found[data[2]] == "a data set of the hub"
    assert found[data[3]] == found[config.text.tokenizer] == "nothing"
    assert machine.looked_at(preset("tiny", data=(str(tmp_path / "shards"),))).popitem()[1] == found[data[1]]
    (tmp_path / "shards" / "shards.json").write_text("{ }")
    assert machine.looked_at(config)[data[1]] != found[data[1]]


@pytest.mark.parametrize("change", [{}, {"moments": "bf16"}, {"ema": 0.0}])
def test_a_checkpoint_is_as_large_as_said(tmp_path, corpus, change):
    config = small(tmp_path, corpus, steps=1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **change))
    trainer = Trainer(config, quiet=True)
    trainer.run()
    trainer.folder.release()
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert checkpoint_bytes(config) == pytest.approx(size, rel=0.25)  # of a toy, a good part is names
    assert checkpoint_bytes(config) < size


def test_one_process_is_quick_and_leaves_nothing(tmp_path):
    said: list[str] = []
    began = time.perf_counter()
    preflight.preflight(preset("tiny", tmp_path), DataParallel(), said.append)
    assert time.perf_counter() - began < 20  # (it takes a twentieth of a second; a machine may be busy)
    assert list(tmp_path.iterdir()) == []
    assert all(line.startswith("warning: 1 process(es) with") for line in said)


def test_a_full_disk(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=int(2.5 * checkpoint_bytes(CONFIG)))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: free)
    with pytest.raises(PreflightError, match=r"GB free, and 3 more checkpoint\(s\) of .* must fit \(--every\.keep 2,"):
        preflight.preflight(preset("tiny", tmp_path), DataParallel())
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)  # one of them is there already
    preflight.preflight(preset("tiny", tmp_path), DataParallel())


def test_a_folder_nobody_can_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"rank 0 on .* can't write to --out .*file/run .*: name another"):
        preflight.preflight(preset("tiny", tmp_path / "file" / "run"), DataParallel())


def test_run_alone(tmp_path, capsys):
    assert preflight.main(["--preset", "tiny", "--out", str(tmp_path)]) == 0
    assert preflight.main(["--preset", "tiny", "--out", str(tmp_path), "--parallel.pp", "2"]) == 2
    assert "error: 1 processes don't divide into pipelines" in capsys.readouterr().err


def test_a_folder_that_can_be_read_only(tmp_path, monkeypatch):
    (tmp_path / ".preflight-n").write_text("n")
    assert preflight.read_and_write(tmp_path, "n", 1) is None
    (tmp_path / ".preflight-n-1").mkdir()  # (root may write anywhere else)
    assert "can't write to --out" in (preflight.read_and_write(tmp_path, "n", 1) or "")
    assert "doesn't see" in (preflight.read_and_write(tmp_path, "m", 1) or "")


def test_the_wrong_message_is_no_message(monkeypatch):
    monkeypatch.setattr(contact, "_ring", lambda parallel: (_ for _ in ()).throw(RuntimeError("reset\nby peer")))
    parallel = DataParallel(0, 2, None, torch.device("cpu"))
    assert measure(parallel, 5) == {"error": "no message from rank 1: reset"}
