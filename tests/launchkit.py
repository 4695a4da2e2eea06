"""What the tests of the launch files share."""

from pathlib import Path
from typing import Any

import yaml
from torch.distributed.run import get_args_parser

from dsv3_book.train.presets import from_command_line

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def launched(words: list[str], nodes: int, each: int) -> Any:
    """What torchrun makes of a command line; and the trainer's own part of it must fit so many processes."""
    options = get_args_parser().parse_args(words)
    assert options.module and options.training_script == "dsv3_book.train"
    config = from_command_line(options.training_script_args)
    config.layout(nodes * each, each)
    assert config.out.is_absolute() and all(Path(path.removeprefix("shards:")).is_absolute() for path in config.data)
    return options
