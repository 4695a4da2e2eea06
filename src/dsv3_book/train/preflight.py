"""Before minutes are lost: do all processes agree, do they see one folder, is there room, does the network work?

`preflight` is called by the trainer as soon as the processes are joined. It can be run alone, as the job would be:

    torchrun … -m dsv3_book.train.preflight --preset … --out …
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3_book import checkpoint
from dsv3_book.costs import count
from dsv3_book.parallel import DataParallel
from dsv3_book.parallel.contact import SUM_BYTES, Contact, NoWord, measure
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.machine import Facts, hostname_warning, look
from dsv3_book.train.presets import from_command_line

PATIENCE = 120.0  # seconds for one answer: joining thousands of ranks over NCCL takes a while


class PreflightError(ValueError):
    """Training could not go well; says what is wrong, where, and what to do. The same on every rank."""


def preflight(config: TrainConfig, world: DataParallel, say: Callable[[str], None] | None = None) -> None:
    """Compares all processes, tries folder, disk and network, and says what it found in a line. All must call it.

    world: all processes of the run.  say: what rank 0 does with that line, and with warnings (None: print to stderr).

    Raises:
        PreflightError: the first stage that found something wrong, on every rank, with all that this stage found.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    contact = Contact(world, min(config.parallel.timeout, PATIENCE))
    facts = look(config, world)
    try:
        agreed = contact.settle(asdict(facts), lambda all_facts: _compare(config, [Facts(**f) for f in all_facts]))
        _require(agreed["problems"])
        mine = {
            "who": facts.who,
            "folder": read_and_write(config.out, agreed["nonce"], world.rank) if facts.local_rank == 0 else None,
            "network": measure(world, contact.timeout),
        }
        tried = contact.settle(mine, lambda answers: _conclude(config, answers, agreed["nonce"]))
        _require(tried["problems"])
    except NoWord as error:
        raise PreflightError(f"{error}: see that rank's log, and whether its host is up") from None
    if world.rank == 0:
        for warning in agreed["warnings"]:
            say(f"warning: {warning}")
        if world.size > 1:
            hosts = agreed["hosts"]
            say(f"preflight: {world.size} processes on {len(hosts)} host(s) ({_some(hosts)}) agree; {tried['report']}")


def _require(problems: list[str]) -> None:
    if problems:
        raise PreflightError("; ".join(problems))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


# What all must agree on ----------------------------------------------------------------------------------------------
def _compare(config: TrainConfig, facts: list[Facts]) -> dict[str, Any]:
    """Rank 0's judgement of everybody's facts; where they agree, it leaves a file for the others to find."""
    problems, nonce = list(disagreements(config, facts)), uuid.uuid4().hex
    if not problems:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            _file(config.out, nonce).write_text(nonce)
        except OSError as error:
            problems.append(f"{facts[0].who} can't write to --out {config.out} ({error.strerror}): name another")
    hosts = list(dict.fromkeys(f.host for f in facts))
    return {"problems": problems, "warnings": list(warnings(facts)), "nonce": nonce, "hosts": hosts}


def disagreements(config: TrainConfig, facts: list[Facts]) -> Iterator[str]:
    """What keeps these processes from training together, one sentence each."""
    for name in facts[0].versions:
        yield from _differs(name, facts, lambda f: f.versions.get(name, "none"), "install the same on all hosts")  # noqa: B023
    yield from _differs("the code of dsv3_book", facts, lambda f: f.source, "copy the same to all hosts")
    for other in facts[1:]:
        if changed := checkpoint.differences(facts[0].settings, other.settings):
            yield f"{other.who} was started with other settings than rank 0 ({'; '.join(changed)}): give all the same"
            break
    for path in facts[0].data:
        missing = [f for f in facts if f.data.get(path) == "nothing"]
        if 0 < len(missing) < len(facts):  # if it is nowhere, reading it says better what is wrong with it
            yield f"there is nothing to read at {path} for {_who(missing)}: every host needs it there, shared or copied"
        elif not missing:
            yield from _differs(f"what lies at {path}", facts, lambda f: f.data.get(path, ""), "copy it again")  # noqa: B023
    yield from _badly_placed(config, facts)
    yield from _badly_equipped(facts)


def _badly_placed(config: TrainConfig, facts: list[Facts]) -> Iterator[str]:
    different = list(
        _differs("the number of processes of a host", facts, lambda f: str(f.local_size), "give all --nproc-per-node")
    )
    if different:
        yield from different
        return
    size = facts[0].local_size
    strays = [f for f in facts if f.host != facts[f.rank // size * size].host]
    if strays and config.parallel.ranks_per_node is None:
        yield (
            f"ranks don't follow each other on a host ({strays[0].who}, but rank {strays[0].rank // size * size} on "
            f"{facts[strays[0].rank // size * size].host}): number them host by host, as torchrun does"
        )
    try:
        config.layout(len(facts), size)
    except ValueError as error:
        yield str(error)


def _badly_equipped(facts: list[Facts]) -> Iterator[str]:
    without = [f for f in facts if f.gpu is None]
    if without and len(without) < len(facts):
        yield f"some processes compute on GPUs, but {_who(without)} has none: see its driver and CUDA_VISIBLE_DEVICES"
    used: dict[tuple[str, str], Facts] = {}
    for f in facts:
        if f.local_size > f.gpus > 0:
            yield f"{f.host} has {f.gpus} GPU(s) for {f.local_size} processes: start {f.gpus} (--nproc-per-node)"
            return
        if f.gpu is not None and (other := used.setdefault((f.host, f.gpu), f)) is not f:
            yield f"{other.who} and rank {f.rank} compute on the same GPU {f.gpu}: give each one of its own"
            return


def _differs(what: str, facts: list[Facts], value: Callable[[Facts], str], remedy: str) -> Iterator[str]:
    """A sentence if not all have the same, naming those who are not like most."""
    values = [value(f) for f in facts]
    usual, _ = Counter(values).most_common(1)[0]
    if others := [f for f, v in zip(facts, values, strict=True) if v != usual]:
        yield f"{what} differs: {value(others[0])} for {_who(others)}, but {usual} elsewhere: {remedy}"


def _who(facts: list[Facts]) -> str:
    by_host: dict[str, list[str]] = {}
    for f in facts:
        by_host.setdefault(f.host, []).append(str(f.rank))
    named = [f"rank {', '.join(ranks)} on {host}" for host, ranks in by_host.items()]
    return " and ".join(named[:3]) + (f" and {len(named) - 3} more hosts" if len(named) > 3 else "")


def warnings(facts: list[Facts]) -> Iterator[str]:
    """What may go on, but hardly as it was meant."""
    for host in dict.fromkeys(f.host for f in facts):
        here = [f for f in facts if f.host == host]
        if sum(f.threads for f in here) > here[0].cores:
            yield (
                f"{len(here)} process(es) with {here[0].threads} thread(s) each on the {here[0].cores} core(s) of "
                f"{host} get in each other's way: set OMP_NUM_THREADS={max(1, here[0].cores // len(here))}"
            )
            break
    if len({f.host for f in facts}) > 1:
        lost = [f for f in facts if not f.interface and (not f.address or f.address.startswith("127."))]
        if lost:
            yield (
                f"the name of {lost[0].host} leads to {lost[0].address or 'nothing'} there: where gloo joins processes "
                "it will look for itself only; set GLOO_SOCKET_IFNAME to the interface that connects the hosts"
            )
    names = {f.gpu.partition(" ")[2] for f in facts if f.gpu is not None}
    if len(names) > 1:
        yield f"GPUs differ ({', '.join(sorted(names))}): the slowest sets the pace"


# What must work ------------------------------------------------------------------------------------------------------
def _file(out: Path, nonce: str) -> Path:
    return out / f".preflight-{nonce}"


def read_and_write(out: Path, nonce: str, rank: int) -> str | None:
    """What keeps this host from sharing `out` with rank 0's: None, or a sentence's end."""
    try:
        if _file(out, nonce).read_text() != nonce:
            raise FileNotFoundError
    except FileNotFoundError:
        return f"doesn't see in --out {out} what rank 0 wrote there: all hosts must share that folder"
    except OSError as error:
        return f"can't read in --out {out} ({error.strerror})"
    mine = _file(out, f"{nonce}-{rank}")
    try:
        mine.write_text(nonce)
        mine.unlink()
    except OSError as error:
        return f"can't write to --out {out} ({error.strerror}): check its permissions there"
    return None


def _conclude(config: TrainConfig, answers: list[dict[str, Any]], nonce: str) -> dict[str, Any]:
    """Rank 0's judgement of what was tried."""
    _file(config.out, nonce).unlink(missing_ok=True)
    problems = [f"{a['who']} {a['folder']}" for a in answers if a["folder"]]
    if broken := [f"{a['who']} got {a['network']['error']}" for a in answers if "error" in a["network"]]:
        problems.append(
            f"the network doesn't carry messages: {_some(broken)}. Look for a firewall between the hosts, and set "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the interface that connects them"
        )
    size, free = checkpoint_bytes(config), shutil.disk_usage(config.out).free
    keep = config.every.keep
    missing = keep + 1 - min(keep, len(checkpoint.found(config.out / "checkpoints")))
    if free < missing * size:
        problems.append(
            f"{config.out} has {free / 1e9:.1f} GB free, and {missing} more checkpoint(s) of {size / 1e9:.1f} GB must "
            f"fit (--every.keep {keep}, and one being written): free some space, keep fewer, or name another --out"
        )
    if problems:
        return {"problems": problems}
    ping, total = (max(a["network"][name] for a in answers) for name in ("ping", "sum"))
    report = (
        f"slowest neighbour {ping * 1e3:.2g} ms, sum of {SUM_BYTES >> 20} MiB over all {total * 1e3:.2g} ms; "
        f"{free / 1e9:,.0f} GB free for checkpoints of {size / 1e9:.2g} GB"
    )
    return {"problems": [], "report": report}


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of one checkpoint's tensors: weights in FP32, AdamW's two moments, and the average of the weights if it is kept.

    What is left out (routing biases, step counts, tables) is less than a hundredth of it, except for toy models.
    """
    counts = count(config.model)
    moment = 2 if config.moments == "bf16" else 4
    return (counts.main + counts.mtp) * (4 + 2 * moment + (4 if config.optim.ema else 0))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 all is well, 2 something is wrong."""
    speak = os.environ.get("RANK", "0") == "0"
    world: DataParallel | None = None
    try:
        config = from_command_line(argv, speak)
        if os.environ.get("LOCAL_RANK", "0") == "0" and (warning := hostname_warning()):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        world = DataParallel.from_environment(config.parallel.timeout)
        preflight(config, world)
    except (ValueError, OSError) as error:
        if speak:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if world is not None:
            world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
