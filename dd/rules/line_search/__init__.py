"""Steps of ``lr="auto"``: where one may lead, which point is chosen, and the move there.

In: a closure over all training samples, and an attachment without pending forwards. Out: weights
and shadows at a point of low training loss, or everything as it was.
"""
