"""Opening a trained model: no random initial weights are drawn, and no tensor stays uninitialized."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from components.distributed.parallel import World
from components.files.model_file import read_part, write_model
from components.files.weights import WeightsError
from plugins.denoisers.sit import SiT
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from tests.support import toys
from trainer import config
from trainer.models.source import SAMPLING, open_source
from trainer.run import assemble

RAE = """[tokenizer]
name = "rae"
encoder = "tiny_vit"
patch_size = 4
width = 16
depth = 1
heads = 2

"""


class RandomOperations(TorchDispatchMode):
    """Names the random operations on tensors that have memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not out.is_meta:
            self.names.append(str(func))
        return out


@pytest.fixture(params=["sit", "lightningdit", "ditdh"])
def model(request, tmp_path) -> Path:
    """A model folder with random weights and buffers."""
    extra = "head_width = 32\nhead_depth = 1\nhead_heads = 2\n" if request.param == "ditdh" else ""
    text = toys.TOML.replace('name = "sit"\n', f'name = "{request.param}"\n{extra}')
    loaded = config.loads(text, "toy.toml", ["--training.num_classes=10"])
    named = assemble.check(loaded, 1).modules.named()
    states = {
        name: {
            key: torch.rand(value.shape) if value.is_floating_point() else torch.ones_like(value, device="cpu")
            for key, value in named[name].state_dict().items()
        }
        for name in SAMPLING
    }
    write_model(tmp_path / "model", states, loaded.to_toml(), 3, "ema")
    return tmp_path / "model"


def test_no_random_weights_are_drawn_and_every_tensor_is_the_files(model):
    with RandomOperations() as drawn:
        named = open_source(str(model), World()).parts.modules.named()
    assert drawn.names == []
    for name in SAMPLING:
        state, held = read_part(model / f"{name}.safetensors")[0], named[name].state_dict()
        assert state.keys() == held.keys() and all(torch.equal(held[key], state[key]) for key in state), name
        tensors = dict(named[name].named_parameters()) | dict(named[name].named_buffers())
        assert tensors.keys() == state.keys(), name
        assert not any(t.is_meta or t.requires_grad for t in tensors.values()), name


def test_networks_that_do_not_initialize_themselves_draw_none_either(tmp_path):
    options = ["--training.num_classes=10", "--tokenizer.resolution=32", "--recipe.name=repa"]
    text = re.sub(r"(?s)\[tokenizer\].*?(?=\[denoiser\])", RAE, toys.TOML)
    loaded = config.loads(text, "toy.toml", options)
    named = assemble.build(loaded, World(), files=False).modules.named()
    states = {name: {key: torch.rand_like(t) for key, t in named[name].state_dict().items()} for name in ("tokenizer",)}
    write_model(tmp_path, states, loaded.to_toml(), 3, "ema")
    with RandomOperations() as drawn:
        tokenizer = open_source(str(tmp_path), World(), needs=("tokenizer",)).parts.modules.tokenizer
    assert drawn.names == []
    held = tokenizer.state_dict()
    assert all(torch.equal(held[key], value) for key, value in states["tokenizer"].items())


@pytest.mark.parametrize("part, key", [("denoiser", "pos_embed"), ("latent_norm", "num_batches_tracked")])
def test_a_buffer_that_the_file_lacks_is_named(model, part, key):
    states = {name: read_part(model / f"{name}.safetensors")[0] for name in SAMPLING}
    del states[part][key]
    write_model(model, states, (model / "config.toml").read_text(), 3, "ema")
    with pytest.raises(WeightsError, match=rf"{part} of '.*model.*'.* does not match the module:\n  1 missing: {key}$"):
        open_source(str(model), World())


@pytest.mark.parametrize("model", ["sit"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_buffer_that_no_file_holds_is_computed(model, monkeypatch, dtype):
    """Integers, too: unlike floats, which are NaN until filled, nothing marks them as uninitialized."""
    make, initialize = SiT.__init__, SiT.init_weights

    @functools.wraps(make)  # the config is checked against its signature
    def make_with_table(self, *given, **options):
        make(self, *given, **options)
        self.register_buffer("table", torch.empty(100, dtype=dtype), persistent=False)

    def initialize_all(self):
        initialize(self)
        if hasattr(self, "table"):
            self.table.copy_(torch.arange(100))

    monkeypatch.setattr(SiT, "__init__", make_with_table)
    monkeypatch.setattr(SiT, "init_weights", initialize_all)
    denoiser = open_source(str(model), World()).parts.modules.denoiser
    assert torch.equal(denoiser.table, torch.arange(100, dtype=dtype))
    state = read_part(model / "denoiser.safetensors")[0]
    assert all(torch.equal(value, state[key]) for key, value in denoiser.state_dict().items())


@pytest.mark.parametrize("model", ["sit"], indirect=True)
def test_a_tokenizer_outside_the_model_folder_has_its_own_weights(model, tmp_path):
    file = (model / "tokenizer.safetensors").rename(tmp_path / "tokenizer.safetensors")
    tokenizer = open_source(str(model), World(), overrides=[f"--tokenizer.checkpoint={file}"]).parts.modules.tokenizer
    assert isinstance(tokenizer, AutoencoderKL)
    state = read_part(file)[0]
    assert all(torch.equal(value, state[key]) for key, value in tokenizer.state_dict().items())
    with pytest.raises(config.ConfigError, match=re.escape("holds no trained tokenizer; set tokenizer.checkpoint")):
        open_source(str(model), World())
