"""Which training samples a batch holds.

In: the inputs of a batch, or the indices that a loader or the user tells. Out: a placement, the
sample of every row.
"""
