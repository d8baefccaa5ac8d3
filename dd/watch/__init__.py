"""What is said to the user while an optimizer trains; it changes nothing.

In: what a forward or a step has at hand: numbers, samples, pre-activations, curvatures.
Out: warnings, doubts of the training error, and the conditions under which a step may be made.
"""
