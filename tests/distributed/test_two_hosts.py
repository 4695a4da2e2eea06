"""Two hosts on one machine: two network namespaces, joined by a virtual cable, each with a name of its own.

Nothing but that cable (and the disk) is shared: torchrun has to find its rendezvous by name, gloo its interface, and
the experts' tokens cross over. Needs root and iproute2; skipped, with the reason, where that isn't to be had.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainkit import lines

from dsv3_book.train.presets import from_command_line
from dsv3_book.train.trainer import Trainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NAMES = ("host-a", "host-b")
SETTINGS = "--preset tiny --steps 8 --every.checkpoint 4 --every.validation 4 --text.held-out 0.2"
PATIENCE = 500  # seconds: half a minute is plenty on a quiet machine


class TwoHosts:
    """Hosts `host-a` (10.213.7.1) and `host-b` (10.213.7.2), and the processes that run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        self.spaces = [f"dsv3-{os.getpid()}-{name[-1]}" for name in NAMES]
        self.cards = [f"v{os.getpid()}{name[-1]}" for name in NAMES]

    def set_up(self) -> None:
        """subprocess.CalledProcessError: it isn't allowed."""
        for space in self.ip("netns", "list").split():
            owner = re.fullmatch(r"dsv3-(\d+)-[ab]", space)
            if owner and not Path(f"/proc/{owner[1]}").exists():  # left by a test that was killed
                self.remove(space)
        for space in self.spaces:
            self.ip("netns", "add", space)
        (here, there), (one, two) = self.spaces, self.cards
        self.ip("link", "add", one, "netns", here, "type", "veth", "peer", "name", two, "netns", there)
        for number, (space, card) in enumerate(zip(self.spaces, self.cards, strict=True), 1):
            self.ip("-n", space, "addr", "add", f"10.213.7.{number}/30", "dev", card)
            for link in ("lo", card):
                self.ip("-n", space, "link", "set", link, "up")
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n10.213.7.1 host-a\n10.213.7.2 host-b\n")
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")
        subprocess.run(self.inside(0, "true"), check=True, capture_output=True, text=True)

    def ip(self, *words: str) -> str:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

    def inside(self, number: int, *words: str) -> list[str]:
        """A command line that runs `words` on host `number`, as that very process."""
        files = [(self.folder / name, f"/etc/{name}") for name in ("hosts", "nsswitch.conf")]
        mounts = "".join(f"mount --bind '{ours}' {theirs} && " for ours, theirs in files)
        become = f'{mounts} hostname "$0" && exec "$@"'
        space = ["ip", "netns", "exec", self.spaces[number], "unshare", "--mount", "--uts"]
        return [*space, "sh", "-c", become, NAMES[number], *words]

    def start(self, module: str, *words: str) -> list[subprocess.Popen[str]]:
        """torchrun on both hosts, with two processes each."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        torchrun += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "host-a:29411",
            "--rdzv-id",
            f"r{len(self.processes)}",
        ]
        started = []
        for number, card in enumerate(self.cards):
            command = self.inside(number, *torchrun, "-m", module, *words)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": card}
            with (self.folder / f"{NAMES[number]}.log").open("w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True))
        self.processes += started
        return started

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for it, as long as all processes live."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            alive = all(process.poll() is None for process in self.processes)
            assert alive and time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.05)

    def said(self, number: int) -> str:
        return (self.folder / f"{NAMES[number]}.log").read_text()

    def sent(self, number: int) -> int:
        """Bytes that have left a host by the cable."""
        counter = f"/sys/class/net/{self.cards[number]}/statistics/tx_bytes"
        there = subprocess.run(self.inside(number, "sh", "-c", f"mount -t sysfs sysfs /sys; cat {counter}"), **TEXT)
        return int(there.stdout)

    def tear_down(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for space in self.spaces:
            self.remove(space)

    def remove(self, space: str) -> None:
        """A host and all that still runs on it: torchrun's children are in sessions of their own."""
        for pid in subprocess.run(["ip", "netns", "pids", space], **TEXT).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


TEXT = {"capture_output": True, "text": True}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no `{tool}` here (Debian: iproute2, util-linux)")
    pair = TwoHosts(tmp_path)
    try:
        try:
            pair.set_up()
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"network namespaces aren't allowed here: {' '.join(error.cmd[:4])} … said {error.stderr.strip()}"
            )
        yield pair
    finally:
        pair.tear_down()


def test_two_hosts_give_the_one_process_curve(hosts: TwoHosts, corpus: Path, tmp_path: Path) -> None:
    """Experts over both hosts, tokens in two hops. One host is told to stop in the middle, as in a pre-emption: all
    four processes save, and the same command goes on."""
    words = [*SETTINGS.split(), "--data", str(corpus), "--prompt", "def ", "--parallel.ep", "4"]
    config = from_command_line([*words, "--out", str(tmp_path / "two")])
    assert config.layout(4, 2).axes == {"pp": 1, "edp": 1, "across": 2, "inside": 2}

    first, second = hosts.start("dsv3_book.train", *words, "--out", str(tmp_path / "two"))
    metrics = tmp_path / "two" / "metrics.jsonl"
    hosts.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    second.send_signal(signal.SIGTERM)
    hosts.until(lambda: "stopped after step" in hosts.said(0))
    assert second.wait(PATIENCE) != 0, "torchrun passes the signal on, and owns up to it"
    first.kill()  # all is saved; this torchrun would wait five minutes for the other one, deaf to SIGTERM
    first.wait()
    assert "preflight: 4 processes on 2 host(s) (host-a, host-b) agree" in hosts.said(0)
    stopped = [line["step"] for line in lines(tmp_path / "two")][-1]
    assert f"stopped after step {stopped} of 8" in hosts.said(0) and 2 <= stopped < 8, hosts.said(0)

    for process in hosts.start("dsv3_book.train", *words, "--out", str(tmp_path / "two")):
        assert process.wait(PATIENCE) == 0, hosts.said(0) + hosts.said(1)
    assert f"going on after step {stopped} of 8" in hosts.said(0) and "A sample after" in hosts.said(0)
    assert min(hosts.sent(0), hosts.sent(1)) > 500_000

    alone = from_command_line([*words, "--out", str(tmp_path / "one"), "--parallel.ep", "1"])
    trainer = Trainer(alone, quiet=True)
    trainer.run()
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for x, y in zip(one, two, strict=True):
        assert y == pytest.approx(x, rel=1e-5), f"step {x['step']}"


def test_a_folder_that_only_one_host_has(hosts: TwoHosts, corpus: Path, tmp_path: Path) -> None:
    """Preflight alone, where the second host has a folder of its own under the name of --out."""
    out, local = tmp_path / "run", tmp_path / "local"
    out.mkdir()
    local.mkdir()
    hosts.folder.joinpath("mounted").write_text("")
    inside = hosts.inside

    def elsewhere(number: int, *words: str) -> list[str]:
        mount = ["sh", "-c", f"mount --bind '{local}' '{out}' && exec \"$@\"", "sh"] if number == 1 else []
        return inside(number, *mount, *words)

    hosts.inside = elsewhere  # type: ignore[method-assign]
    words = ["--preset", "tiny", "--data", str(corpus), "--out", str(out)]
    statuses = [process.wait(PATIENCE) for process in hosts.start("dsv3_book.train.preflight", *words)]
    assert statuses == [1, 1], hosts.said(0)  # torchrun's
    wrong = "error: rank 2 on host-b doesn't see in --out"
    assert wrong in hosts.said(0) and "all hosts must share that folder" in hosts.said(0)
