"""The model cut along its depth: who computes what when. A schedule is data; see :mod:`dsv3_book.pipeline.schedule`."""

from dsv3_book.pipeline.schedule import SCHEDULES, Action, Pair, Schedule, Transfer, make_schedule

__all__ = ["SCHEDULES", "Action", "Pair", "Schedule", "Transfer", "make_schedule"]
