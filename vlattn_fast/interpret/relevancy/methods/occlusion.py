"""Method "occlusion": what the score loses when a window of tokens is taken away (Zeiler and Fergus, ECCV 2014, section 4.2)."""

from __future__ import annotations

from vlattn_fast.interpret.relevancy.occluding_method import OccludingMethod


class Occlusion(OccludingMethod):
    """The score's drop when a window of patches or words is taken away, mean over windows (Zeiler and Fergus 2014). No gradient.

    A patch gives way to the same patch of the fill, as it enters the tower's first layer; a word to that of the fill, or to an
    embedding of zero where the fill leaves words as they are. It costs a forward pass a window, several in a batch.
    """

    name = "occlusion"
