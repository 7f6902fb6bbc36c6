"""Small saved models and a picture for the commands; to write them needs transformers."""

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
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path
