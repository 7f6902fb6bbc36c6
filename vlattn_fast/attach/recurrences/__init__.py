"""The functions and modules that mix tokens without attention, one file per family.

In: a call of such a function, as the model makes it.
Out: its map, as query, key, value and gates of a recurrence, or as the taps of a short convolution.
Imports: _ground.
"""
