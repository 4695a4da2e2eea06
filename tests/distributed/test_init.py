"""A run that begins with released weights, at any layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
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
    one, four = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "four"))
    assert one == pytest.approx(four, rel=1e-5)


def test_weights_biases_masters_and_average_are_the_folders(corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, steps=2, init=tmp_path / "released", out=tmp_path / "run")
    theirs = Transformer(config.model, seed=77)
    for number, (_, router) in enumerate(theirs.routers()):
        router.e_score_correction_bias.fill_(0.1 * (number + 1))
    save_pretrained(theirs, tmp_path / "released")
    trainer = Trainer(config, quiet=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    masters, average = trainer.optimizer.masters(), trainer.ema.tensors()
    assert all(torch.equal(masters[name], average[name]) for name in masters)
    whole = {name: value.flatten() for name, value in theirs.named_parameters()}
    for part in trainer.optimizer.parts():
        assert torch.equal(part.weight, whole[part.name][part.begin : part.end]), part.name
    trainer.close()


def test_a_folder_that_does_not_fit_is_refused_by_all(pool, corpus: Path, tmp_path: Path) -> None:
    config = settings(corpus, steps=2, init=tmp_path / "released", out=tmp_path / "run")
    save_pretrained(Transformer(config.model), tmp_path / "released")
    own = dataclasses.replace(config, parallel=Parallel(ep=2))
    settings_file = tmp_path / "released" / "config.json"
    fields = json.loads(settings_file.read_text()) | {"hidden_size": 48}
    settings_file.write_text(json.dumps(fields))
    told = pool(2).run(run, own)
    assert all("it holds another model (hidden_size: 48 → 32)" in text for text in told)
