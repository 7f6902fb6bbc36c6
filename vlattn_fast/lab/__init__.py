"""DigitScenes, the embedded benchmark: real handwritten digits, captions that relate them, and a small UNITER trained on it.

Needs scikit-learn (the scans) and safetensors (the weights) only when they are first used.
"""

from vlattn_fast.lab import winoground
from vlattn_fast.lab.processor import DigitProcessor
from vlattn_fast.lab.scenes import Scenes, digit_scans, digit_scenes, held_out_captions, swapped_pairs
from vlattn_fast.lab.uniter import load_uniter, matching_accuracy, matching_score, winoground_scores

__all__ = [
    "DigitProcessor",
    "Scenes",
    "digit_scans",
    "digit_scenes",
    "held_out_captions",
    "load_uniter",
    "matching_accuracy",
    "matching_score",
    "swapped_pairs",
    "winoground",
    "winoground_scores",
]
