"""DigitScenes, the embedded benchmark: handwritten digits, captions that relate them, questions about them, and small models
trained on it: UNITER, a CLIP dual encoder, and two CLIPMapper on top of this CLIP, for answers and for captions. `prompt_maps`
is for diffusion models.

transformers is imported when it is first used.

In: seeds and counts.
Out: scenes, samples, trained models.
Imports: vlattn_lab.prompting, vlattn_lab.timed, vlattn_lab.winoground.
"""

from vlattn_lab import winoground
from vlattn_lab.clip import caption_accuracy, load_clip, retrieval
from vlattn_lab.mapper import load_captioner, load_vqa, prompt_accuracy, question_accuracy
from vlattn_lab.probing import probe_samples
from vlattn_lab.processor import DigitProcessor
from vlattn_lab.prompting.prompt_maps import PromptMaps, prompt_maps
from vlattn_lab.questions import Questions, digit_prompts, digit_questions, example_question, is_true
from vlattn_lab.scenes import Scenes, digit_scans, digit_scenes, held_out_captions, swapped_pairs
from vlattn_lab.texts import SceneProcessor
from vlattn_lab.uniter import load_uniter, matching_accuracy, matching_score, winoground_scores

__all__ = [
    "DigitProcessor",
    "PromptMaps",
    "Questions",
    "SceneProcessor",
    "Scenes",
    "caption_accuracy",
    "digit_prompts",
    "digit_questions",
    "digit_scans",
    "digit_scenes",
    "example_question",
    "held_out_captions",
    "is_true",
    "load_captioner",
    "load_clip",
    "load_uniter",
    "load_vqa",
    "matching_accuracy",
    "matching_score",
    "probe_samples",
    "prompt_accuracy",
    "prompt_maps",
    "question_accuracy",
    "retrieval",
    "swapped_pairs",
    "winoground",
    "winoground_scores",
]
