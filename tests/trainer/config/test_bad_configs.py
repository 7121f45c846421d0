"""Invalid configs are refused before anything is built, with the key and the allowed values in the message."""

import pytest
import torch

from components.distributed.parallel import World
from tests.support import ROOT, toys
from trainer import config
from trainer.config import schema
from trainer.config.problems import table_of
from trainer.run import assemble

GOOD = toys.TOML

# (overrides, expected words of the message)
BAD = [
    ("--trainig.steps=5", ["trainig: unknown key", "did you mean 'training'"]),
    ("--training.stpes=5", ["training.stpes: unknown key", "did you mean 'steps'"]),
    ("--training.steps=ten", ["training.steps = 'ten'", "expected int"]),
    ("--training.steps=1.5", ["training.steps = 1.5", "expected int"]),
    ("--training.steps=true", ["training.steps = True", "expected int"]),
    ("--training.steps=0", ["training.steps = 0", "greater than or equal to 1"]),
    ("--training.steps=-3", ["training.steps = -3", "greater than or equal to 1"]),
    ("--training.batch_size=0", ["training.batch_size = 0"]),
    ("--training.precision=fp8", ["training.precision = 'fp8'", "valid: bf16, fp32, fp64"]),
    ("--training.compile=1", ["training.compile = 1", "expected bool"]),
    ("--training=5", ["training = 5"]),
    ("--training.accumulation=3", ["training.batch_size = 8", "training.accumulation = 3", "multiple of 3"]),
    ("--training.resolution=30", ["training.resolution = 30", "factor of 4", "28 and 32"]),
    ("--run.log_every=0", ["run.log_every = 0"]),
    ("--optimizer.lr=0", ["optimizer.lr = 0", "greater than 0"]),
    ("--optimizer.lr=inf", ["optimizer.lr = inf: expected a finite number"]),
    ("--optimizer.betas=[0.9, nan]", ["optimizer.betas.1 = nan", "finite"]),
    ("--optimizer.tokenizer.lr=-inf", ["optimizer.tokenizer.lr = -inf", "finite"]),
    ("--losses.kl.weight=inf", ["losses.kl.weight = inf", "finite"]),
    ("--encoders.tiny_vit.weight=+inf", ["encoders.tiny_vit.weight = inf", "finite"]),
    ("--flow.shift=inf", ["flow.shift = inf", "finite"]),
    ("--flow.shift=abc", ["flow.shift = 'abc': expected float | 'auto'"]),
    ("--flow.shift=-1", ["flow.shift = -1: input should be greater than 0"]),
    ("--training.channels_last=fast", ["training.channels_last = 'fast': expected bool | 'auto'"]),
    ("--denoiser.align_depth=x", ["denoiser.align_depth = 'x': expected int | list[int]"]),
    ("--encoders.name=tiny_vit", ["encoders.name = 'tiny_vit'", "write [encoders.LABEL], such as [encoders.tiny_vit]"]),
    ("--losses.name=l1", ["losses.name = 'l1'", "write [losses.LABEL], such as [losses.l1]"]),
    ("--losses.l1=2.0", ["losses.l1 = 2.0", "write [losses.LABEL], such as [losses.l1]"]),
    ("--optimizer.lr=fast", ["optimizer.lr = 'fast'", "expected float"]),
    ("--optimizer.betas=[0.9]", ["optimizer.betas", "2 items"]),
    ("--optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1 = 1.5"]),
    ("--optimizer.schedule=cosin", ["optimizer.schedule = 'cosin'", "did you mean 'cosine'"]),
    ("--optimizer.learning_rate=1e-3", ["optimizer.learning_rate: unknown key", "lr"]),
    ("--optimizer.tokeniser.lr=1e-3", ["optimizer.tokeniser", "did you mean 'tokenizer'"]),
    ("--optimizer.tokenizer.lrr=1e-3", ["optimizer.tokenizer.lrr: unknown key", "did you mean 'lr'"]),
    ("--optimizer.name=muonn", ["optimizer.name = 'muonn'", "did you mean 'muon'?"]),
    ("--optimizer.denoiser.name=muonn", ["optimizer.denoiser.name = 'muonn'", "did you mean 'muon'?"]),
    ("--optimizer.momentum=0.9", ["optimizer.momentum: unknown key", "weight_decay"]),
    ("--optimizer.denoiser={name = 'muon', momentun = 0.9}", ["optimizer.denoiser.momentun: unknown", "'momentum'"]),
    ("--optimizer.denoiser={name = 'muon', momentum = 1}", ["optimizer.denoiser.momentum = 1", "less than 1"]),
    ("--optimizer.tokenizer.betas=[0.9]", ["optimizer.tokenizer.betas", "2 items"]),
    ("--optimizer.schedule=piecewise", ["optimizer.points: missing", "piecewise", "[[10000, 1.0]"]),
    ("--optimizer.tokenizer.schedule=piecewise", ["optimizer.tokenizer.points: missing"]),
    ("--optimizer.points=[[5, 1.0], [5, 0.1]]", ["optimizer.points = [[5, 1.0], [5, 0.1]]: steps must ascend"]),
    ("--optimizer.points=[[0.5, 1.0]]", ["optimizer.points", "expected pairs [step, factor]"]),
    ("--optimizer.points=[0, 1]", ["optimizer.points.0 = 0", "expected list[float]"]),
    ("--optimizer.decay_shape=sqrt", ["optimizer.decay_shape = 'sqrt'", "did you mean '1-sqrt'"]),
    ("--optimizer.decay_fraction=2", ["optimizer.decay_fraction = 2", "less than or equal to 1"]),
    ("--ema.decay=1.0", ["ema.decay = 1.0", "less than 1"]),
    ("--flow.path=straight", ["flow.path = 'straight'", "valid: cosine, linear"]),
    ("--sampling.guidance=0.5", ["sampling.guidance = 0.5"]),
    ("--loader.max_unreadable=2", ["loader.max_unreadable = 2", "less than or equal to 1"]),
    ("--recipe.name=repa-e", ["no recipe is called 'repa-e'", "did you mean 'repae'"]),
    ("--recipe.weight=2", ["recipe.weight: unknown key"]),
    ("--tokenizer.name=autoencoder", ["no tokenizer is called 'autoencoder'", "did you mean 'autoencoder_kl'"]),
    ("--tokenizer.chanels=8", ["tokenizer.chanels: unknown key", "did you mean 'channels'"]),
    ("--tokenizer.channels=6", ["tokenizer.channels = 6", "tokenizer.norm_groups = 4"]),
    ("--tokenizer.preset=f8d5", ["tokenizer.preset = 'f8d5'", "did you mean 'f8d4'"]),
    ("--tokenizer.attention_levels=[7]", ["tokenizer.attention_levels = [7]", "0 to 2"]),
    ("--tokenizer.trainable=false", ["tokenizer.trainable = false", "trains the tokenizer"]),
    ("--denoiser.align_depth=3", ["denoiser.align_depth = 3", "1 to 2"]),
    ("--denoiser.align_depth=0", ["denoiser.align_depth = 0", "1 to 2"]),
    ("--denoiser.patch_size=3", ["denoiser.patch_size = 3", "latent size 8", "1, 2, 4, 8"]),
    ("--denoiser.size=XXL", ["denoiser.size = 'XXL'", "did you mean 'XL'"]),
    ("--denoiser.class_token_dim=-1", ["denoiser.class_token_dim = -1", "0 (none)"]),
    ("--tokenizer.latent_channels=-1", ["tokenizer.latent_channels = -1", "at least 1"]),
    ("--losses.patchgan.channels=-1", ["patchgan] channels = -1", "at least 1"]),
    ("--losses.patchgan.start_step=-1", ["patchgan] start_step = -1", "at least 0"]),
    ("--losses.cosine.head_width=-1", ["head_width = -1", "at least 1"]),
    ("--denoiser.heads=5", ["denoiser.heads = 5", "denoiser.width = 32"]),
    ("--denoiser.label_dropout=1.0", ["denoiser.label_dropout = 1.0"]),
    ("--encoders.dinov22.size=b", ["no encoder is called 'dinov22'", "did you mean 'dinov2'"]),
    ("--encoders.dinov2.size=xl", ["encoders.dinov2.size = 'xl'", "valid: b, g, l, s"]),
    ("--encoders.dinov2.pretraned=true", ["encoders.dinov2.pretraned: unknown key", "did you mean 'pretrained'"]),
    ("--losses.l1.wieght=2.0", ["losses.l1.wieght: unknown key", "did you mean 'weight'"]),
    ("--losses.l3.weight=1.0", ["no loss is called 'l3'"]),
    ("--losses.cosine.tokenizer_weight=high", ["losses.cosine.tokenizer_weight = 'high'", "expected float"]),
    ("--losses.second.name=cosine", ["losses.second", "one alignment loss"]),
    ("--losses.patchgan.layers=0", ["losses.patchgan", "layers = 0"]),
    ("--dataset.name=shape", ["no dataset is called 'shape'", "did you mean 'shapes'"]),
    ("--dataset.split=test", ["dataset.split = 'test'", "heldout"]),
    ('--plugins=["nowhere.py"]', ["nowhere.py", "does not exist"]),
    ('--plugins=["no_such_module"]', ["no_such_module", "cannot be imported"]),
    ("--parallel.strategy=fdsp", ["parallel.strategy = 'fdsp'", "did you mean 'fsdp'"]),
    ("--activation_checkpoint.tokenizer=every 1", ["activation_checkpoint.tokenizer = 'every 1'", '"every N"']),
    ("--activation_checkpoint.denoiser=budget 0.5", ["'budget 0.5'", "training.compile = true"]),
    ("--guard.window=3", ["guard.window = 3", "greater than or equal to 10"]),
    ("training.steps=5", ["'training.steps=5' is not an override", "--section.key=value"]),
    ("--dataset.name.x=1", ["--dataset.name.x", "'name' is a value, not a table"]),
]  # fmt: skip


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return str(path)


def load_and_check(path: str, *overrides: str):
    loaded = config.load(path, list(overrides))
    assemble.check(loaded, world_size=1)
    return loaded


def test_the_good_config_is_good(good):
    load_and_check(good)


@pytest.mark.parametrize(("override", "says"), BAD, ids=[override for override, _ in BAD])
def test_bad_value(good, override, says):
    with pytest.raises(config.ConfigError) as error:
        load_and_check(good, override)
    for text in says:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["recipe: missing", "tokenizer: missing", "dataset: missing"]),
        ("[training\nsteps = 1", ["is not valid TOML", "line 1"]),
        ("[training]\nsteps = 1\nsteps = 2", ["is not valid TOML"]),
        (GOOD.replace('[recipe]\nname = "repae"', "[recipe]"), ["recipe.name: missing"]),
        (GOOD.replace("[encoders.tiny_vit]", ""), ["needs an [encoders.NAME] table"]),
        (GOOD.replace("[losses.cosine]\nhead_width = 32", ""), ["needs an alignment loss"]),
        (GOOD.replace("[losses.l1]\n[losses.kl]", ""), ["needs a reconstruction loss"]),
        (GOOD.replace("[denoiser]", "[denoizer]"), ["denoizer: unknown key", "did you mean 'denoiser'"]),
        (GOOD.split("[denoiser]")[0] + "[encoders" + GOOD.split("[encoders")[1], ["needs a [denoiser] table"]),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, text, says):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        load_and_check(str(path))
    for expected in says:
        assert expected in str(error.value)


def test_every_error_of_a_file_is_reported_at_once(good):
    with pytest.raises(config.ConfigError) as error:
        load_and_check(good, "--training.stpes=5", "--ema.decay=2.0", "--optimizer.lr=-1.0")
    assert str(error.value).count("good.toml: ") == 3


def test_missing_file_lists_the_configs_that_exist():
    with pytest.raises(config.ConfigError, match=r"does not exist(.|\n)*quickstart\.toml"):
        config.load(str(ROOT / "train_configs" / "quikstart.toml"))


def test_fewer_classes_than_the_dataset_has(good):
    with pytest.raises(config.ConfigError, match=r"training.num_classes = 3, but the dataset has 10 classes"):
        assemble.build(config.load(good, ["--training.num_classes=3"]), World())


def test_every_missing_file_is_named_at_once(tmp_path):
    path = tmp_path / "folder.toml"
    path.write_text(GOOD.replace("size = 40", ""))
    loaded = config.load(
        str(path),
        [
            "--dataset.name=image_folder",
            f"--dataset.path={tmp_path}/imagenet",
            f"--tokenizer.checkpoint={tmp_path}/vae.pt",
            f"--losses.patchgan.checkpoint={tmp_path}/gan.pt",
        ],
    )
    with pytest.raises(config.ConfigError) as error:
        assemble.build(loaded, World())
    for text in ("imagenet", "vae.pt", "gan.pt"):
        assert text in str(error.value)


def test_weights_of_parts_that_the_recipe_leaves_out_may_be_missing(good, tmp_path):
    absent = [f"--losses.patchgan.checkpoint={tmp_path}/gan.pt", f"--losses.lpips.vgg_checkpoint={tmp_path}/vgg.pt"]
    parts = assemble.build(config.load(good, ["--recipe.name=repa", *absent]), World())
    assert parts.modules.discriminator is None and not parts.modules.reconstruction


def test_a_checkpoint_of_another_architecture_names_the_keys(good, tmp_path):
    torch.save({"encoder.conv_in.weight": torch.zeros(1), "surplus": torch.zeros(1)}, tmp_path / "vae.pt")
    with pytest.raises(config.ConfigError) as error:
        assemble.build(config.load(good, [f"--tokenizer.checkpoint={tmp_path}/vae.pt"]), World())
    shape = "with a different shape: encoder.conv_in.weight"
    for text in ("missing: encoder.conv_in.bias", "unexpected: surplus", shape):
        assert text in str(error.value)


def test_overrides_and_resolved_file_round_trip(good, tmp_path):
    loaded = config.load(good, ["--training.steps=7", "--ema.tokenizer", "--denoiser.size", "S", "--run.dir=out"])
    assert loaded.training.steps == 7 and loaded.ema.tokenizer and loaded.denoiser.options["size"] == "S"
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(loaded.to_toml())
    assert config.load(str(resolved)) == loaded


def test_every_field_is_documented():
    for table in (c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Table)):
        for name, field in table.model_fields.items():
            if table_of(field.annotation) is None and "dict" not in str(field.annotation):
                assert field.description, f"{table.__name__}.{name} has no docstring"
