"""The loop that trains one optimizer, alone or in several processes.

In: a model, an optimizer, a split and a schedule. Out: calls of an observer at every step to be
recorded, and the doubts that the optimizer has of its own figures.
"""
