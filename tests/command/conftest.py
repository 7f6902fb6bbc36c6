"""Small saved models and a picture for the commands; to write them needs transformers."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from tests.helpers import saved_models

    return saved_models.save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    from tests.helpers import saved_models

    return saved_models.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from tests.helpers import saved_models

    return saved_models.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    noise = np.random.default_rng(0).normal(128, 80, (30, 40)).clip(0, 255)  # PIL's own noise has no seed
    Image.fromarray(noise.astype(np.uint8)).convert("RGB").save(path)
    return path
