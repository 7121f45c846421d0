"""Encodes a nested state as JSON plus a flat dict of tensors, and decodes it into a template.

The JSON mirrors the state. Types that JSON lacks (tensors, tuples, dicts with non-string keys) are written as an
object with one key: ``{"$tensor": [dtype, shape]}``, ``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, DICT = "$tensor", "$tuple", "$dict"


def encode(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split dicts, lists and tuples of tensors and plain values into JSON and the tensors by dotted path.

    Raises:
        TypeError: a value is neither a tensor nor None, bool, int, float or str. Subclasses are rejected because they
            would be restored as another type.
        ValueError: two tensors have the same path.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if path in tensors:
                raise ValueError(f"two tensors of the state are both named '{path}'; rename one")
            tensors[path] = value
            return {TENSOR: _facts(value)}
        if isinstance(value, Mapping):
            pairs = [(key, walk(child, _join(path, key))) for key, child in value.items()]
            if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {DICT: [[walk(key, path), child] for key, child in pairs]}
        if type(value) in (list, tuple):
            items = [walk(child, _join(path, index)) for index, child in enumerate(value)]
            return items if type(value) is list else {TUPLE: items}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(
            f"'{path}' of the state is a {type(value).__name__}, which checkpoints do not support; use a tensor, None, "
            "bool, int, float, str, or dicts, lists and tuples of them"
        )

    return walk(state, ""), tensors


def match(
    template: Mapping[str, Any], saved: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]:
    """Match an encoded state to a template; ignore top-level keys that the template lacks.

    Subtrees without tensors on either side are taken from the saved state; elsewhere the keys must be the same.

    Returns:
        The state (the template's tensors, the saved plain values), the template's tensors by path, and mismatches:
        lists of paths by kind of problem.
    """
    tensors: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = defaultdict(list)

    def walk(template: Any, saved: Any, path: str) -> Any:
        if isinstance(template, Tensor):
            facts = saved.get(TENSOR) if isinstance(saved, dict) else None
            if facts is None:
                problems["a plain value in the checkpoint, a tensor here"].append(path)
            elif facts != _facts(template):
                problems["with a different shape or dtype"].append(
                    f"{path}: checkpoint {_show(facts)}, here {_show(_facts(template))}"
                )
            tensors[path] = template
            return template
        if not _has_tensors(template) and not _saved_has_tensors(saved):
            return _decode(saved)
        ours, theirs = _children(template), _saved_children(saved)
        if theirs is None or ours is None:
            problems["of a different type"].append(path)
            return template
        problems["missing in the checkpoint"] += [_join(path, key) for key in ours if key not in theirs]
        if path:
            problems["in the checkpoint but not here"] += [_join(path, key) for key in theirs if key not in ours]
        result = {key: walk(ours[key], theirs[key], _join(path, key)) for key in ours if key in theirs}
        return result if isinstance(template, Mapping) else type(template)(result.values())

    state = {}
    theirs = _saved_children(saved)
    for key, value in template.items():
        if key in theirs:
            state[key] = walk(value, theirs[key], key)
        else:
            problems["missing in the checkpoint"].append(key)
    return state, tensors, {title: paths for title, paths in problems.items() if paths}


def part(saved: dict[str, Any], path: str) -> tuple[Any, dict[str, Tensor]] | None:
    """Decode the subtree of an encoded state at a dotted path, with new tensors in host memory.

    Returns:
        The state below ``path`` and its uninitialized tensors by their full paths; None if the path does not exist.

    Raises:
        ValueError: the encoded state names an unknown dtype.
    """
    for key in path.split("."):
        children = _saved_children(saved)
        if children is None or key not in children:
            return None
        saved = children[key]
    tensors: dict[str, Tensor] = {}

    def walk(saved: Any, path: str) -> Any:
        if not _saved_has_tensors(saved):
            return _decode(saved)
        if TENSOR in saved:
            dtype, shape = saved[TENSOR]
            tensors[path] = torch.empty(shape, dtype=_dtype(dtype))
            return tensors[path]
        result = {key: walk(child, _join(path, key)) for key, child in _saved_children(saved).items()}
        if isinstance(saved, list):
            return list(result.values())
        return tuple(result.values()) if TUPLE in saved else result

    return walk(saved, path), tensors


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _facts(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _show(facts: list[Any]) -> str:
    return f"{facts[0]} {tuple(facts[1])}"


def _children(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if type(value) in (list, tuple) else None


def _saved_children(saved: Any) -> dict[Any, Any] | None:
    if isinstance(saved, list):
        return dict(enumerate(saved))
    if not isinstance(saved, dict) or TENSOR in saved:
        return None
    if TUPLE in saved:
        return dict(enumerate(saved[TUPLE]))
    return {_decode(key): child for key, child in saved[DICT]} if DICT in saved else saved


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or any(map(_has_tensors, (_children(value) or {}).values()))


def _saved_has_tensors(saved: Any) -> bool:
    if isinstance(saved, dict) and TENSOR in saved:
        return True
    return any(map(_saved_has_tensors, (_saved_children(saved) or {}).values()))


def _decode(saved: Any) -> Any:
    if isinstance(saved, list):
        return [_decode(child) for child in saved]
    if not isinstance(saved, dict):
        return saved
    if TUPLE in saved:
        return tuple(_decode(child) for child in saved[TUPLE])
    return {key: _decode(child) for key, child in _saved_children(saved).items()}
