"""`python -m dsv3_book.generate`: text from a run's folder, or from a folder in the released format."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dsv3_book.data import Tokenizer
from dsv3_book.inference.cache import LatentCache
from dsv3_book.inference.sampling import sample
from dsv3_book.model import Transformer
from dsv3_book.train.swaps import Swap


def tokens(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Token ids that continue `prompt`, one by one, until `stop` (not given out), `max_tokens`, or a full context.

    vocab_size: the tokenizer's. A model may have rows for more (V3 has), which stand for nothing and are never drawn.

    The prompt goes through the model once; then every new token is decoded alone, against the cached latents.

    Raises:
        ValueError: a prompt that is empty or fills the model's context, or sampling settings out of range.
    """
    context = model.cfg.max_position_embeddings
    if not 0 < len(prompt) < context:
        raise ValueError(f"the prompt has {len(prompt)} tokens: the model takes 1 to {context - 1} of them")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    generator = torch.Generator(model.device).manual_seed(seed)
    capacity = min(context, len(prompt) + max_tokens)
    cache = LatentCache(model.cfg, 1, capacity, model.compute_dtype, model.device)
    new = torch.tensor([list(prompt)], device=model.device)
    for _ in range(capacity - len(prompt)):
        logits = model.decode(new, cache)[:, -1, :vocab_size]
        new = sample(logits, generator, temperature, top_k, top_p)[:, None]
        if new.item() == stop:
            return
        yield int(new.item())


def text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as tokens arrive. A character whose bytes come in several tokens is given out when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for index in ids:
        if piece := decoder.decode(tokenizer.decode_bytes([index])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as they arrive."""
    ids = tokenizer.encode(prompt, bos=True)
    settings = temperature, top_k, top_p, seed, tokenizer.eos_id, tokenizer.vocab_size
    yield from text(tokenizer, tokens(model, ids, max_tokens, *settings))


def write(model: Transformer, tokenizer: Tokenizer, prompt: str, **settings: float | int | None) -> None:
    """Prints `prompt` and what `generate` makes of it, as it arrives."""
    pieces = generate(model, tokenizer, prompt, **settings)  # type: ignore[arg-type]
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def load(folder: Path, swap: Swap | None = None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer from a run's folder (its newest good checkpoint), or from one in the released format.

    swap: the parts of one's own that a run was trained with.

    Raises:
        FileNotFoundError: no such folder, or it is neither.
        ValueError: damaged checkpoints or weights; a run with other parts of one's own than `swap` names.
    """
    if (folder / "checkpoints").is_dir():
        from dsv3_book.export import load_run

        model, _ = load_run(folder, swap=swap or Swap())
    elif (folder / "config.json").is_file():
        from dsv3_book.interop import load_pretrained

        model = load_pretrained(folder)
    elif folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a run (no checkpoints/) nor a released model (no config.json)")
    else:
        raise FileNotFoundError(f"there is no folder {folder}: give a run's --out, or a released model's folder")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder / 'tokenizer.json'} has more tokens than the model's {model.cfg.vocab_size}")
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Options:
    """Write text with a trained model."""

    checkpoint: Path
    """A run's folder, or one in the released format (config.json, safetensors, tokenizer.json)."""
    prompt: str
    """What to continue."""
    max_tokens: int = 200
    """Tokens to write at most."""
    temperature: float = 0.8
    """0 takes the likeliest token every time."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Draw from this many likeliest tokens."""
    swap: Swap = field(default_factory=Swap)
    seed: Annotated[int, tyro.conf.arg(help="Of the draws: the same seed writes the same text.")] = 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(Options, args=argv, prog="python -m dsv3_book.generate")
    try:
        model, tokenizer = load(options.checkpoint, options.swap)
        settings = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
        write(model, tokenizer, options.prompt, **settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
