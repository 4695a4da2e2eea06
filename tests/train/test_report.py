"""The report: numbers against a hand count, a page that needs nothing else, and runs of which there is little."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_book import plot
from dsv3_book.train import report
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.curves import POINTS, Line, thin
from dsv3_book.train.logs import close_log, rank_log
from dsv3_book.train.presets import preset
from dsv3_book.train.report import main, write_report

EMPTY = {"meta", "path", "use", "image", "rect", "br", "stop", "circle"}


def line(step: int, **more: Any) -> dict[str, Any]:
    found = {"step": step, "tokens": 100 * step, "loss": 5 - 0.01 * step, "loss_mtp": 6 - 0.01 * step}
    found |= {"balance_loss": 1e-4, "max_violation": 0.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 50.0}
    return found | more


def folder(out: Path, lines: list[dict[str, Any]], settings: dict[str, Any] | None = None) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    chosen = preset("tiny", out).to_dict() | {"steps": 60} if settings is None else settings
    (out / "run.json").write_text(json.dumps(chosen))
    (out / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return out


class Page(HTMLParser):
    """A page that is checked while it is read: every tag is closed, by its own kind."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.open, self.tags = "", [], Counter()
        self.ids, self.wanted, self.links, self.images = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open
        assert len(set(self.ids)) == len(self.ids), "an id twice"
        assert set(self.wanted) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            self.wanted += re.findall(r"url\(#([^)]+)\)", value or "")
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src"):
                (self.wanted if value.startswith("#") else self.links).append(value.removeprefix("#"))
            elif name == "aria-label":
                self.images.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""

    def tile(self, name: str) -> str:
        found = re.search(rf"<dt>{re.escape(name)}</dt><dd>(.*?)<small>(.*?)</small>", self.source)
        return f"{found[1]} | {found[2]}" if found else ""


def whole(out: Path) -> Path:
    """A finished run of 60 steps with everything in it."""
    lines = []
    for step in range(1, 61):
        lines.append(line(step, mfu=0.4 if step > 30 else 0.2, memory=step * 2**28, bubble=0.1, tokens_per_second=50.0))
        if step % 20 == 0:
            lines.append({"step": step, "tokens": 100 * step, "val_loss": 4.5, "val_bits_per_byte": 1.25})
    lines[-1] |= {"val_xz_bits_per_byte": 1.5, "val_loss_ema": 4.25}
    folder(out, lines)
    routers = [[10, 20, 30, 20], [20] * 4, [5, 5, 5, 65], [1, 2, 3, 2]]
    loads = [json.dumps({"step": step, "load": routers}) for step in (20, 40, 60)]
    (out / "load.jsonl").write_text("\n".join(loads) + "\n")
    for _ in range(2):
        rank_log(out, 0)
    close_log()
    return out


def test_the_numbers(tmp_path) -> None:
    page = Page(write_report(whole(tmp_path / "own")))
    assert page.tile("loss") == "4.4950 | nats/token, mean of the last 20 steps"  # steps 41 to 60
    assert page.tile("validation loss") == "4.5000 | nats/token at step 60"
    assert page.tile("bits per byte") == "1.2500 | xz -9e: 1.5000"
    assert page.tile("of averaged weights").startswith("4.2500")
    assert page.tile("tokens") == "6,000 | "
    assert page.tile("time").startswith("2:00 |") and page.tile("tokens/s") == "50 | mean"
    assert page.tile("MFU") == "30.0% | median" and page.tile("bubble").startswith("10.0%")
    assert page.tile("memory").startswith("15.0 GiB") and page.tile("starts").startswith("2 |")
    assert "Run own" in page.text and "preset tiny: 60 of 60 steps, finished" in page.text
    assert "Of 40 steps" in page.text and "no spike in this run" in page.text


def test_the_page_needs_nothing_else_and_is_told_to_those_who_do_not_see_it(tmp_path) -> None:
    path = write_report(whole(tmp_path))
    page = Page(path)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert re.findall(r"https?://[^\"' ]*", page.source) == ["http://www.w3.org/1999/xlink"] * page.tags["svg"]
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0 and "@import" not in page.source
    assert page.tags["svg"] == len(page.images) == 16  # 11 curves, all routers, four of them over time
    assert any("loss: from 4.99 at step 1 to 4.4 at step 60" in alt for alt in page.images)
    assert any("layer 1 1.50, layer 2 1.00, layer 3 3.25, MTP 1 1.50" in alt for alt in page.images)
    assert "prefers-color-scheme:dark" in page.source and 'name="viewport"' in page.source
    # Every colour follows light and dark, but that of the tip of the heat maps' colour bar.
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", page.source)) == {"#fee838"}
    assert [file.name for file in tmp_path.iterdir() if "report" in file.name] == ["report.html"]


def test_text_from_files_is_text(tmp_path) -> None:
    evil = "<script>alert('&amp;')</script>"
    settings = preset("tiny", "x").to_dict() | {"prompt": evil, "preset": evil, evil: {evil: [evil, None]}}
    out = folder(tmp_path / "<b>&amp;", [line(1, loss=evil), line(2)], settings)
    page = Page(write_report(out))
    assert page.tags["script"] == page.tags["b"] == 0
    assert "Run <b>&amp;" in page.text and page.text.count(evil) >= 5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_has_hardly_begun(tmp_path, count: int) -> None:
    page = Page(write_report(folder(tmp_path, [line(step, bubble=0.0) for step in range(1, count + 1)])))
    assert f"{count} of 60 steps, unfinished" in page.text and "Too few steps to say" in page.text
    assert page.tile("validation loss") == page.tile("MFU") == page.tile("bubble") == ""
    assert page.tags["svg"] == (7 if count else 0)  # no validation, MFU, memory, bubble
    assert "no load.jsonl" in page.text
    assert page.tile("loss").startswith({0: "", 1: "4.9900", 2: "4.9850"}[count])


def test_no_line_at_all_and_lines_that_hold_nonsense(tmp_path) -> None:
    out = folder(tmp_path, [])
    (out / "metrics.jsonl").unlink()
    assert "none yet" in Page(write_report(out)).text
    lines = [{"step": "one", "loss": 1}, {"step": 1, "loss": None}, {"step": 2, "loss": 3.0, "tokens_per_second": 0}]
    folder(
        out, [*lines, {"step": 3, "val_loss": "low", "val_bits_per_byte": [1]}], settings={"model": 3, "steps": "all"}
    )
    (out / "load.jsonl").write_text('{"step": 1, "load": [[1], [2, 3]]}\n{"step": 2, "load": "x"}\n{"step": 3}\n')
    page = Page(write_report(out))
    assert "preset unknown: 2 steps, unfinished" in page.text and page.tile("loss").startswith("not finite")


def test_many_steps_make_a_small_page(tmp_path) -> None:
    path = write_report(folder(tmp_path, [line(step, loss=9.0 if step == 4321 else 3.0) for step in range(1, 20_001)]))
    assert path.stat().st_size < 500_000
    page = Page(path)
    assert "1 counts as a spike" in page.text and "at step 4,321" in page.text
    assert "each the mean of its steps" in page.text
    assert any("between 3 and 9" in alt for alt in page.images)  # averaging doesn't hide it


def test_thinning_keeps_mean_and_range() -> None:
    values = np.random.default_rng(0).standard_normal(1234)
    values[77] = np.nan
    steps, means, low, high = thin(Line("x", np.arange(1, 1235), values))
    assert len(steps) == POINTS and steps[-1] == 1234
    assert low.min() == np.nanmin(values) and high.max() == np.nanmax(values)
    assert (
        (low <= means).all() and (means <= high).all() and means.mean() == pytest.approx(np.nanmean(values), abs=0.01)
    )
    few = thin(Line("x", np.arange(3), np.array([1.0, 2.0, 3.0])))
    assert all(np.array_equal(few[i], [1, 2, 3]) for i in (1, 2, 3)) and list(few[0]) == [0, 1, 2]


def test_it_is_replaced_as_a_whole(tmp_path, monkeypatch) -> None:
    path = write_report(folder(tmp_path, [line(1)]))
    old = path.read_text()
    folder(tmp_path, [line(1), line(2)])
    with monkeypatch.context() as patch:
        patch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed just before")))
        with pytest.raises(OSError, match="killed"):
            write_report(tmp_path)
    assert path.read_text() == old
    assert write_report(tmp_path).read_text() != old


def test_the_command(tmp_path, capsys) -> None:
    assert main(["--out", str(folder(tmp_path / "run", [line(1)]))]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert main(["--out", str(tmp_path)]) == 2
    assert f"error: there is no run in {tmp_path}" in capsys.readouterr().err
    for text, said in (("{", "is not JSON"), ("[]", "holds no object")):
        (tmp_path / "run" / "run.json").write_text(text)
        assert main(["--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err


def test_settings_of_today_are_all_shown(tmp_path) -> None:
    config: TrainConfig = preset("laptop", tmp_path)
    page = Page(write_report(folder(tmp_path, [line(1)], config.to_dict())))
    for group, values in config.to_dict().items():
        assert f"<summary>{group}</summary>" in page.source or not isinstance(values, dict) or group == "parallel"
        for name in values if isinstance(values, dict) else [group]:
            assert f"<th>{name}</th>" in page.source


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_in_light_and_dark(dark: bool) -> None:
    colors = dict(re.findall(r"--(\w+):(#\w+);", plot.theme().split("@media")[dark]))
    assert set(colors) == {"blue", "orange", "green", "red", "purple", "sky", "grey", "light", "ink", "card"}
    card = luminance(colors["card"])
    for name, least in {"ink": 10, "grey": 4.5, "blue": 4.5, "orange": 2, "green": 3, "red": 4.5}.items():
        a, b = sorted((luminance(colors[name]), card))
        assert (b + 0.05) / (a + 0.05) >= least, name
