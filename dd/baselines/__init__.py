"""Settings chosen among candidates, by a hold-out set, K folds, or the tracked error.

In: candidates and a split. Out: the chosen one, trained, with what the choice cost.
"""
