"""Plugin registries: a decorator registers a class; its keyword-only parameters define its TOML table.

There is one :class:`Registry` per kind. Parameters before the ``*`` are passed by the trainer and follow from other
parts (latent shape, number of classes, ...); parameters after it are the plugin's options.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

ENTRY_POINT_GROUP = "titanrepa.plugins"


File = Annotated[str, "file"]
"""Type of an option that names a file or folder: a path, or ``hf://organization/name/file[@revision]``.

A relative path is searched for in the current folder, then beside the TOML file.
"""


class PluginError(Exception):
    """A plugin is missing, registered twice, malformed, or its module cannot be imported."""


@dataclass(frozen=True)
class Option:
    """One key of a plugin's TOML table."""

    name: str
    annotation: Any
    default: Any  # inspect.Parameter.empty if required
    doc: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def type_name(self) -> str:
        return type_name(self.annotation)

    @property
    def is_file(self) -> bool:
        """Whether the option is a :data:`File`, or one that may be None."""
        return File in (self.annotation, *typing.get_args(self.annotation))


@dataclass(frozen=True)
class Plugin:
    """A registered class and where it is defined."""

    kind: str
    name: str
    cls: type
    file: str
    line: int

    @property
    def summary(self) -> str:
        """First line of the class docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def options(self) -> dict[str, Option]:
        """Keyword-only parameters of ``__init__``, in order, with their descriptions from the docstring."""
        hints = typing.get_type_hints(inspect.unwrap(self.cls.__init__), include_extras=True)
        docs = _docstring_args(self.cls)
        return {
            p.name: Option(p.name, hints.get(p.name, Any), p.default, docs.get(p.name, ""))
            for p in _parameters(self.cls)
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @property
    def files(self) -> list[str]:
        """Names of the options that are files."""
        return [option.name for option in self.options.values() if option.is_file]

    def schema(self) -> type[BaseModel]:
        """Pydantic model of the options with strict types; unknown keys are an error."""
        fields: dict[str, Any] = {}
        for option in self.options.values():
            default = ... if option.required else option.default
            fields[option.name] = (option.annotation, Field(default, description=option.doc or None))
        config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), arbitrary_types_allowed=True)
        return create_model(f"{self.kind}.{self.name}", __config__=config, **fields)


class Registry:
    """Registry of the plugins of one kind.

    Args:
        kind: name of the kind in messages and commands, such as "encoder".
        bases: names of the kind's base classes in ``components.contracts``; every plugin derives from one of them.
    """

    def __init__(self, kind: str, *bases: str) -> None:
        self.kind, self.bases = kind, bases
        self._plugins: dict[str, Plugin] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator that registers a plugin.

        Raises:
            PluginError: another class has this name, the class does not derive from the kind's base class, or
                ``__init__`` takes other arguments than those of its kind, or ``**kwargs``.
        """

        def add(cls: type) -> type:
            file = inspect.getsourcefile(cls) or "<unknown>"
            plugin = Plugin(self.kind, name, cls, file, _definition_line(cls))
            other = self._plugins.get(name)
            # Importing the same definition again (reloaded, or under another module name) replaces it.
            if other is not None and (other.where, other.cls.__qualname__) != (
                plugin.where,
                cls.__qualname__,
            ):
                raise PluginError(
                    f"two {self.kind} plugins are called '{name}': {other.where} and {plugin.where}; rename one"
                )
            from components import contracts  # imports torch, which a command's --help does not need

            if self.bases and not issubclass(cls, tuple(vars(contracts)[base] for base in self.bases)):
                raise PluginError(
                    f"{self.kind} '{name}' ({plugin.where}): {cls.__name__} must derive from "
                    f"components.contracts.{' or '.join(self.bases)}"
                )
            found = [p.name for p in _parameters(cls)[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            if self.bases and len(found) != len(cls.given):
                raise PluginError(
                    f"{self.kind} '{name}' ({plugin.where}): the trainer constructs this {self.kind} with "
                    f"({', '.join(cls.given)}), but __init__ takes ({', '.join(found)}) as positional parameters; "
                    "put every option after a bare *"
                )
            var_kwargs = [p.name for p in _parameters(cls) if p.kind is inspect.Parameter.VAR_KEYWORD]
            if var_kwargs:
                raise PluginError(
                    f"{self.kind} '{name}' ({plugin.where}): __init__ takes **{var_kwargs[0]}, "
                    "so its options cannot be validated; declare each option after a bare *"
                )
            self._plugins[name] = plugin
            return cls

        return add

    def has(self, name: str) -> bool:
        """Whether a plugin has this name; imports it."""
        _import_pending((self.kind, name))
        if name not in self._plugins:
            _import_pending()
        return name in self._plugins

    def get(self, name: str) -> Plugin:
        """Return a plugin by name; raise :class:`PluginError` with the closest valid name if it does not exist."""
        if self.has(name):
            return self._plugins[name]
        message = f"no {self.kind} is called '{name}'{nearest(name, self._plugins)}"
        if failures:
            message += "; these plugin files could not be imported:\n" + "\n".join(
                f"  {f.where}: {f.error}" for f in failures
            )
        raise PluginError(message)

    def imported(self) -> dict[str, Plugin]:
        """Plugins of the modules that are imported, by name."""
        return dict(self._plugins)

    def names(self) -> list[str]:
        _import_pending()
        return sorted(self._plugins)

    def __iter__(self):
        return iter(self._plugins[name] for name in self.names())


recipes = Registry("recipe", "Recipe")
tokenizers = Registry("tokenizer", "Tokenizer")
denoisers = Registry("denoiser", "Denoiser")
encoders = Registry("encoder", "Encoder")
losses = Registry("loss", "ReconstructionLoss", "AdversarialLoss", "AlignmentLoss")
datasets = Registry("dataset", "Dataset")
optimizers = Registry("optimizer", "Optimizer")

KINDS: dict[str, Registry] = {
    r.kind: r for r in (recipes, tokenizers, denoisers, encoders, losses, datasets, optimizers)
}


def title(part: object) -> str:
    """Name of a plugin object in messages: "encoder 'dinov2'"; of other objects the class."""
    for kind in KINDS.values():
        for plugin in kind._plugins.values():
            if plugin.cls is part.__class__:
                return f"{plugin.kind} '{plugin.name}'"
    return part.__class__.__name__


@dataclass(frozen=True)
class ImportFailure:
    """A plugin module that could not be imported."""

    where: str
    error: str


failures: list[ImportFailure] = []

REGISTRATION = re.compile(rf'^@(?:\w+\.)*({"|".join(KINDS)})e?s\.register\("([^"]+)"\)', re.M)
_pending: dict[str, set[tuple[str, str]]] = {}  # modules to import when needed, and the (kind, name) they register


def discover(package: str, extra: Iterable[str] = (), *, lazy: bool = False) -> None:
    """Import all plugins: the modules of ``package``, installed entry points, and ``extra``.

    Import failures are stored in :data:`failures` and reported by :meth:`Registry.get` if a name is missing. Failures
    in ``extra`` raise immediately, because these modules were requested explicitly.

    Args:
        package: package whose modules register plugins when imported.
        extra: dotted module names or paths of .py files.
        lazy: read the modules of ``package`` for the names they register, and import each when :meth:`Registry.get`
            asks for one; all of them, when it asks for an unknown name or when plugins are listed.

    Raises:
        PluginError: an extra module does not exist or cannot be imported, or two plugins have the same name.
    """
    failures.clear()
    _pending.clear()
    for folder in map(Path, importlib.import_module(package).__path__):
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(folder)
            if all((folder / parent / "__init__.py").is_file() for parent in place.parents):
                name = ".".join((package, *place.with_suffix("").parts)).removesuffix(".__init__")
                _pending[name] = set(REGISTRATION.findall(path.read_text(encoding="utf-8", errors="replace")))
    if not lazy:
        _import_pending()
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _attempt(f"entry point {entry.name} = {entry.value}", entry.load)
    for name in extra:
        try:
            _import_file(name) if name.endswith(".py") else importlib.import_module(name)
        except PluginError:
            raise
        except Exception as error:
            place = _failing_place(error)
            raise PluginError(f"plugins: '{name}' cannot be imported: {_describe(error)}{place}") from error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Hint for an error message: "; did you mean 'x'? (valid: ...)", or only the valid names if none is similar."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    listed = ", ".join(candidates) if candidates else "none"
    return f"{hint} (valid: {listed})"


def type_name(annotation: Any) -> str:
    """Format a type for users: ``int``, ``'S' | 'B'``, ``list[int]``."""
    if annotation is type(None):
        return "none"
    if annotation == File:
        return "file"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin is typing.Literal:
        return " | ".join(repr(a) for a in args)
    if origin is typing.Union or getattr(origin, "__name__", "") == "UnionType":
        return " | ".join(type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(a) for a in args)}]"
    return getattr(annotation, "__name__", str(annotation))


def pending() -> list[str]:
    """Modules of a lazy :func:`discover` that are not imported yet."""
    return list(_pending)


def import_pending(modules: Iterable[str]) -> None:
    """Import some of the :func:`pending` modules; :data:`failures` has those that cannot be imported."""
    for name in [name for name in pending() if name in modules]:
        del _pending[name]
        _attempt(name, lambda name=name: importlib.import_module(name))


def _import_pending(wanted: tuple[str, str] | None = None) -> None:
    """Import the modules that register the plugin (kind, name), or all that are left."""
    import_pending([name for name, registers in _pending.items() if wanted is None or wanted in registers])


def _attempt(where: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except PluginError:
        raise
    except Exception as error:
        failures.append(ImportFailure(where, _describe(error) + _failing_place(error)))


def _import_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"plugins: the file '{name}' does not exist (looked at {path})")
    # A hash of the path in the module name prevents two files called encoder.py from colliding.
    module_name = f"titanrepa_plugin_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _failing_place(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    user = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f" ({user[-1].filename}:{user[-1].lineno})" if user else ""


def _parameters(cls: type) -> list[inspect.Parameter]:
    if cls.__init__ is object.__init__:  # its signature is (*args, **kwargs)
        return []
    return list(inspect.signature(inspect.unwrap(cls.__init__)).parameters.values())


def _definition_line(cls: type) -> int:
    try:
        return inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return 0


def _docstring_args(cls: type) -> dict[str, str]:
    """Parse the Args section of the class docstring (Google style); base classes provide missing entries."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(base.__dict__.get("__doc__") or ""), re.M)
        if not match:
            continue
        name = None
        for line in match[1].splitlines():
            head = re.match(r"^\s{4}(\w+):\s*(.*)$", line)
            if head:
                name = head[1]
                found[name] = head[2]
            elif name and line.strip():
                found[name] += " " + line.strip()
    return found
