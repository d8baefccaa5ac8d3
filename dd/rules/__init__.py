"""How weights and shadows move, given the gradients of both.

In: shadow gradients of the correction. Out: moved weights and shadows.
"""
