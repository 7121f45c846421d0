"""Muon: momentum orthogonalized by Newton-Schulz iterations, for matrices; AdamW for all other parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from components.contracts import Optimizer, hidden_matrices, trained_parameters
from components.distributed.parallel import local
from components.optim.whole_matrices import on_whole_matrices
from components.registry import optimizers

Fraction = Annotated[float, Field(ge=0, le=1)]
Coefficients = Sequence[tuple[float, float, float]]

KELLER = [(3.4445, -4.7750, 2.0315)] * 5  # https://kellerjordan.github.io/posts/muon/
SAFETY = 1.05  # as in the implementation that RAEv2 (arXiv 2605.18324) trains with; the paper has 1.01
POLAR_EXPRESS = [  # arXiv 2505.16932, Algorithm 1
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
]


@optimizers.register("muon")
class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for matrices of hidden layers; AdamW for all other parameters.

    Embeddings, output layers, biases, norms, convolution kernels and alignment heads are trained by AdamW, as Muon's
    author and torch.optim.Muon advise. A fused qkv matrix counts as one matrix.

    Args:
        matrices: hidden: matrices inside the networks' units, such as blocks; all: every parameter of two dimensions,
            as in RAEv2 (arXiv 2605.18324).
        momentum: decay of the running average of the gradient.
        nesterov: orthogonalize the average of gradient and momentum instead of the momentum.
        coefficients: of the five Newton-Schulz iterations. keller: the original ones, which bring singular values to
            about 0.7 to 1.2; polar_express: arXiv 2505.16932, about 0.85 to 1.13, as in RAEv2.
        scale: factor on the update of a matrix with A rows and B columns. match_adamw: 0.2 * sqrt(max(A, B)), about
            the size of AdamW's update, so that `lr` is one for AdamW (arXiv 2502.16982); original: sqrt(max(1, A / B));
            spectral: sqrt(A / B), which bounds the change of a layer's output
            (https://jeremybernste.in/writing/deriving-muon). As match_rms_adamw, original and spectral_unclamped of
            torch.optim.Muon.
        precision: of the iterations. auto: bf16 on a GPU, otherwise that of the weights; fp64 weights stay in fp64.
        adamw_lr: peak learning rate of the parameters that AdamW trains; 0: `lr`.
        betas: AdamW's beta1 and beta2.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        lr: float,
        *,
        matrices: Literal["hidden", "all"] = "hidden",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        nesterov: bool = True,
        coefficients: Literal["keller", "polar_express"] = "keller",
        scale: Literal["match_adamw", "original", "spectral"] = "match_adamw",
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        adamw_lr: Annotated[float, Field(ge=0)] = 0.0,
        betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999],  # noqa: B006
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        every = list(trained_parameters(modules).values())
        hidden = hidden_matrices(modules)
        mine = [p for p in every if p.ndim == 2 and (matrices == "all" or p in hidden)]
        others = [p for p in every if not any(p is m for m in mine)]
        self.coefficients = POLAR_EXPRESS if coefficients == "polar_express" else KELLER
        self.precision = precision
        common = {"lr": lr, "weight_decay": weight_decay}
        muon = common | {"params": mine, "momentum": momentum, "nesterov": nesterov, "scale": scale}
        rest = common | {"params": others, "betas": (betas[0], betas[1]), "eps": eps}
        rest |= {"lr": adamw_lr} if adamw_lr else {}
        super().__init__([group for group in (muon, rest) if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, unless ``found_inf`` is 1."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_muon(group, params) if "momentum" in group else self._step_adamw(group, params)

    def _step_muon(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        device = _compute_device(params[0])
        dtype = self._dtype(params[0].dtype, device)
        updates = []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grad, buffer = local(p.grad), local(self.state[p]["momentum_buffer"])
            momentum = buffer.lerp(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            updates.append(update.to(device, dtype))
            self._set(buffer, momentum)
        orthogonalize = functools.partial(orthogonalized, coefficients=self.coefficients)
        for p, update in zip(params, on_whole_matrices(orthogonalize, updates, params)):
            weight = local(p)
            new = weight * (1 - group["lr"] * group["weight_decay"])
            self._set(weight, new.add_(update.to(p.device), alpha=-group["lr"] * _factor(group["scale"], p.shape)))

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        tensor.copy_(value if self.found_inf is None else torch.where(self.found_inf > 0, tensor, value))

    def _dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        low = self.precision == "bf16" or (self.precision == "auto" and device.type != "cpu")
        return torch.bfloat16 if low and weights == torch.float32 else weights

    def _step_adamw(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] |= {"step": torch.zeros((), device=p.device)}
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrix: Tensor, coefficients: Coefficients = KELLER, eps: float = 1e-7) -> Tensor:
    """Orthogonal factor U V^T of a matrix (A, B) = U S V^T, approximately: its singular values become about 1.

    Args:
        coefficients: (a, b, c) of each iteration X <- a X + (b X X^T + c (X X^T)^2) X.
        eps: smallest Frobenius norm that the matrix is divided by.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _factor(scale: str, shape: torch.Size) -> float:
    rows, columns = shape
    if scale == "match_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns if scale == "spectral" else max(1, rows / columns))


def _compute_device(parameter: Tensor) -> torch.device:
    """The device of the mesh: with CPU offload, sharded parameters are on the host."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.cuda.current_device())
    return parameter.device
