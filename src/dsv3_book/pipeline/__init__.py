"""The model cut along its depth: who computes what when. A schedule is data; see :mod:`dsv3_book.pipeline.schedule`.

Nothing imported here needs torch; what runs a schedule on real processes is in ``pipeline.executor``.
"""

from dsv3_book.pipeline.place import place_layers
from dsv3_book.pipeline.schedule import SCHEDULES, Action, Pair, Schedule, Transfer, make_schedule
from dsv3_book.pipeline.validate import check, validate

__all__ = ["SCHEDULES", "Action", "Pair", "Schedule", "Transfer", "check", "make_schedule", "place_layers", "validate"]
