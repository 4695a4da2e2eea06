"""Parts of a reader's own, for tests: a file of code, and small changes to the reference."""

import textwrap
from pathlib import Path

HEAD = """
import time
import torch
from torch import nn
from dsv3_book.model.mla import MLA
from dsv3_book.model.router import Router, Routing
from dsv3_book.pipeline.schedule import Schedule, make_schedule
"""


def file(folder: Path, code: str) -> Path:
    """`mine.py` in `folder`, with the imports that most parts need."""
    path = folder / "mine.py"
    path.write_text(HEAD + textwrap.dedent(code))
    return path


def router(change: str = "", init: str = "pass") -> str:
    """The reference's router, with something done to its answer, or to itself when it is made."""
    return f"""
        class Mine(Router):
            def __init__(self, cfg):
                super().__init__(cfg)
                {init}
            def forward(self, x):
                experts, gates, scores, load = super().forward(x)
                {change}
                return Routing(experts, gates, scores, load)
    """


def attention(change: str = "", init: str = "pass", more: str = "decode = None") -> str:
    """The reference's attention, with something done to its output, or to itself when it is made."""
    return f"""
        class Mine(MLA):
            def __init__(self, cfg, layer):
                super().__init__(cfg, layer)
                {init}
            def forward(self, x, at):
                y = super().forward(x, at)
                {change}
                return y
            {more}
    """


def sgd(step: str = "", init: str = "pass") -> str:
    """torch's SGD, with something done before each step (`every`: group and parameter), or when it is made."""
    return f"""
        class Mine(torch.optim.SGD):
            def __init__(self, groups, lr):
                super().__init__(groups, lr=lr)
                {init}
            def step(self):
                every = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
                {step}
                super().step()
    """
