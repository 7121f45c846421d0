"""What a part returns is checked at its first use; the message names the plugin, what was found and expected."""

from __future__ import annotations

import re
import types

import pytest
import torch
from torch import nn

from components import registry
from components.contracts import Dataset, DatasetItem, DenoiserOutput, LossTerm, Posterior, Recipe
from components.data.loader import DataError, TrainingView, check_item
from components.distributed.parallel import World
from components.registry import PluginError
from plugins.recipes.repae import RepaE
from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import compiled_by_aot_eager
from trainer import config as configs
from trainer.__main__ import main
from trainer.run.first_use import Checked, check_terms, checked
from trainer.run.loop import Trainer

# One fault each: path of the method, what it returns instead, and the message.
FAULTS = {
    "a tuple": ("tokenizer.encode", lambda p: (p.mean, p.logvar), "encode returns a tuple; expected .*Posterior"),
    "one channel": (
        "tokenizer.encode",
        lambda p: Posterior(p.mean[:, :1], p.logvar),
        r"mean float64 \(4, 1, 8, 8\); expected a float tensor \(4, 4, 8, 8\), \(B, channels, R / factor",
    ),
    "logvar of one": ("tokenizer.encode", lambda p: Posterior(p.mean, p.logvar[:1]), r"logvar float64 \(1, 4, 8, 8\)"),
    "half the side": (
        "tokenizer.decode",
        lambda x: x[..., ::2],
        r"\(4, 3, 32, 16\); .*\(4, 3, 32, 32\)",
    ),
    "uint8": (
        "tokenizer.decode",
        lambda x: x.to(torch.uint8),
        r"uint8 \(4, 3, 32, 32\); expected a float",
    ),
    "velocity": (
        "denoiser.forward",
        lambda out: out.velocity,
        r"float64 \(4, 4, 8, 8\); .*DenoiserOutput",
    ),
    "twice the channels": (
        "denoiser.forward",
        lambda out: out._replace(velocity=torch.cat([out.velocity] * 2, 1)),
        r"velocity float64 \(4, 8, 8, 8\); expected a float tensor \(4, 4, 8, 8\), as x_t",
    ),
    "a token more": (
        "denoiser.forward",
        lambda out: out._replace(tokens=torch.cat([out.tokens, out.tokens[:, :1]], 1)),
        r"tokens float64 \(4, 17, 32\); expected a float tensor \(4, 16, 32\), \(B, grid \* grid, width\)",
    ),
    "tokens of all depths": (
        "denoiser.forward",
        lambda out: DenoiserOutput(out.velocity, (out.tokens,) * 3),
        "tokens as a tuple; expected a tensor, as align_depth says",
    ),
    "a class token": (
        "encoders.patches.forward",
        lambda y: torch.cat([y[:, :1], y], 1),
        r"returns float64 \(4, 17, 12\); expected a float tensor \(4, 16, 12\), .* without class and register tokens",
    ),
    "another width": ("encoders.patches.forward", lambda y: y[..., :8], r"\(4, 16, 8\); expected .*\(4, 16, 12\)"),
    "a list": ("encoders.patches.forward", lambda y: [y], "returns a list; expected"),
    "a map": ("encoders.patches.forward", lambda y: y.mT.unflatten(2, (4, 4)), r"\(4, 12, 4, 4\); expected"),
    "one per image": ("reconstruction.l1.forward", lambda v: v.repeat(4), r"returns float64 \(4,\); .* \(\), a scalar"),
    "a number": ("reconstruction.l1.forward", lambda v: v.item(), "returns a float; expected a float tensor"),
    "one per patch": ("discriminator.generator", lambda v: v.repeat(2, 2), r"generator returns float64 \(2, 2\)"),
    "no dict": ("discriminator.discriminator", lambda v: v[0], "returns a dict; expected two dicts of scalars"),
    "one of each": ("discriminator.discriminator", lambda v: ({n: x[None] for n, x in v[0].items()}, {}), r"\(1,\)"),
    "one per pair": ("alignment.align", lambda v: v[None], r"align returns float64 \(1,\); .* \(\), a scalar"),
}


def tampered(m, place: str, change) -> None:
    """Let a method of a part return ``change`` of its result."""
    role, *label, method = place.split(".")
    part = vars(m)[role][label[0]] if label else vars(m)[role]
    original = vars(part).get(method, None) or part.__class__.__dict__.get(method) or type(part).forward
    setattr(part, method, types.MethodType(lambda self, *args, **kwargs: change(original(self, *args, **kwargs)), part))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_that_breaks_its_contract_is_named(fault):
    place, change, message = FAULTS[fault]
    m = toys.modules()
    tampered(m, place, change)
    batch, random = toys.batch()
    with pytest.raises(PluginError, match=message) as caught:
        RepaE().step(checked(m, {place.rpartition(".")[0]: "table.of"}), batch, random, lambda *_, **__: None, 0)
    assert str(caught.value).startswith("[table.of] ") and "\n" not in str(caught.value)


def test_sound_parts_pass_and_give_the_same_numbers():
    terms: list[dict] = []
    for wrap in (lambda m: m, lambda m: checked(m, {})):
        batch, random = toys.batch()
        found = {}
        RepaE().step(
            wrap(toys.modules()), batch, random, lambda group, terms, found=found, **_: found.update({group: terms}), 0
        )
        terms.append({(g, n): term.value for g, each in found.items() for n, term in each.items()})
    assert terms[0].keys() == terms[1].keys() and all(torch.equal(terms[0][k], terms[1][k]) for k in terms[0])


def test_a_checked_part_behaves_like_the_part():
    part = nn.Linear(2, 2)
    stand_in = Checked(part, "x", {})
    assert isinstance(stand_in, nn.Linear) and list(stand_in.parameters()) == list(part.parameters())
    stand_in.requires_grad_(False)
    stand_in.mark = 3
    assert not part.weight.requires_grad and part.mark == 3
    x = torch.ones(1, 2)
    swapped = torch.func.functional_call(stand_in, {"weight": torch.zeros(2, 2), "bias": torch.ones(2)}, x)
    assert torch.equal(swapped, torch.ones(1, 2))


@pytest.mark.parametrize(
    "terms, message",
    [
        ({"l1": torch.zeros(())}, r"update\('g'\) gets float32 \(\) as 'l1'; expected LossTerm"),
        ({"l1": LossTerm(1.0, torch.zeros(4))}, r"gets float32 \(4,\) as 'l1'; expected a scalar tensor"),
        ({"l1": LossTerm(1.0, 0.5)}, r"gets a float as 'l1'; expected a scalar tensor"),
    ],
)
def test_a_recipe_that_passes_something_else_is_named(terms, message):
    with pytest.raises(PluginError, match=message):
        check_terms(Recipe(), "g", terms)


class Wrong(Dataset):
    num_classes, class_names, flip = 3, ("a", "b", "c"), True
    conditions = ("text",)

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.item


IMAGE = torch.zeros(3, 32, 32, dtype=torch.uint8)
TEXT = {"text": torch.zeros(4)}


@pytest.mark.parametrize(
    "item, message",
    [
        ((IMAGE, 0), r"Wrong\[0\] is a tuple, expected components.contracts.DatasetItem\(image, label\)"),
        (None, r"Wrong\[0\] is a NoneType"),
        (DatasetItem(IMAGE[:, :16], 0), r"uint8 \(3, 16, 32\), expected torch.uint8 \(3, 32, 32\), R = training.resol"),
        (DatasetItem(IMAGE[:, :16, :16], 0), r"uint8 \(3, 16, 16\), expected torch.uint8 \(3, 32, 32\)"),
        (DatasetItem(IMAGE[:1], 0), r"\(1, 32, 32\), expected"),
        (DatasetItem(IMAGE.float(), 0), r"float32 \(3, 32, 32\), expected"),
        (DatasetItem(IMAGE.numpy(), 0), r"image is ndarray"),
        (DatasetItem(None, 0), r"image is NoneType"),
        (DatasetItem(IMAGE, 3), r"label 3 is outside \[0, 3\)"),
        (DatasetItem(IMAGE, -1), r"label -1 is outside"),
        (DatasetItem(IMAGE, 1.0), r"label is a float, expected int"),
        (DatasetItem(IMAGE, torch.tensor(1)), r"label is a Tensor, expected int"),
        (DatasetItem(IMAGE, 0), r"condition has no 'text'"),
    ],
)
@pytest.mark.parametrize("epoch", range(3))  # mirrored in some
def test_an_item_that_breaks_the_contract_is_named(item, message, epoch):
    with pytest.raises(DataError, match=message):
        TrainingView(Wrong(item), 0, 32)[epoch, 0]


def test_a_sound_item_passes():
    item = DatasetItem(IMAGE, 2, condition=TEXT)
    assert check_item(item, Wrong(item), 0, 32) is item


PLUGIN = '''
import torch
from components import registry
from components import registry
from components.contracts import Dataset, DatasetItem, Encoder

class Base(Dataset):
    num_classes, class_names = 1, ("a",)
    def __init__(self, resolution: int) -> None:
        pass
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return DatasetItem(torch.full((3, 32, 32), index, dtype=torch.uint8), 0)

@registry.datasets.register("faults_small")
class Small(Base):
    """Returns images of another side."""
    def __getitem__(self, index):
        return DatasetItem(torch.zeros(3, 24, 24, dtype=torch.uint8), 0)

@registry.datasets.register("faults_tuple")
class Tuple(Base):
    """Returns a tuple."""
    def __getitem__(self, index):
        return tuple(super().__getitem__(index)[:2])

@registry.datasets.register("faults_empty")
class Empty(Base):
    """Has no items."""
    def __len__(self):
        return 0

@registry.datasets.register("faults_unnamed")
class Unnamed(Base):
    """Counts no classes."""
    num_classes = None

class Patches(Encoder):
    embed_dim = 12
    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
    def forward(self, images):
        return images.new_zeros(len(images), self.grid ** 2, 12)

@registry.encoders.register("faults_wide")
class Wide(Patches):
    """Declares another width than it returns."""
    embed_dim = 24

@registry.encoders.register("faults_class_token")
class ClassToken(Patches):
    """Returns a class token."""
    def forward(self, images):
        return images.new_zeros(len(images), self.grid ** 2 + 1, 12)

@registry.encoders.register("faults_no_width")
class NoWidth(Encoder):
    """Has no embed_dim."""
    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__()
    def forward(self, images):
        return images
'''

RUNS = {
    "--dataset.name=faults_small": r"dataset 'faults_small'\[0\]: image is torch.uint8 \(3, 24, 24\), .*\(3, 32, 32\)",
    "--dataset.name=faults_tuple": r"dataset 'faults_tuple'\[0\] is a tuple, expected",
    "--dataset.name=faults_empty": r"dataset 'faults_empty' is empty",
    "--dataset.name=faults_unnamed": r"dataset 'faults_unnamed' num_classes = None is a NoneType; expected int",
    "--encoders.tiny_vit.name=faults_wide": r"encoder 'faults_wide': .*\(4, 16, 12\); .*\(4, 16, 24\)",
    "--encoders.tiny_vit.name=faults_class_token": r"\[encoders.tiny_vit\] encoder 'faults_class_token': .*\(4, 17, ",
    "--encoders.tiny_vit.name=faults_no_width": r"encoder 'faults_no_width' has no attribute embed_dim: expected int",
}  # fmt: skip


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "faults.py").write_text(PLUGIN)
    path = folder / "toy.toml"
    path.write_text(
        f'plugins = ["{folder}/faults.py"]\n'
        + toys.TOML.replace("batch_size = 8", "batch_size = 4").replace("size = 40\n", "")
    )
    yield str(path)
    for kind in registry.KINDS.values():  # other tests examine all plugins
        kind._plugins = {name: plugin for name, plugin in kind._plugins.items() if not name.startswith("faults_")}


@pytest.mark.long
@pytest.mark.parametrize("option", RUNS)
@pytest.mark.parametrize("command", ["check", "train"])
def test_check_and_train_name_the_plugin_in_one_line(toml, tmp_path, capsys, option, command):
    assert main([command, toml, option, f"--run.dir={tmp_path}/run"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(RUNS[option], error[0]), error[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_check_reads_one_item_and_says_if_there_is_no_data(toml, capsys):
    assert main(["check", toml]) == 0
    assert "dataset: 50,000 items, 10 classes; read one" in capsys.readouterr().out
    assert main(["check", toml, "--dataset.name=image_folder", "--dataset.path=/nowhere"]) == 0
    assert "dataset not checked: dataset image_folder: '/nowhere' is not a folder" in capsys.readouterr().out


def _trains_on_two_ranks(rank: int, world: int, toml: str, folder: str, options: list[str]) -> str:
    config = configs.load(toml, [f"--run.dir={folder}", *options])
    try:
        with compiled_by_aot_eager():
            Trainer(config, World(rank, world)).run()
    except PluginError as error:
        return str(error)
    return ""


@pytest.mark.long
def test_sharded_and_compiled_runs_are_checked_alike(toml, tmp_path):
    common = ["--parallel.strategy=fsdp", "--training.compile=true", "--training.steps=2"]
    wrong = [*common, "--encoders.tiny_vit.name=faults_class_token"]
    found = run_ranks(_trains_on_two_ranks, 2, toml, str(tmp_path / "wrong"), wrong)
    assert all("encoder 'faults_class_token': forward returns float32 (2, 17, 12)" in text for text in found)
    assert run_ranks(_trains_on_two_ranks, 2, toml, str(tmp_path / "right"), common) == ["", ""]
