"""Loads a trained model from a run folder, a checkpoint, a model folder, or the weight files that a config names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from components import registry
from components.checkpoint import CheckpointError, CheckpointManager
from components.data.classes import Classes
from components.distributed.materialize import allocate, filled_by_loading, materialize
from components.distributed.parallel import World, compile_units
from components.files.fingerprint import fingerprint
from components.files.weights import load_strict
from trainer.config import Config, ConfigError, load, loads, named_files, weights_key
from trainer.run.construct import construct_parts, make_dataset
from trainer.run.parts import Parts
from trainer.run.prepare import seeded

SAMPLING = ("tokenizer", "denoiser", "latent_norm")


@dataclass
class ModelWeights:
    """Config and weights of a trained model, before any module is built.

    Attributes:
        config: of the run that produced it.
        states: unsharded state dicts of the requested modules that it holds, by name, in CPU memory.
        step: optimizer steps of training; 0 for a config.
        path: as the user wrote it.
        run: the run folder, if there is one.
        weights: "ema" if averages were requested; modules without an average have their raw weights.
        classes: of the data that it was trained on; empty if unknown.
    """

    config: Config
    states: dict[str, dict[str, Tensor]]
    step: int
    path: str
    run: Path | None
    weights: str
    classes: Classes

    @property
    def label(self) -> str:
        """Human-readable origin of the weights."""
        return f"{self.path} at step {self.step}, {self.weights} weights" if self.states else self.path


@dataclass
class LoadedModel(ModelWeights):
    """LoadedModel with modules built: frozen, in eval mode, unsharded on every rank."""

    parts: Parts

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights used for sampling. Cost: about a second per gigabyte."""
        named = self.parts.modules.named()
        each = [fingerprint(named[name]) for name in SAMPLING if name in named]
        return hashlib.sha256("".join(each).encode()).hexdigest()


def read_source(
    path: str,
    *,
    weights: str = "ema",
    step: int | None = None,
    overrides: Sequence[str] = (),
    needs: Sequence[str] = SAMPLING,
) -> ModelWeights:
    """Read config and weights of a source. Collective if there are several ranks.

    Args:
        path: a run folder, one of its checkpoints, a model folder (:mod:`components.files.model_file`), or a TOML
            config.
        weights: "ema" or "online".
        step: of the checkpoint, for run folders; None: the newest valid one.
        overrides: ``--section.key=value`` on the run's config.
        needs: modules to read the weights of: names in ``checkpoint["modules"]``.

    Raises:
        ConfigError: ``path`` is no such source; lists the available runs.
        CheckpointError: the checkpoint is damaged, or there is none of that step.
        WeightsError: a file of a model folder is damaged.
    """
    there = Path(path).expanduser()
    if step is not None and not (there / "checkpoints").is_dir():
        raise ConfigError(f"--step={step} selects a checkpoint of a run folder, but '{path}' is not a run folder")
    if there.suffix == ".toml":
        return ModelWeights(load(path, list(overrides)), {}, 0, path, None, weights, Classes())
    if (there / "manifest.json").is_file():
        return _from_checkpoint(path, there, weights, overrides, needs)
    if (there / "checkpoints").is_dir():
        return _from_checkpoint(path, _choose(there, step), weights, overrides, needs)
    if (there / "config.toml").is_file() and any(there.glob("*.safetensors")):
        from components.files import model_file

        states, about = {}, {}
        for name in needs:
            if (there / f"{name}.safetensors").is_file():
                states[name], about = model_file.read_part(there / f"{name}.safetensors")
        config = loads((there / "config.toml").read_text(), str(there / "config.toml"), list(overrides))
        step, classes = int(about.get("step", 0)), Classes.from_json(about.get("classes", ""))
        return ModelWeights(config, states, step, path, None, about.get("weights", weights), classes)
    if (there / "config.toml").is_file():
        raise ConfigError(f"'{path}' is a run folder without a checkpoint; train it first, or choose another")
    raise ConfigError(
        f"'{path}' is not a trained model{'' if there.exists() else ' (it does not exist)'}; expected a run folder "
        "(outputs/NAME), one of its checkpoints (outputs/NAME/checkpoints/step_00000100), a model folder made by "
        "export or import, or a TOML file" + _runs()
    )


def open_source(
    path: str,
    world: World,
    *,
    weights: str = "ema",
    step: int | None = None,
    overrides: Sequence[str] = (),
    needs: Sequence[str] = SAMPLING,
    dataset: bool = False,
    compiled: bool = False,
) -> LoadedModel:
    """Read and build a trained model; see :func:`read_source` for the other arguments and errors.

    Args:
        world: this process; every rank builds unsharded modules.
        needs: fields of ``Modules``; those that a checkpoint does not hold, such as "encoders", load their own weights.
        dataset: also build the config's dataset; it is always built if the denoiser is conditioned on more than labels.
        compiled: apply torch.compile to the modules' units.

    Raises:
        ConfigError: the source lacks required weights.
    """
    stored = read_source(path, weights=weights, step=step, overrides=overrides, needs=needs)
    config, seed = stored.config, stored.config.training.seed
    what = f"'{path}'"

    data = None
    if dataset or registry.datasets.get(config.dataset.name).cls.conditions:
        data = make_dataset(config)
    parts = construct_parts(config, data, uses=frozenset(needs), loaded=stored.states.keys())
    for role, module in parts.modules.named().items():
        module.eval().requires_grad_(False)
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            if role in stored.states and filled_by_loading(module):
                # Drawing random weights for a large denoiser, only to overwrite them, costs more than loading it.
                allocate(module, world.device)
            else:
                with seeded(seed, parts.places[role]):
                    materialize(module, world.device)
        module.to(world.device)
        if role in stored.states:
            load_strict(module, stored.states[role], f"{role} of {what}", path)
        elif not module.state_dict():
            pass  # a tokenizer without weights, for pixel space
        elif role == "tokenizer" and named_files("tokenizer", config.tokenizer):
            module.load_weights()
        elif role in SAMPLING:
            raise ConfigError(
                f"{what} holds no trained {role}"
                + (f"; set {weights_key(config)}" if role == "tokenizer" else "; expected a run or model folder")
            )
        else:
            module.load_weights()
        if compiled and any(True for _ in module.parameters()):
            compile_units(module)
    parts.dataset, parts.classes = data, stored.classes
    return LoadedModel(**vars(stored), parts=parts)


def _from_checkpoint(
    path: str, checkpoint: Path, weights: str, overrides: Sequence[str], needs: Sequence[str]
) -> ModelWeights:
    manager = CheckpointManager(checkpoint.parent)
    wanted = [f"{where}.{name}" for name in needs for where in ("modules", "ema")]
    found = manager.read(checkpoint, ["config", "progress.step", "classes", *wanted])
    places = ("ema", "modules") if weights == "ema" else ("modules",)
    states = {}
    for name in needs:
        held = [found[f"{place}.{name}"] for place in places if f"{place}.{name}" in found]
        states |= {name: held[0]} if held else {}
    classes = Classes.from_record(found.get("classes"))
    run = Path(path) if (Path(path) / "checkpoints").is_dir() else checkpoint.absolute().parent.parent
    config = loads(found["config"], str(run / "config.toml"), list(overrides))
    return ModelWeights(config, states, found["progress.step"], path, run, weights, classes)


def _choose(run: Path, step: int | None) -> Path:
    manager = CheckpointManager(run / "checkpoints")
    checkpoint = next(manager.candidates(), None) if step is None else run / "checkpoints" / f"step_{step:08d}"
    if checkpoint is None:
        raise CheckpointError(f"'{run}' holds no valid checkpoint; train it first")
    return checkpoint


def _runs() -> str:
    runs = sorted(p.parent for p in Path("outputs").glob("*/checkpoints"))[:10]
    return "; available runs:" + "".join(f"\n  {run}" for run in runs) if runs else ""
