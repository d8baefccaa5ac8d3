"""What a run has found and leaves in its folder, and how it is read back.

In: records and figures, or a run folder. Out: a summary of each optimizer.
"""
