"""Numbers, devices, process groups and what is said to the user; knows no other room.

In: plain numbers and tensors. Out: checked ones, sums over processes, warnings at the user's line.
"""
