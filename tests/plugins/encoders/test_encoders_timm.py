"""Any timm model by name: which features are used, how they are mapped to the grid, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from components.contracts import Encoder
from components.files.weights import WeightsError
from plugins.encoders.timm import Timm
from tests.support.encoder_formulas import images

# timm's own small models at 160 pixels: stages of 40, 20, 10 and 5 per side.
MAPS, TOKENS = "test_convnext.r160_in1k", "test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(model, grid, **options):
    encoder = Timm(256, grid, model=model, pretrained=False, **options)
    encoder.load_weights()
    return encoder


def seen(encoder, x, side):
    config = encoder.model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return F.interpolate(((x + 1) / 2 - mean) / std, (side, side), mode="bicubic")


def as_tokens(planes):
    return planes.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("layer, stage, n", [(-1, 3, 5), (-2, 2, 10), (1, 1, 20)])
@pytest.mark.parametrize("grid", [5, 8, 10])
def test_a_feature_map_reaches_the_grid(layer, stage, n, grid):
    encoder = made(MAPS, grid, layer=layer)
    outputs = []
    encoder.model.stages[stage].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = images(256)
    tokens = encoder(x)
    expected = outputs[0]
    assert encoder.side == 160 and expected.shape == (2, encoder.embed_dim, n, n)
    if n % grid == 0:
        expected = expected.unflatten(2, (grid, -1)).unflatten(4, (grid, -1)).mean((3, 5))
    else:
        expected = F.interpolate(expected, (grid, grid), mode="bilinear", antialias=n > grid)
    torch.testing.assert_close(tokens, as_tokens(expected))
    torch.testing.assert_close(encoder.embed(x), as_tokens(expected).mean(1))
    torch.testing.assert_close(outputs[0], encoder.model.stages[: stage + 1](encoder.model.stem(seen(encoder, x, 160))))


def test_images_of_another_size():
    encoder = made(MAPS, 8, image_size=256)
    outputs = []
    encoder.model.stages[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    torch.testing.assert_close(encoder(images(256)), as_tokens(outputs[0]))
    assert outputs[0].shape[-2:] == (8, 8)


@pytest.mark.parametrize("resize", ["bicubic", "bicubic_antialias", "bilinear_antialias"])
def test_an_image_that_does_not_fill_its_patches_is_padded(resize):
    """As by timm's dynamic_img_pad, after resizing and normalization."""
    encoder = made(TOKENS, 8, image_size=120, pad=True, resize=resize)
    dynamic = timm.create_model(TOKENS, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True).eval()
    encoder.model.load_state_dict(encoder._converted(dict(dynamic.state_dict())))
    mode, _, antialias = resize.partition("_")
    config, x = encoder.model.pretrained_cfg, images(256)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    resized = F.interpolate(((x + 1) / 2 - mean) / std, (120, 120), mode=mode, antialias=bool(antialias))
    torch.testing.assert_close(encoder.embed(x), dynamic(resized))
    tokens = dynamic.forward_features(resized)[:, dynamic.num_prefix_tokens :]
    torch.testing.assert_close(encoder(x), tokens)


@pytest.mark.parametrize("layer, block", [(0, 0), (-2, -2), (-1, -1)])
@pytest.mark.parametrize("normed", [False, True])
def test_tokens_of_a_block(layer, block, normed):
    encoder = made(TOKENS, 8, layer=layer, norm=normed)
    outputs = []
    encoder.model.blocks[block].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    tokens = encoder(images(256))
    assert encoder.side == 8 * 16
    expected = encoder.model.norm(outputs[0]) if normed else outputs[0]
    torch.testing.assert_close(tokens, expected[:, encoder.model.num_prefix_tokens :])
    assert tokens.shape == (2, 64, encoder.embed_dim)


@pytest.mark.parametrize("image_size, n", [(256, 16), (160, 10)])
def test_more_tokens_than_the_grid_are_averaged_or_resized(image_size, n):
    encoder = made(TOKENS, 8, image_size=image_size)
    fine = made(TOKENS, n)
    fine.model.load_state_dict(encoder.model.state_dict())
    planes = fine(images(256)).transpose(1, 2).unflatten(2, (n, n))
    if n == 16:
        planes = planes.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean((3, 5))
    else:
        planes = F.interpolate(planes, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(images(256)), as_tokens(planes))


@pytest.mark.parametrize(
    "model, options, side, width",
    [
        ("swin_tiny_patch4_window7_224", {"image_size": 448, "layer": -2}, 448, 384),
        ("hiera_tiny_224.mae", {"norm": False}, 224, 768),
        ("vit_small_r26_s32_224", {}, 512, 384),  # patches of a convolutional stem
    ],
)
def test_models_of_every_kind_on_the_meta_device(model, options, side, width):
    with torch.device("meta"):
        encoder = Timm(256, 16, model=model, **options)
        assert encoder(torch.empty(2, 3, 256, 256)).shape == (2, 256, width)
        assert encoder.embed(torch.empty(2, 3, 256, 256)).shape == (2, width)
    assert isinstance(encoder, Encoder)
    assert (encoder.side, encoder.embed_dim) == (side, width)


@pytest.mark.parametrize("model", [MAPS, TOKENS])
def test_weights_with_their_classifier(tmp_path, model):
    state = timm.create_model(model, pretrained=False, num_classes=7).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    encoder = Timm(256, 8, model=model, image_size=160, checkpoint=str(tmp_path / "timm.safetensors"))
    encoder.load_weights()
    loaded = encoder.model.state_dict()
    classifier = {MAPS: {"head.fc.weight", "head.fc.bias"}, TOKENS: {"head.weight", "head.bias"}}[model]
    assert set(state) - set(loaded) == classifier
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_running_statistics_are_the_files(tmp_path):
    model = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    encoder = Timm(256, 8, model="test_resnet.r160_in1k", checkpoint=str(tmp_path / "timm.pth"))
    encoder.load_weights()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert any((buffer == 0.5).all() for buffer in before.values())
    encoder.train()
    encoder(images(256))
    assert all(torch.equal(before[name], buffer) for name, buffer in encoder.named_buffers())


def test_other_weights_are_refused_with_their_keys(tmp_path):
    torch.save(timm.create_model(TOKENS, pretrained=False).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(
        WeightsError, match=r"encoder timm: .*vit\.pth.*\n.*missing: stem\.\{0..1\}\.weight.*\n.*unexpected: cls"
    ):
        Timm(256, 8, model=MAPS, checkpoint=str(tmp_path / "vit.pth")).load_weights()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": "vit_bas_patch16_224"}, r"encoder timm: timm cannot create 'vit_bas_patch16_224': Unknown model"),
        ({"model": "vit_tiny_patch16_224.nobody"}, r"cannot create 'vit_tiny_patch16_224\.nobody'"),
        ({"model": TOKENS, "layer": 99}, r"layer = 99, but 'test_vit.* has \d+ blocks: 0 to \d+"),
        ({"model": TOKENS, "image_size": 100}, r"image_size = 100 is no multiple of the patch size 16"),
        ({"model": MAPS, "layer": 4}, r"returns no features of layer 4 for images of 160 pixels"),
        ({"model": "hiera_tiny_224.mae", "image_size": 100, "norm": False}, r"'hiera_tiny_224.mae' returns no feat"),
    ],
)
def test_what_cannot_be_made_is_refused(options, says):
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        Timm(256, 8, **options)


def test_a_feature_map_compiles_without_a_graph_break():
    encoder = made(MAPS, 8, layer=0)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(256)), encoder(images(256)))
