"""The conformance kit: every shipped plugin passes; broken plugins fail with a message that names the failure."""

import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from components import registry
from components.nn.timm_encoder import TimmEncoder
from components.registry import PluginError, Registry
from tests.support import ROOT, broken_plugins, image_files
from tests.support import toy_plugins as toys
from trainer.__main__ import main
from trainer.plugin_kit.conformance import Case, Failure, checks, examine, resolve

pytestmark = pytest.mark.long

SLOW = ("compiles_in_one_graph", "shards_with_fsdp2")
registry.discover("plugins")
SHIPPED = [p for kind in registry.KINDS.values() for p in kind if p.cls.__module__.startswith("plugins.")]
TINY = {  # the subset that a plugin has is used
    "encoder": {"pretrained": False},
    "tokenizer": {"latent_channels": 4, "channels": 8, "multipliers": [1, 2], "norm_groups": 4, "res_blocks": 1}
    | {"mid_attention": False},
    "denoiser": {"width": 32, "depth": 2, "heads": 2, "align_depth": 1}
    | {"head_width": 32, "head_depth": 1, "head_heads": 2},
    "loss": {"channels": 8, "layers": 2, "head_width": 32},
}
RAE = {"encoder": "tiny_vit", "patch_size": 4, "width": 32, "depth": 1, "heads": 2}
OPTIONS = {
    ("encoder", "timm"): {"model": "vit_tiny_patch16_224"},
    ("tokenizer", "rae"): {"resolution": 16} | RAE,
    ("loss", "dino_gan"): {"encoder": "tiny_vit", "grid": 8, "blocks": [0, 1, 2]},
}
PARTS = {  # for recipes that require more than the contracts
    ("recipe", "sra"): {"denoiser": {"name": "sit", "width": 32, "depth": 2, "heads": 2, "align_depth": [1, 2]}},
    ("recipe", "meanflow"): {"denoiser": {"name": "meanflow_sit", "width": 32, "depth": 2, "heads": 2}
    | {"align_depth": 1}},
    ("recipe", "reg"): {"denoiser": {"name": "sit", "width": 32, "depth": 2, "heads": 2, "align_depth": 1}
    | {"class_token_dim": 48}, "encoders": {"dinov2": {"pretrained": False}}},
    ("recipe", "rae_decoder"): {"tokenizer": {"name": "rae", "resolution": 32} | RAE},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """timm's transformers with one block, and LPIPS with few channels; the contract is the same."""
    import timm

    make = timm.create_model

    def make_small(name, **options):
        for smaller in ({"embed_dim": 48, "depth": 1, "num_heads": 3}, {"depth": 1}):
            try:
                return make(name, **options, **smaller)
            except (TypeError, AssertionError):  # unknown option, or invalid shape
                continue
        return make(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", make_small)
        patch.setattr("plugins.losses.lpips.STAGES", ((4, 4), (4, 4), (4, 4, 4), (8, 8, 8), (8, 8, 8)))
        yield


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        (folder / f"class{index % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"class{index % 2}" / f"{index}.png")
    return folder


def arrow_folder(folder):
    pytest.importorskip("pyarrow", reason='hf_dataset needs pyarrow: pip install "titanrepa[hf]"')
    return image_files.write_table(folder / "train.arrow", image_files.samples(6)).parent


WRITERS = {
    "hf_dataset": arrow_folder,
    "webdataset": lambda folder: image_files.write_shards(folder, image_files.samples(6)),
}
compiled: set = set()


def examined_before(plugin: registry.Plugin, options: dict) -> bool:
    """Whether an encoder with the same timm architecture was already compiled and sharded by an earlier case."""
    if not issubclass(plugin.cls, TimmEncoder):
        return False
    with torch.device("meta"):
        part = plugin.cls(32, 4, **options)
    key = (type(part).forward, type(part.model), part.model.__class__.forward_features)
    return key in compiled or compiled.add(key) is not None


@pytest.mark.parametrize("plugin", SHIPPED, ids=lambda p: f"{p.kind}-{p.name}")
def test_every_shipped_plugin_conforms(plugin, image_folder, tmp_path):
    options = {k: v for k, v in TINY.get(plugin.kind, {}).items() if k in plugin.options}
    options |= OPTIONS.get((plugin.kind, plugin.name), {})
    if "path" in plugin.options and plugin.kind == "dataset":
        options["path"] = str(image_folder)
        if plugin.name in WRITERS:
            options["path"] = str(WRITERS[plugin.name](tmp_path))
    leave_out = SLOW if examined_before(plugin, options) else ()
    results = list(examine(Case(plugin, options, PARTS.get((plugin.kind, plugin.name), {})), leave_out))
    assert [r for r in results if r.failure] == []
    assert len(results) >= 9


@pytest.mark.parametrize("broken", broken_plugins.CASES, ids=lambda broken: f"{broken[0].kind}-{broken[0].name}")
def test_a_broken_plugin_fails_with_its_failure_named(broken):
    plugin, name, says = broken
    found = {r.name: r.failure for r in examine(Case(plugin), leave_out=set(SLOW) - {name})}
    assert says in found.get(name, f"check {name} did not run"), found


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("encoder", toys.ToyEncoder),
        ("denoiser", toys.ToyDenoiser),
        ("denoiser", broken_plugins._Initialized),
        ("loss", toys.ToyL1),
        ("loss", toys.ToyAdversary),
        ("dataset", broken_plugins._Gray),
        ("recipe", broken_plugins._Sound),
        ("recipe", broken_plugins._Teacher),
        ("optimizer", broken_plugins._Descent),
    ],
)
def test_what_the_broken_ones_derive_from_is_sound(kind, cls):
    """The base classes pass, so each broken plugin fails because of its own defect."""
    own = Registry(kind, *registry.KINDS[kind].bases)
    own.register("sound")(cls)
    assert [r for r in examine(Case(own.get("sound"))) if r.failure] == []


def test_every_check_has_a_broken_plugin():
    known = {name for _, name, _ in broken_plugins.CASES} | {"can_be_constructed"}
    for plugin in SHIPPED:
        if plugin.name in ("sit", "autoencoder_kl", "tiny_vit", "l1", "patchgan", "cosine", "shapes", "repae", "adamw"):
            names = set(checks(Case(plugin, small(plugin))))
            assert names <= known, f"{plugin.kind}: {sorted(names - known)}"


def small(plugin):
    return {k: v for k, v in TINY.get(plugin.kind, {}).items() if k in plugin.options}


PLUGIN = """
from components.contracts import ReconstructionLoss
from components.registry import losses


@losses.register("mine")
class Mine(ReconstructionLoss):
    '''Mean absolute error.

    Args:
        weight: factor in the tokenizer's loss.
    '''

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x, x_hat, posterior):
        return (x - x_hat).abs().mean(){extra}
"""


def test_the_command_says_what_is_kept_and_what_is_not(tmp_path, capsys, own_registry):
    sound, wrong = tmp_path / "sound.py", tmp_path / "wrong.py"
    sound.write_text(PLUGIN.format(extra=""))
    wrong.write_text(PLUGIN.format(extra=".detach()").replace('"mine"', '"wrong"'))
    assert main(["conform", f"{sound}:mine", "--option", "weight=0.5"]) == 0
    out = capsys.readouterr().out
    assert "loss mine (" in out and "all passed" in out and "FAIL" not in out
    assert main(["conform", str(wrong)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FAIL The gradient reaches the reconstruction" in out and "1 failed" in out
    assert "no gradient reaches the reconstruction or the posterior" in out


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("plugins.denoisers.sit:sitt", [], "did you mean 'sit'"),
        ("plugins.losses.reconstruction", [], "may be any of kl (loss), l1 (loss), l2 (loss)"),
        ("no_such_module:x", [], "'no_such_module' cannot be imported"),
        ("no_such_file.py:x", [], "does not exist"),
        ("components.diffusion.flow:x", [], "registers no plugin"),
        ("plugins.denoisers.sit:sit", ["widht=3"], "did you mean 'width'"),
        ("plugins.denoisers.sit:sit", ["width=wide"], "option width"),
        ("plugins.denoisers.sit:sit", ["width"], "expected key=value"),
        ("plugins.datasets.image_folder:image_folder", [], "requires the option path (file); add --option path=VALUE"),
    ],
)
def test_a_plugin_that_cannot_be_resolved_is_explained(spec, options, says):
    with pytest.raises(PluginError) as error:
        resolve("plugins", spec, options)
    assert says in str(error.value)


def test_a_recipe_is_examined_with_parts_of_ones_own(tmp_path):
    """The parts are given in a run's tables; the denoiser's shape shows that it took the step."""
    parts = tmp_path / "parts.toml"
    parts.write_text(
        '[tokenizer]\nname = "autoencoder_kl"\nlatent_channels = 4\nchannels = 8\nmultipliers = [1, 2]\n'
        'norm_groups = 4\nres_blocks = 1\n[denoiser]\nname = "sit"\nwidth = 32\ndepth = 2\nheads = 2\nalign_depth = 1\n'
        "[encoders.tiny_vit]\n[losses.l2]\n[losses.patchgan]\nchannels = 8\nlayers = 2\n"
        "[losses.cosine]\nhead_width = 16\n"
    )
    case = resolve("plugins", "plugins.recipes.repae:repae", parts=str(parts))
    assert [r for r in examine(case) if r.failure] == []
    from trainer.plugin_kit.conformance.recipe import Run

    assert type(Run(case).parts().modules.denoiser).__name__ == "SiT"


def test_pytest_runs_the_kit_from_any_folder(tmp_path):
    """One test per check, for a plugin in a file; without --plugin the message says what to write."""
    (tmp_path / "mine.py").write_text(PLUGIN.format(extra="[None]"))
    kit = "trainer.plugin_kit.conformance"
    command = [sys.executable, "-m", "pytest", "-p", f"{kit}.pytest_options", "-p", "no:cacheprovider"]
    command += ["--pyargs", kit, "--plugin", "mine.py:mine", "-q"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "loss must be a scalar tensor, but is (1,); take the mean" in done.stdout
    assert "test_plugin[is_a_scalar]" in done.stdout and "passed" in done.stdout


def test_the_command_needs_no_pytest():
    """pytest is installed only for tests."""
    found = list(ROOT.glob("trainer/plugin_kit/conformance/*.py"))
    assert len(found) > 10
    assert not [p.name for p in found if re.search(r"^\s*(import|from) _?pytest", p.read_text(), re.M)]


def test_an_unexpected_error_becomes_a_failure_that_says_where(tmp_path, own_registry):
    file = tmp_path / "raises.py"
    file.write_text(PLUGIN.format(extra=" / {}['x']").replace('"mine"', '"raises"'))
    case = resolve("plugins", str(file))
    with pytest.raises(Failure, match=r"raises KeyError: 'x' \(.*raises\.py:19\)"):
        checks(case)["is_a_scalar"].run()
