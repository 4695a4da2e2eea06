"""Training: `python -m dsv3_book.train`. `recipe`: the report's schedules. `trainer`: the loop. `config`: its knobs."""
