"""`python -m dsv3_book.export`: a run's newest good checkpoint as a folder in the released format.

The folder holds safetensors, `config.json` and `tokenizer.json`: the serving engines read it, so does
`dsv3_book.generate`, and so can a new run (`--init`), at any layout. A run's own folder is not for others (see
`checkpoint.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dsv3_book import checkpoint
from dsv3_book.config import ModelConfig, RopeScaling
from dsv3_book.interop import save_pretrained
from dsv3_book.model import Transformer
from dsv3_book.train.swaps import Swap, swaps_to_read


def load_run(run: Path, average: bool = False, swap: Swap | None = None) -> tuple[Transformer, int]:
    """The model of a run's newest good checkpoint, fp32 and whole, whatever the layout; and the steps it has done.

    average: with the weights' moving average (`--optim.ema`) in place of the weights; routing biases have none.
    swap: the parts of one's own that the run was trained with; None refuses a run that has an attention or a router.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: all its checkpoints are damaged, or it keeps no average; or see `swaps_to_read`.
    """
    found = checkpoint.latest(run / "checkpoints", lambda line: print(line, file=sys.stderr))
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: train at least to the first one")
    path, state = found
    fields = state["config"]["model"]
    scaling = RopeScaling(**fields["rope_scaling"]) if fields["rope_scaling"] else None
    cfg, before = ModelConfig(**{**fields, "rope_scaling": scaling}), state.get("swaps", {})
    if swap is None and (own := [before[kind]["path"] for kind in ("attention", "router") if kind in before]):
        raise ValueError(f"{run} was trained with {', '.join(own)}, for which the released format has no place")
    model = Transformer(cfg)
    swaps, notes = swaps_to_read(swap or Swap(), cfg, before, run)
    swaps.apply(model)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    values = {f"model.{name}": value for name, value in model.state_dict().items()}
    if average:
        if not any(name.startswith("ema.") for name in checkpoint.names(path)):
            raise ValueError(
                f"{path} holds no average of the weights: leave out --ema, or train with --optim.ema 0.999"
            )
        for name, parameter in model.named_parameters():
            del values[f"model.{name}"]
            values[f"ema.{name}"] = parameter.detach().view(-1)
    checkpoint.load(path, values)
    return model, state["step"]


def export(run: Path, out: Path, fp8: bool = False, average: bool = False) -> int:
    """Writes the model of `run` to the new folder `out`, whole or not at all; returns the steps it has done.

    Raises:
        FileNotFoundError: the run has no checkpoint, or no tokenizer.
        ValueError: see `load_run`; or `out` is there and not an empty folder.
        OSError: it can't be written; what was is removed.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already, and not an empty folder: name a new one")
    model, step = load_run(run, average)
    save_pretrained(model, out, fp8=fp8, tokenizer=run / "tokenizer.json")
    return step


@dataclass(frozen=True)
class Options:
    """Write a run's model as a folder in the released format."""

    checkpoint: Path
    """The run's folder."""
    out: Path
    """The folder to write: a new one, or an empty one."""
    fp8: bool = False
    """Matrices in FP8 with a scale for every block, as V3 was released."""
    ema: bool = False
    """The average of the weights in place of the weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(Options, args=argv, prog="python -m dsv3_book.export", config=(tyro.conf.FlagCreatePairsOff,))
    try:
        step = export(options.checkpoint, options.out, options.fp8, options.ema)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    files = sorted(path.name for path in options.out.iterdir())
    print(f"{options.out}: {'average of ' if options.ema else ''}weights after step {step} ({', '.join(files)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
