"""A run's report, RUN/report.html: settings, numbers, curves, loss spikes, loads of experts, in one file that needs no
network and no scripts. Made from `run.json`, `metrics.jsonl` and, if it is there, `load.jsonl`:

    python -m dsv3_book.train.report --out RUN
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_book.plot import theme
from dsv3_book.train.curves import POINTS, curve, load_now, load_over_time
from dsv3_book.train.live import clock, size
from dsv3_book.train.metrics import LOADS
from dsv3_book.train.recorded import Run, number
from dsv3_book.train.spikes import FEWEST, THRESHOLD, WINDOW, find_spikes, told

AVERAGED = 20  # steps over which the last loss is averaged
AVERAGES = f"<p class=under>At most {POINTS} points: each the mean of its steps, and around it, paler, their range.</p>"
SHOWN = 4  # routers whose load is drawn over time


def write_report(out: Path) -> Path:
    """Writes `out`/report.html and returns its path; a report that is there is replaced, at once and as a whole.

    The run may be unfinished, may have done one step or none, and may have no validation yet.

    Raises:
        FileNotFoundError: there is no run in `out`.
        ValueError: its run.json is no JSON object.
    """
    run = Run.read(out)
    page, temporary = out / "report.html", out / ".report.html"
    temporary.write_text(document(run), encoding="utf-8")
    os.replace(temporary, page)
    return page


# The page ------------------------------------------------------------------------------------------------------------
STYLE = """
*{box-sizing:border-box}body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}:root{--page:#fff}@media (prefers-color-scheme:dark){:root{--page:#14171b}}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .6rem}
p{max-width:44rem;margin:.5rem 0}.under{color:var(--grey)}figure{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--light);border-radius:6px;padding:.5rem .7rem}
dt{font-size:.8rem;color:var(--grey)}dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
dd small{display:block;font-size:.78rem;line-height:1.3;color:var(--grey)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20.5rem,100%),1fr));gap:.8rem}
details{margin:.4rem 0}summary{cursor:pointer;padding:.2rem 0}
table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0 .8rem}
td,th{text-align:left;vertical-align:top;padding:.15rem 1.2rem .15rem 0;border-bottom:1px solid var(--light);
font-weight:normal;overflow-wrap:anywhere}th{color:var(--grey)}
"""


def document(run: Run) -> str:
    """The whole page."""
    title = html.escape(f"Run {run.name}")
    parts = [
        f"<h1>{title}</h1><p class=under>{html.escape(_state(run))}</p>",
        _tiles(numbers(run)),
        "<h2>Curves</h2>" + (AVERAGES if len(run.steps) > POINTS else "") + _figures(curves(run)),
        "<h2>Loss spikes</h2>" + spikes(run),
        "<h2>Load of the experts</h2>" + experts(run),
        "<h2>Layout and settings</h2>" + settings(run.settings),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{theme()}{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _state(run: Run) -> str:
    total, done = number(run.settings, "steps"), int(run.steps[-1]["step"]) if run.steps else 0
    of = f"{done:,} of {total:,.0f} steps" if math.isfinite(total) else f"{done:,} steps"
    state = "finished" if done == total else "unfinished"
    return f"preset {run.settings.get('preset', 'unknown')}: {of}, {state}"


def numbers(run: Run) -> list[tuple[str, str, str]]:
    """The summary: (what, how much, what there is to say about it)."""
    if not run.steps:
        return [("steps", "none yet", "")]
    found: list[tuple[str, str, str]] = []
    last = np.array([number(line, "loss") for line in run.steps if not line.get("skipped")][-AVERAGED:] or [math.nan])
    of = f"the last {len(last)} steps" if len(last) > 1 else "the one step"
    found.append(("loss", _digits(float(last.mean())), f"nats/token, mean of {of}"))
    if run.validations:
        line, step = run.validations[-1], int(run.validations[-1]["step"])
        found.append(("validation loss", _digits(number(line, "val_loss")), f"nats/token at step {step:,}"))
        bits, xz = number(line, "val_bits_per_byte"), number(line, "val_xz_bits_per_byte")
        beside = f"xz -9e: {xz:.4f}" if math.isfinite(xz) else "held-out text"
        found.append(("bits per byte", _digits(bits), beside))
        if math.isfinite(average := number(line, "val_loss_ema")):
            found.append(("of averaged weights", _digits(average), "validation loss, nats/token"))
    if skipped := sum(bool(line.get("skipped")) for line in run.steps):
        found.append(("left out", f"{skipped:,}", "steps whose loss or gradient was not finite"))
    tokens, seconds = number(run.steps[-1], "tokens", 0.0), run.seconds()
    found.append(("tokens", f"{tokens:,.0f}", ""))
    if seconds > 0:
        found.append(("time", clock(seconds), "in steps, without validation and saving"))
        found.append(("tokens/s", f"{tokens / seconds:,.0f}", "mean"))
    for name, label, show, about in (
        ("mfu", "MFU", lambda x: f"{np.nanmedian(x):.1%}", "median"),
        ("memory", "memory", lambda x: size(np.nanmax(x)), "peak of the worst process"),
        ("bubble", "bubble", lambda x: f"{np.nanmean(x):.1%}", "mean share of a step"),
    ):
        values = run.column(name)
        if np.nan_to_num(values).any():
            found.append((label, show(values), about))
    if run.starts:
        found.append(("starts", f"{run.starts:,}", "of rank 0, by its log"))
    return found


def curves(run: Run) -> list[str]:
    """The figures of all quantities that the run has values of, other than 0: without a pipeline there is no bubble."""
    losses = [run.line("loss", "loss"), run.checked("validation", "val_loss")]
    shown = [
        ("loss", "Loss of the main model", "nats/token", losses[: 1 + bool(run.validations)], None),
        ("mtp", "Loss of multi-token prediction", "nats/token", [run.line("loss", "loss_mtp")], None),
        ("bits", "Validation", "bits/byte", [run.checked("bits per byte", "val_bits_per_byte")], None),
        ("lr", "Learning rate", "rate", [run.line("learning rate", "lr")], 0.0),
        ("norm", "Norm of the gradient", "norm before clipping", [run.line("norm", "grad_norm")], 0.0),
        ("maxvio", "MaxVio", "mean of all routers", [run.line("MaxVio", "max_violation")], 0.0),
        ("balance", "Balance loss", "weighted by α", [run.line("balance loss", "balance_loss")], 0.0),
        ("speed", "Speed", "tokens/s", [run.line("tokens/s", "tokens_per_second")], 0.0),
        ("mfu", "MFU", "%", [run.line("MFU", "mfu", 100.0)], 0.0),
        ("memory", "Memory, worst process", "GiB", [run.line("peak so far", "memory", 2.0**-30)], 0.0),
        ("bubble", "Bubble", "% of a step", [run.line("bubble", "bubble", 100.0)], 0.0),
    ]
    return [curve(*rest) for rest in shown if any(np.nan_to_num(line.values).any() for line in rest[3])]


def spikes(run: Run) -> str:
    """The check of claim C20, with what is counted."""
    found = find_spikes(run.column("step").astype(int), run.column("loss"))
    return (
        f"<p>{html.escape(told(found))}</p><p class=under>A step is compared with the {WINDOW} steps before it "
        f"({FEWEST} at least): usual is the median of their losses, the spread their median distance from it (× 1.48, "
        f"at least 0.1 % of the median), a spike a step more than {THRESHOLD:g} spreads above. The report says of its "
        "run that there was no irrecoverable spike and no rollback (claim C20); this is about this one run, of this "
        "size and length, and about no other.</p>"
    )


def experts(run: Run) -> str:
    """Heat maps: of the last moment, and over time of the first, the last and some routers between."""
    if not run.loads:
        return f"<p>There is no {LOADS} beside the metrics, or nothing in it yet.</p>"
    names, last = run.routers(), run.loads[-1]
    drawn = [load_now(last["load"], names, last["step"])]
    if len(run.loads) > 1:
        steps = np.array([line["step"] for line in run.loads])
        table = np.stack([line["load"] for line in run.loads])
        for row in np.unique(np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int)):
            drawn.append(load_over_time(table[:, row], steps, names[row], f"load-{row}"))
    more = f" Over time: {SHOWN} of {len(names)} routers." if len(names) > SHOWN and len(run.loads) > 1 else ""
    return (
        "<p class=under>Tokens that an expert got in a step over the mean of its router's experts: 1 is perfect "
        f"balance, the lightest colour twice the mean or more.{more}</p>" + _figures(drawn)
    )


def settings(values: Mapping[str, Any]) -> str:
    """All of run.json: what the processes share first, then the rest group by group."""
    groups = {name: group for name, group in values.items() if isinstance(group, dict)}
    single = {name: value for name, value in values.items() if name not in groups}
    parts = [_table(groups.pop("parallel"))] if "parallel" in groups else []
    for name, group in {"run": single, **groups}.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary>{_table(group)}</details>")
    return "".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_value(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tiles(found: Sequence[tuple[str, str, str]]) -> str:
    cells = (
        f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}<small>{html.escape(about)}</small></dd></div>"
        for what, value, about in found
    )
    return f"<dl class=tiles>{''.join(cells)}</dl>"


def _figures(drawn: Sequence[str]) -> str:
    if not drawn:
        return "<p>Nothing to draw yet.</p>"
    return f"<div class=figures>{''.join(f'<figure>{one}</figure>' for one in drawn)}</div>"


def _digits(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 if there is no such run."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_book.train.report", description="Write a run's report.html.")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    try:
        print(write_report(parser.parse_args(argv).out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
