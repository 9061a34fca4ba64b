"""Finds what of a model can be moved to a worker, and which layers read the same input.

Nothing is known of architectures: one forward pass over a few tokens shows which layers are called, in which order, and
which of one module's layers are given the same tensor. Those make a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tsqp.decoder.refusals import check_model, refuse_shared
from tsqp.errors import UnsupportedModelError
from tsqp.model.architecture import LinearGroup
from tsqp.model.linear_map import FLOAT_DTYPES, GroupWeights
from tsqp.model.stacked import MAX_MEMBERS
from tsqp.wire.messages import MAX_GROUPS, MAX_NAME

_TRACED_TOKENS = 16
_MATRIX = 2
_STACK = 3


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a linear layer's weight lies: a parameter of a module, or one expert's part of it.

    Attributes:
        path: what the layer is called in groups: its module's path, for experts with number and parameter.
        module: the module that has the parameter.
        parameter: its name there.
        expert: which part of it; None for all of it.
        transposed: whether it is stored (K, N).
    """

    path: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def weight_NK(self) -> Tensor:
        """The weight, a view of the parameter."""
        stored: Tensor = self.module.get_parameter(self.parameter).detach()
        part = stored if self.expert is None else stored[self.expert]
        return part.T if self.transposed else part


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What was found in a model.

    Attributes:
        groups: places of the layers that can be moved, group by group in the order of the forward pass.
        stayed: paths of modules with matrices that stay, and why.
        experts: whether which groups are used depends on the tokens.
        stacks: paths of those modules that can be moved and hold stacked experts.
        tables: weights of embedding tables, which stay, also where they are a head's.
    """

    groups: dict[str, tuple[Place, ...]]
    stayed: dict[str, str]
    experts: bool
    stacks: dict[str, nn.Module]
    tables: tuple[nn.Parameter, ...]

    @property
    def moved(self) -> tuple[str, ...]:
        """Paths of the modules that can be moved, each once."""
        return tuple(dict.fromkeys(_module_path(place) for places in self.groups.values() for place in places))

    def weights(self) -> list[GroupWeights]:
        """Return the groups with their weights."""
        return [_group_weights(name, places) for name, places in self.groups.items()]


def survey(model: Any) -> Survey:  # noqa: ANN401  transformers has no types
    """Look at a model: every refusal is made here, and nothing is changed.

    Args:
        model: a Hugging Face causal language model on the CPU, in evaluation mode.

    Raises:
        InputError, UnsupportedModelError: it cannot be attached.
    """
    check_model(model)
    layers = {path: module for path, module in model.named_modules() if _is_linear(module)}
    stacks = {path: module for path, module in model.named_modules() if _is_stack(module)}
    refuse_shared(model, {**layers, **stacks})
    calls = _trace(model, {**layers, **stacks})
    groups = _groups(layers, stacks, calls)
    uncalled = {path for path in layers if path not in calls}
    moved = {_module_path(place) for places in groups.values() for place in places}
    stayed = {
        path: _why(module, called=path in calls, is_layer=path in layers)
        for path, module in model.named_modules()
        if path not in moved and any(each.ndim >= _MATRIX for each in module.parameters(recurse=False))
    }
    if not groups:
        raise UnsupportedModelError(f"a {type(model).__name__} has no layer that can be moved: {_listed(stayed)}.")
    experts = moved & (stacks.keys() | uncalled) or {path for path in moved if "experts" in path.split(".")}
    return Survey(
        groups,
        stayed,
        experts=bool(experts),
        stacks={path: module for path, module in stacks.items() if path in moved},
        tables=tuple(each.get_parameter("weight") for each in model.modules() if isinstance(each, nn.Embedding)),
    )


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer, and not a subclass that computes something else."""
    plain = type(module) is nn.Linear or _is_conv1d(module)
    # Other libraries replace the forward of one module, or compute its weight from further parameters.
    return plain and "forward" not in vars(module) and "weight" in dict(module.named_parameters(recurse=False))


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether it is GPT-2's linear layer, which stores its weight transposed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_stack(module: nn.Module) -> bool:
    """Tell whether a module holds experts in two stacked parameters, as transformers 5 knows them."""
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.ndim == down.ndim == _STACK):
        return False
    return bool(
        getattr(module, "has_gate", False)
        and hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and not getattr(module, "has_post_expert_norm", True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A layer's first call: when, and with which tensor, which is kept so that no other gets its id."""

    number: int
    x: object


def _trace(model: Any, layers: dict[str, nn.Module]) -> dict[str, _Call]:  # noqa: ANN401
    """Run a few tokens and note each layer's first call."""
    calls: dict[str, _Call] = {}

    def note(path: str, _module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        calls.setdefault(path, _Call(len(calls), next(iter((*inputs, *named.values())), None)))

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(vocabulary, (1, _TRACED_TOKENS), generator=torch.Generator().manual_seed(0))
    with ExitStack() as hooks, torch.no_grad():
        for path, module in layers.items():
            hooks.callback(module.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
        try:
            model(input_ids=ids_BT, use_cache=False)
        except Exception as error:  # a model may raise anything
            raise UnsupportedModelError(
                f"a {type(model).__name__} cannot be attached: it does not run on token ids alone ({error})."
            ) from error
    return calls


def _groups(
    layers: dict[str, nn.Module], stacks: dict[str, nn.Module], calls: dict[str, _Call]
) -> dict[str, tuple[Place, ...]]:
    together: dict[tuple[object, ...], list[str]] = {}
    for path, call in sorted(calls.items(), key=lambda item: item[1].number):
        if path in stacks:
            together[(path,)] = [path]
        elif layers[path].get_parameter("weight").dtype in FLOAT_DTYPES:
            # Only layers of one module: what reads the same tensor elsewhere may be called much later.
            key = (path.rpartition(".")[0], id(call.x), layers[path].get_parameter("weight").dtype)
            together.setdefault(key, []).append(path)
    for alike in _like_others(layers, list(together.values()), calls):
        together[tuple(alike)] = alike
    groups: dict[str, tuple[Place, ...]] = {}
    for paths in together.values():
        found = _expert_groups(paths[0], stacks[paths[0]]) if paths[0] in stacks else _layer_groups(paths, layers)
        if len(groups) + len(found) <= MAX_GROUPS:
            groups |= found
    return groups


def _layer_groups(paths: list[str], layers: dict[str, nn.Module]) -> dict[str, tuple[Place, ...]]:
    parts = [paths[first : first + MAX_MEMBERS] for first in range(0, len(paths), MAX_MEMBERS)]
    return {
        _group_name(part): tuple(Place(path, layers[path], transposed=_is_conv1d(layers[path])) for path in part)
        for part in parts
    }


def _like_others(layers: dict[str, nn.Module], called: list[list[str]], calls: dict[str, _Call]) -> Iterator[list[str]]:
    """Yield groups of layers that were not called, such as experts that no token went to, as others like them are."""
    patterns: dict[tuple[str, ...], None] = {}
    for paths in called:
        patterns.setdefault(tuple(path.rpartition(".")[2] for path in paths))
    seen = {_shape_of(path) for paths in called for path in paths}
    parents = dict.fromkeys(path.rpartition(".")[0] for path in layers if path not in calls)
    for parent in parents:
        for names in patterns:
            paths = [f"{parent}.{name}" for name in names]
            if all(path in layers and path not in calls and _shape_of(path) in seen for path in paths):
                yield paths


def _shape_of(path: str) -> str:
    """Return a path with its numbers left out: the same for layers that differ in their place only."""
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def _expert_groups(path: str, stack: nn.Module) -> dict[str, tuple[Place, ...]]:
    transposed = bool(stack.is_transposed)
    return {
        name: (Place(name, stack, parameter, expert, transposed),)
        for expert in range(len(stack.get_parameter("down_proj")))
        for parameter in ("gate_up_proj", "down_proj")
        for name in (expert_group(path, expert, parameter),)
    }


def expert_group(path: str, expert: int, parameter: str) -> str:
    """Return the name of the group of one expert's part of a stacked parameter."""
    return f"{path}.{expert}.{parameter}"


def _module_path(place: Place) -> str:
    return place.path if place.expert is None else place.path.removesuffix(f".{place.expert}.{place.parameter}")


def _group_name(paths: list[str]) -> str:
    """Return a name for a group: the first member's path, and what the others are called beside it."""
    others = [path.rpartition(".")[2] for path in paths[1:]]
    name = "+".join([paths[0], *others])
    return name if len(name) <= MAX_NAME else paths[0][:MAX_NAME]


def _group_weights(name: str, places: tuple[Place, ...]) -> GroupWeights:
    weights = tuple(place.weight_NK for place in places)
    rows = tuple(weight_NK.shape[0] for weight_NK in weights)
    group = LinearGroup(name, tuple(place.path for place in places), weights[0].shape[1], rows, bias=False)
    return GroupWeights(group, weights)


def _why(module: nn.Module, *, called: bool, is_layer: bool) -> str:
    """Say why a module with matrices stays."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "an embedding table: look-ups are made here, since a token id cannot be masked"
    if is_layer and not called:
        return "was not called when the model was run"
    if is_layer:
        return "cannot be moved in its dtype, or is one of more groups than a worker lists"
    if isinstance(module, nn.Linear):
        return f"a {kind}, which is more than a linear layer"
    return f"a {kind}, which is no linear layer of a known kind"


def _listed(stayed: dict[str, str]) -> str:
    return "; ".join(f"{path} is {why}" for path, why in list(stayed.items())[:3]) or "it has no matrices"
