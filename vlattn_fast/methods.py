"""The methods of `va.explain` as objects with options: `method=va.methods.Weighted(freeze=("norms",), of="logit")`.

A name, such as `method="weighted"`, means the same class with its defaults. `freeze=()` gives a method in its published form.
"""

from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.attention import Attention
from vlattn_fast.interpret.relevancy.methods.glimpse import Glimpse
from vlattn_fast.interpret.relevancy.methods.gradcam import GradCam
from vlattn_fast.interpret.relevancy.methods.gradient import Gradient
from vlattn_fast.interpret.relevancy.methods.input_gradient import InputGradient
from vlattn_fast.interpret.relevancy.methods.integrated_gradients import IntegratedGradients
from vlattn_fast.interpret.relevancy.methods.occlusion import Occlusion
from vlattn_fast.interpret.relevancy.methods.rollout import Rollout
from vlattn_fast.interpret.relevancy.methods.smooth_grad import SmoothGrad
from vlattn_fast.interpret.relevancy.methods.tam import Tam
from vlattn_fast.interpret.relevancy.methods.weighted import Weighted

__all__ = [
    "Attention",
    "Glimpse",
    "GradCam",
    "Gradient",
    "InputGradient",
    "IntegratedGradients",
    "Method",
    "Occlusion",
    "Rollout",
    "SmoothGrad",
    "Tam",
    "Weighted",
]
