"""The center crop is that of the ADM suite, on Pillow's images and on tensors."""

import numpy as np
import PIL.Image
import pytest
from PIL.Image import Resampling

from components.data.crop import crop_image, crop_tensor, to_tensor
from plugins.datasets.image_folder import ImageFolder


def saved(folder, image):
    (folder / "a").mkdir()
    image.save(folder / "a" / "1.png")
    return str(folder)


def plain_adm(image, resolution):
    """The crop of the ADM paper's data preparation, on arrays."""
    while min(image.size) >= 2 * resolution:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Resampling.BOX)
    factor = resolution / min(image.size)
    pixels = np.asarray(image.resize(tuple(round(side * factor) for side in image.size), resample=Resampling.BICUBIC))
    y, x = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[y : y + resolution, x : x + resolution]


def noise_image(width, height):
    return PIL.Image.fromarray(
        np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


SIZES = [(32, 32), (33, 47), (500, 375), (375, 501), (64, 129), (131, 64), (3, 3), (20, 300), (150, 70)]


@pytest.mark.parametrize("size", SIZES)
def test_the_crop_is_adms_to_one_level(tmp_path, size):
    image = noise_image(*size)
    found = ImageFolder(32, path=saved(tmp_path, image))[0].image.permute(1, 2, 0).numpy()
    apart = abs(found.astype(int) - plain_adm(image, 32))
    assert apart.max() <= 1 and (apart > 0).mean() < 2e-3


def test_box_filters_average_and_the_crop_is_central():
    """Independent of PIL's filters: two halvings average 4 x 4 blocks; 8 columns are cropped on either side."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[::2, 16::2] = 100
    pixels[:, :16] = pixels[:, 80:] = 255
    found = np.asarray(crop_image(PIL.Image.fromarray(pixels), 16))
    assert found.shape == (16, 16, 3)
    assert (abs(found[:, 1:-1].astype(int) - 25) <= 1).all()


@pytest.mark.parametrize(
    "size", [*SIZES, (333, 500), (374, 502), (373, 501), (129, 193), (9, 7), (70, 150), (1100, 40)]
)
def test_the_crop_of_a_tensor_is_adms_to_two_levels(size):
    """Odd and even sizes, with and without halving, upright and tall."""
    image = noise_image(*size)
    for resolution in (16, 32, 64, 128):
        found = crop_tensor(to_tensor(image), resolution).permute(1, 2, 0).numpy()
        apart = abs(found.astype(int) - np.asarray(crop_image(image, resolution)))
        assert apart.max() <= 2 and apart.mean() < 0.05


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000)])
def test_a_strip_gives_its_center(tmp_path, size):
    ramp = np.linspace(0, 255, 1000).astype(np.uint8).reshape(size[1], size[0])
    image = PIL.Image.fromarray(ramp).convert("RGB")
    found = ImageFolder(32, path=saved(tmp_path, image))[0].image.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, plain_adm(image, 32), atol=1)


def test_a_long_strip_needs_little_memory():
    # At full length the resized strip has 256 x 15 M pixels.
    assert crop_image(PIL.Image.new("RGB", (60_000, 1)), 256).size == (256, 256)
