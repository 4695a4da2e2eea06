"""A run that begins with released weights, at any layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from layoutkit import settings
from trainkit import lines

from dsv3_book.interop import save_pretrained
from dsv3_book.model import Transformer
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import Parallel
from dsv3_book.train.trainer import Trainer

pytestmark = pytest.mark.distributed


def run(config: Any) -> str:
    try:
        trainer = Trainer(config, DataParallel.from_environment(), quiet=True)
    except ValueError as error:
        return str(error)
    trainer.save = lambda: None  # type: ignore[method-assign]
    trainer.run()
    trainer.close()
    return "trained"


def test_released_weights_begin_a_run_at_any_layout(pool, corpus: Path, tmp_path: Path) -> None:
    """One process and a pipeline with experts across ranks begin with the folder's weights, and train alike."""
    config = settings(corpus, steps=2, init=tmp_path / "released")
    save_pretrained(Transformer(config.model, seed=77), tmp_path / "released")
    for name, size, layout in (("one", 1, {}), ("four", 4, {"pp": 2, "ep": 2})):
        own = dataclasses.replace(config, out=tmp_path / name, parallel=Parallel(**layout))
        assert set(pool(size).run(run, own)) == {"trained"}
    plain = dataclasses.replace(config, out=tmp_path / "plain", init=None, seed=77)
    pool(1).run(run, plain)
    curves = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "four", "plain")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][0] != pytest.approx(curves[2][0], rel=1e-6)  # the same weights, but another order of sequences


def test_a_folder_that_does_not_fit_is_refused_by_all(pool, corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, steps=2, init=tmp_path / "released", out=tmp_path / "run")
    save_pretrained(Transformer(config.model), tmp_path / "released")
    own = dataclasses.replace(config, parallel=Parallel(ep=2))
    settings_file = tmp_path / "released" / "config.json"
    fields = json.loads(settings_file.read_text()) | {"hidden_size": 48}
    settings_file.write_text(json.dumps(fields))
    told = pool(2).run(run, own)
    assert all("it holds another model (hidden_size: 48 → 32)" in text for text in told)
