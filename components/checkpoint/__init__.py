"""Atomic checkpoints built on torch.distributed.checkpoint (DCP)."""

from components.checkpoint.folder import CheckpointError
from components.checkpoint.manager import CheckpointManager
from components.checkpoint.state import load_module_state, load_optimizer_state, module_state, optimizer_state

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "load_module_state",
    "load_optimizer_state",
    "module_state",
    "optimizer_state",
]
