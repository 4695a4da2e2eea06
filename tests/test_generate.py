"""Writing text from a run's folder and from a released-format folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainkit import corpus, small  # noqa: F401

from dsv3_book import generate
from dsv3_book.data import Tokenizer
from dsv3_book.interop import save_pretrained
from dsv3_book.train.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Trainer:  # noqa: F811
    trainer = Trainer(small(tmp_path_factory.mktemp("run"), corpus, steps=2))
    trainer.run()
    return trainer


def test_a_runs_folder_is_read(trained: Trainer) -> None:
    model, tokenizer = generate.load(trained.config.out)
    assert model.cfg == trained.config.model
    assert tokenizer.spec == trained.data.tokenizer.spec
    for (name, a), (_, b) in zip(model.state_dict().items(), trained.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_released_folder_is_read_and_writes_the_same(trained: Trainer, tmp_path: Path) -> None:
    save_pretrained(trained.model, tmp_path)
    trained.data.tokenizer.save(tmp_path)
    texts = ["".join(generate.generate(*generate.load(d), "def ", 20)) for d in (trained.config.out, tmp_path)]
    assert texts[0] == texts[1] != ""


def test_greedy_tokens_equal_those_without_a_cache(trained: Trainer) -> None:
    model, tokenizer = trained.model, trained.data.tokenizer
    prompt = tokenizer.encode("def alpha", bos=True)
    fast = list(generate.tokens(model, prompt, 12, temperature=0))
    slow = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            slow.append(int(model(torch.tensor([slow]))[0, -1].argmax()))
    assert fast == slow[len(prompt) :]


def test_ids_that_the_tokenizer_lacks_are_never_drawn(trained: Trainer) -> None:
    """A model may have more rows than the tokenizer has tokens, as V3 does."""
    model = trained.model
    with torch.no_grad():
        kept = model.lm_head.weight[400:].clone()
        model.lm_head.weight[400:] *= 1000  # what is least or most likely by far
        drawn = list(generate.tokens(model, [0, 300], 20, vocab_size=400))
        free = list(generate.tokens(model, [0, 300], 20))
        model.lm_head.weight[400:] = kept
    assert max(drawn) < 400 <= max(free)


def test_the_seed_decides(trained: Trainer) -> None:
    one, again, other = (list(generate.tokens(trained.model, [0, 300], 20, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_it_stops_at_eos_and_at_the_end_of_the_context(trained: Trainer) -> None:
    model = trained.model
    first = next(generate.tokens(model, [0], 1, temperature=0))
    assert list(generate.tokens(model, [0], 5, temperature=0, stop=first)) == []
    context = model.cfg.max_position_embeddings
    assert len(list(generate.tokens(model, [0] * (context - 3), 50))) == 3
    with pytest.raises(ValueError, match=f"has {context} tokens: the model takes 1 to {context - 1}"):
        next(generate.tokens(model, [0] * context, 1))
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        next(generate.tokens(model, [0], 0))


def test_a_character_in_several_tokens_comes_out_whole() -> None:
    tokenizer = Tokenizer.train(["plain text only"] * 3, 300)
    ids = tokenizer.encode("aé→🎈b")
    assert len(ids) > 5  # byte by byte
    pieces = list(generate.text(tokenizer, iter(ids)))
    assert "".join(pieces) == "aé→🎈b"
    assert {"é", "→", "🎈"} <= set(pieces)
    assert "".join(generate.text(tokenizer, iter(ids[:-2]))) == "aé→\ufffd"


def test_the_command(trained: Trainer, capsys: pytest.CaptureFixture) -> None:
    words = ["--checkpoint", str(trained.config.out), "--prompt", "def ", "--max-tokens", "5", "--temperature", "0"]
    assert generate.main(words) == 0
    expected = "".join(generate.generate(trained.model, trained.data.tokenizer, "def ", 5, temperature=0))
    assert capsys.readouterr().out == f"def {expected}\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nothing", "there is no folder"),
        (lambda d: d, "is neither a run"),
        (lambda d: (d / "checkpoints").mkdir() or d, "has no checkpoint yet"),
        (lambda d: (d / "config.json").write_text("{") and d, "not valid JSON"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, make, message: str, capsys: pytest.CaptureFixture) -> None:
    assert generate.main(["--checkpoint", str(make(tmp_path)), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_released_folder_without_a_fitting_tokenizer(
    trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_pretrained(trained.model, tmp_path)
    words = ["--checkpoint", str(tmp_path), "--prompt", "x"]
    assert generate.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: no tokenizer at {tmp_path}") and said.count("\n") == 1
    Tokenizer.train(["x"], trained.config.model.vocab_size + 1).save(tmp_path)
    assert generate.main(words) == 2
    assert "has more tokens than the model's" in capsys.readouterr().err


def test_a_damaged_run_is_an_error_in_one_line(trained: Trainer, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    command = [sys.executable, "-m", "dsv3_book.generate", "--checkpoint", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: no usable checkpoint") and done.stderr.count("\n") == 1
