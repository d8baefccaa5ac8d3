"""What is recorded, and where it goes: files, pictures, the console, Weights & Biases.

In: records of losses and errors. Out: ``history.csv``, figures, tables, logs.
"""
