"""Exercises that grade: ``check("router.select", my_function)`` runs your function against the package's own cases.

A grader lives in the file of its subject (``exercises/router.py``), is a function that yields cases, and is
registered by :func:`grader`. The files are imported when an exercise of theirs is first asked for.
"""

from dsv3_book.exercises.grading import Case, Grader, Result, all_graders, check, close, grader, same

__all__ = ["Case", "Grader", "Result", "all_graders", "check", "close", "grader", "same"]
