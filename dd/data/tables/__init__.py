"""Samples in files of the user's own: .csv, .parquet and .npz, read as their author meant them.

In: a path, the name of the label column, columns to leave out or to keep. Out: features and labels
by name, what was left out and why, and what is doubtful about them.
"""
