"""Lists plugins from their source, without importing it: a list of names need not wait for PyTorch.

A file is imported after all if its source does not tell everything that the list shows, or if the import might fail;
then the error is reported as that of any plugin.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from components import registry
from components.registry import KINDS, Plugin

KIND_OF = {f"{kind}{plural}": kind for kind in KINDS for plural in ("s", "es")}  # by the name of the registry
CONTRACTS = "components.contracts"


@dataclass(frozen=True)
class Listed:
    """A plugin in a list: attributes of :class:`Plugin`, with ``options`` by name only."""

    kind: str
    name: str
    summary: str
    options: tuple[str, ...]
    file: str
    line: int

    @classmethod
    def of(cls, plugin: Plugin) -> Listed:
        return cls(plugin.kind, plugin.name, plugin.summary, tuple(plugin.options), plugin.file, plugin.line)


class Unclear(Exception):
    """The source does not tell what is asked."""


def list_plugins(package: str, extra: Iterable[str] = ()) -> list[Listed]:
    """All plugins, sorted by name; arguments as of :func:`registry.discover`.

    Entry points and ``extra`` are imported, since nothing but their import tells what they register.

    Raises:
        PluginError: two plugins of a kind have the same name, or one cannot be registered.
    """
    registry.discover(package, extra, lazy=True)
    sources = Sources(package)
    found: dict[tuple[str, str], tuple[str, Listed]] = {}
    unclear = set()
    for module in registry.pending():
        try:
            for plugin in plugins_in(sources.read(module)):
                key = plugin.kind, plugin.name
                if key in found:  # importing both raises the error
                    unclear |= {module, found[key][0]}
                found[key] = module, plugin
        except (Unclear, SyntaxError, UnicodeDecodeError):
            unclear.add(module)
    registry.import_pending(unclear)
    # Other modules may have registered one of the names.
    registry.import_pending({module for (kind, name), (module, _) in found.items() if name in KINDS[kind].imported()})
    imported = [Listed.of(plugin) for kind in KINDS.values() for plugin in kind.imported().values()]
    clear = [plugin for module, plugin in found.values() if module in registry.pending()]
    return sorted(imported + clear, key=lambda plugin: plugin.name)


def plugins_in(source: Source) -> list[Listed]:
    """Plugins that a module registers.

    Raises:
        Unclear: it may register others, or fail to be imported.
    """
    source.check_imports()
    classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]
    found = [_plugin(source, node) for node in classes if ".register(" in ast.unparse(node.decorator_list[0])]
    if len(found) != source.text.count(".register("):
        raise Unclear
    return found


def _plugin(source: Source, node: ast.ClassDef) -> Listed:
    match node.decorator_list:
        case [ast.Call(func=ast.Attribute(value=owner), args=[ast.Constant(value=str(name))], keywords=[])]:
            kind = KIND_OF.get(ast.unparse(owner).rpartition(".")[2], "")
        case _:
            raise Unclear
    family, doc = list(source.family(node)), ast.get_docstring(node)
    if not doc or not kind or not any(c.name in KINDS[kind].bases and s.is_contract for s, c in family):
        raise Unclear
    members = [member for _, c in family for member in c.body]
    init = next((m for m in members if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
    takes = init.args if init else ast.arguments([], [ast.arg("self")], None, [], [], None, [])
    given = next(m.value for m in members if isinstance(m, ast.Assign | ast.AnnAssign) and _assigned(m) == "given")
    plain = not (takes.posonlyargs or takes.vararg or takes.kwarg or (init and init.decorator_list))
    if not plain or len(takes.args) - 1 != len(ast.literal_eval(given)):
        raise Unclear
    options = tuple(argument.arg for argument in takes.kwonlyargs)
    return Listed(kind, name, doc.split("\n", 1)[0], options, str(source.path), node.decorator_list[0].lineno)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _assigned(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


class Sources:
    """Sources of the modules of ``components`` and of the plugins' package, each read once."""

    def __init__(self, package: str) -> None:
        self.packages = {"components", package.split(".")[0]}
        self._read: dict[str, Source] = {}
        self._installed: dict[str, bool] = {}

    def own(self, module: str) -> bool:
        return module.split(".")[0] in self.packages

    def read(self, module: str) -> Source:
        """Source of one of these modules; raises Unclear if there is no such file."""
        if module not in self._read:
            top, *rest = module.split(".")
            bases = [Path(folder, *rest) for folder in importlib.import_module(top).__path__]
            files = [path for base in bases for path in (base / "__init__.py", Path(f"{base}.py")) if path.is_file()]
            if not files:
                raise Unclear
            self._read[module] = Source(self, module, files[0])
        return self._read[module]

    def installed(self, package: str) -> bool:
        """Whether another package can be found; its modules are not looked at."""
        if package not in self._installed:
            self._installed[package] = importlib.util.find_spec(package) is not None
        return self._installed[package]


class Source:
    """The source of a module.

    Attributes:
        bound: what each name at the top of the module stands for: a statement, or an import (module, name).
        imports: the imports (module, name) at its top; name is "" for a whole module.
        plain: whether its top consists of imports, definitions and conditions, so that importing it runs little else.
    """

    def __init__(self, sources: Sources, module: str, path: Path) -> None:
        self.sources, self.path, self.text = sources, path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, str(path))
        self.is_contract = module.startswith(CONTRACTS)
        self.bound: dict[str, ast.AST | tuple[str, str]] = {}
        self.imports: list[tuple[str, str]] = []
        self.plain = True
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom):
                self._bind((alias.asname or alias.name, (node.module or "", alias.name)) for alias in node.names)
            elif isinstance(node, ast.Import):
                self._bind((alias.asname or alias.name.split(".")[0], (alias.name, "")) for alias in node.names)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.bound[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self.bound[_assigned(node)] = node
            elif not isinstance(node, ast.If | ast.AsyncFunctionDef) and not _is_text(node):
                self.plain = False

    def _bind(self, imports: Iterator[tuple[str, tuple[str, str]]]) -> None:
        for name, imported in imports:
            self.bound[name] = imported
            self.imports.append(imported)

    def check_imports(self) -> None:
        """Raise Unclear if importing the module may fail."""
        if not self.plain:
            raise Unclear
        for module, name in self.imports:
            if not self.sources.own(module):
                if not self.sources.installed(module.split(".")[0]):
                    raise Unclear
            elif not name or name not in self.sources.read(module).bound:
                self.sources.read(f"{module}.{name}".rstrip("."))

    def family(self, node: ast.ClassDef) -> Iterator[tuple[Source, ast.ClassDef]]:
        """A class and its ancestors, as far as they are defined in this project."""
        yield self, node
        for base in node.bases:
            yield from self._defined(ast.unparse(base))

    def _defined(self, name: str) -> Iterator[tuple[Source, ast.ClassDef]]:
        first, _, rest = name.partition(".")
        match self.bound.get(first):
            case ast.ClassDef() as node if not rest:
                yield from self.family(node)
            case (str(module), str(imported)) if not self.sources.own(module):
                return
            case (str(module), str(imported)) if rest:
                yield from self.sources.read(f"{module}.{imported}")._defined(rest)
            case (str(module), str(imported)):
                yield from self.sources.read(module)._defined(imported)
            case _:
                raise Unclear
