"""The correction of one attached model: hooks, one forward, one step, shadows, the head.

In: a model, its optimizer's state, training forwards and their gradients. Out: corrected
pre-activations and scores, and the gradients that the shadows are to be moved by.
"""
