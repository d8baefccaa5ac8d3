"""State evolution: what theory predicts of a run before it is made.

In: the law of the inputs, a network and its training. Out: the curves of training and test error.
"""
