"""Parameter groups, Muon with AdamW, and float32 master weights for any optimizer.

Shape suffixes: M matrices of one shape, R rows, C columns.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.adamw import adamw as adamw_update

from lightning_modules import hardware
from lightning_modules.shards import local, part_of, sharded, whole

# Coefficients (a, b, c) of the odd polynomials a·X + b·(XXᵀ)X + c·(XXᵀ)²X, one an iteration, that bring all singular
# values from [1e-3, 1] to 1 fastest: Polar Express, algorithm 1, https://arxiv.org/abs/2505.16932.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

SAFETY = 1.01
"""Shrinks the argument of each polynomial: rounding to bf16 may lift a singular value over 1, where they blow up."""

PART = 2**24
"""Numbers whose float32 gradients `Float32Master` makes at a time: 64 MiB."""


def parameter_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict]:
    """Three groups: hidden matrices, embeddings with the head, and vectors (norms, biases), which never decay.

    `weight_decay` overrides the optimizer's own for the first two; None leaves it. A matrix shared by embedding and
    head counts as embedding, once. Each group says its `kind`: "matrix", "embedding" or "vector". Where weights are
    sharded in several ways there is a group for each: torch's optimizers do not mix them.
    """
    table = {id(p) for module in _tables(model) for p in module.parameters(recurse=False) if p.ndim >= 2}
    kinds: dict[str, dict[object, list[nn.Parameter]]] = {"matrix": {}, "embedding": {}, "vector": {}}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "vector" if parameter.ndim < 2 else "embedding" if id(parameter) in table else "matrix"
            kinds[kind].setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": parameters, "kind": kind} | ({"weight_decay": 0.0} if kind == "vector" else decay)
        for kind, by_mesh in kinds.items()
        for parameters in by_mesh.values()
    ]


def _tables(model: nn.Module) -> list[nn.Module]:
    """Embeddings of tokens, positions and the like, and the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [module for module in model.modules() if isinstance(module, nn.Embedding)] + ([head] if head else [])


def orthogonalize(matrices_MRC: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices UVᵀ of USVᵀ, about: POLAR_EXPRESS. (M, R, C) to the same, in bf16 where that
    is fast, else in float32."""
    X = matrices_MRC.to(hardware.product_dtype(matrices_MRC.device.type))
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in ((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:iterations]):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def adamw(params: Iterable) -> Optimizer:
    """AdamW as language models use it; its settings, or another optimizer, are a `class_path` away."""
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class MuonAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for everything else, as one optimizer.

    Muon: https://kellerjordan.github.io/posts/muon; matrices of one shape are orthogonalized together.

    Args:
        params: groups with a `kind` as `parameter_groups` makes them; other parameters: matrices by their shape.
        lr: Learning rate of the hidden matrices.
        adamw_lr: Learning rate of embeddings, head, norms and biases.
        momentum: Nesterov momentum of the matrices.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Decoupled, multiplied by the learning rate; never on norms and biases.
        iterations: Of the orthogonalization, 1 to 5: 3 are faster and, at small scale, no worse.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        adamw_lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ):
        if not 1 <= iterations <= len(POLAR_EXPRESS):
            raise ValueError(f"MuonAdamW: iterations={iterations}; pass 1 to {len(POLAR_EXPRESS)}")
        if lr < 0 or adamw_lr < 0:
            raise ValueError(f"MuonAdamW: lr={lr}, adamw_lr={adamw_lr}; a learning rate is 0 or more")
        params = list(params)
        if not params or not isinstance(params[0], dict):
            matrices = [p for p in params if p.ndim == 2]
            vectors = [p for p in params if p.ndim != 2]
            params = [{"params": matrices, "kind": "matrix"}]
            params += [{"params": vectors, "kind": "vector", "weight_decay": 0.0}]
            params = [group for group in params if group["params"]]
        # A convolution's kernel has more than two dimensions: AdamW takes it.
        params = [part for group in params for part in _split_by_dimension(group)]
        for group in params:
            group.setdefault("lr", lr if group["kind"] == "matrix" else adamw_lr)
        defaults = {"momentum": momentum, "betas": betas, "eps": eps, "iterations": iterations}
        super().__init__(params, defaults | {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["kind"] == "matrix" else self._adam)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        momentum = group["momentum"]
        gradients = [local(p.grad) for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault(p.shape, []).append(i)
        for (rows, columns), indices in by_shape.items():
            # Of sharded matrices each rank makes the whole update, and takes its part.
            matrices_MRC = torch.stack([whole(sharded(updates[i], parameters[i])) for i in indices])
            update_MRC = orthogonalize(matrices_MRC, group["iterations"])
            step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
            stepped = [parameters[i] for i in indices]
            parts = map(part_of, update_MRC.to(stepped[0].dtype), stepped)
            torch._foreach_add_([local(p) for p in stepped], list(parts), alpha=-step_size)

    def _adam(self, parameters: list[Tensor], group: dict) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        adamw_update(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def _split_by_dimension(group: dict) -> list[dict]:
    parameters = list(group["params"])
    if group.setdefault("kind", "matrix") != "matrix":
        return [group]
    parts = [("matrix", [p for p in parameters if p.ndim == 2]), ("embedding", [p for p in parameters if p.ndim != 2])]
    return [group | {"kind": kind, "params": part} for kind, part in parts if part]


class Float32Master(Optimizer):
    """Any optimizer over float32 copies of bf16 or float16 weights: small updates add up instead of rounding away.

    The copies are the truth: they are what a checkpoint's optimizer state holds, and the model's weights are rounded
    from them after each step.

    Args:
        groups: Parameter groups of the model.
        optimizer: Called with the same groups over the float32 copies.
    """

    def __init__(self, groups: list[dict], optimizer: Callable[[list[dict]], Optimizer]):
        self.mastered = [p for group in groups for p in group["params"]]
        masters = {p: nn.Parameter(p.detach().float()) for p in self.mastered}
        self.optimizer = optimizer([group | {"params": [masters[p] for p in group["params"]]} for group in groups])
        self.masters = [masters[p] for p in self.mastered]
        on_cpu = all(master.device.type == "cpu" for master in self.masters)
        few = sum(master.numel() for master in self.masters) <= 2 * PART
        # Blocks above 32 MiB are given back to the kernel, which zeroes them anew at each step: 14 ms for 22.7 million
        # numbers, where copying takes 4. Of large models that would cost more memory than time.
        self.gradients = [torch.empty_like(master) for master in self.masters] if on_cpu and few else None
        self.defaults = self.optimizer.defaults
        super().__init__(self.optimizer.param_groups, self.defaults)
        # One list of groups and one state: what a schedule or a checkpoint changes is what the optimizer uses.
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept = self.gradients or [None] * len(self.masters)
        both = zip(self.mastered, self.masters, kept, strict=True)
        pairs = [(p, (master, gradient)) for p, master, gradient in both if p.grad is not None]
        for part in _parts(pairs) if _steps_each_alone(self.optimizer) and self.gradients is None else [pairs]:
            # Each gradient lives once: as float32 during its step, and not at all until the next backward.
            for parameter, (master, gradient) in part:
                master.grad = parameter.grad.float() if gradient is None else gradient.copy_(parameter.grad)
                parameter.grad = None
            self.optimizer.step()
            for parameter, (master, _) in part:
                master.grad = None
                parameter.copy_(master)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for tensor in chain(self.mastered, self.masters):
            tensor.grad = None

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "masters": [m.detach() for m in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        for convert in self._optimizer_load_state_dict_pre_hooks.values():  # as torch's own calls them
            state_dict = convert(self, state_dict) or state_dict
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        torch._foreach_copy_(self.masters, state_dict["masters"])
        torch._foreach_copy_(self.mastered, self.masters)


def _steps_each_alone(optimizer: Optimizer) -> bool:
    """Whether a step of some parameters and then of the others is the same as one of all: each has a state of its own,
    and one without a gradient is left alone. So in torch.optim, but for LBFGS."""
    ours = isinstance(optimizer, MuonAdamW)
    return ours or (type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS))


def _parts(pairs: list[tuple[Tensor, object]]) -> Iterator[list[tuple[Tensor, object]]]:
    """Runs of parameters, with what belongs to them, of about PART numbers: few float32 gradients exist at a time."""
    part, size = [], 0
    for pair in pairs:
        part.append(pair)
        size += pair[0].numel()
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part
