"""The functions and modules by which models hand on what tokens hold beside attention, one file a family.

In: a call of such a function, as the model makes it.
Out: its map, as query, key, value and gates of a recurrence, or as the taps of a short convolution.
Imports: _ground.
"""
