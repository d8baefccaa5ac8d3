"""What the jobs of a multirun have found; ``python -m dd.sweep`` gathers them.

In: the run folders of the jobs. Out: one table and one picture.
"""
