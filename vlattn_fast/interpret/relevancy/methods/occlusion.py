"""Method "occlusion": what the score loses when a window of tokens is replaced (Zeiler and Fergus, ECCV 2014, section 4.2)."""

from __future__ import annotations

from vlattn_fast.interpret.relevancy.occluding_method import OccludingMethod


class Occlusion(OccludingMethod):
    """Measures the score's drop without a window of patches or words, mean over windows (Zeiler and Fergus 2014). No gradient.

    It costs one forward pass for each window, several of them in one batch, and supports any model. As it enters the tower's
    first layer, a patch is replaced by the same patch of the fill; a word by that of the fill, or by an embedding of zero if the
    fill does not change words (ECCV 2014, section 4.2).

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Occlusion(window=4, stride=2)  # pass it as va.explain(..., method=...)
        <method occlusion(window=4, stride=2)>
    """

    name = "occlusion"
