"""Takes the weights of a model's linear layers away, and gives them back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsqp.decoder.layers import GroupCall, Products, RemoteExperts, RemoteLayer
from tsqp.decoder.survey import Place, Survey, expert_group
from tsqp.model.architecture import LinearGroup
from tsqp.model.linear_map import FloatWeights


@dataclass(frozen=True, slots=True, eq=False)
class _Parameter:
    """A parameter that was taken away: where it belongs, what it was, and whose it is too, if it was tied."""

    module: nn.Module
    name: str
    requires_grad: bool
    tied_to: nn.Parameter | None


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """The way back.

    Attributes:
        freed_bytes: size of the weights that were taken away, and are nobody else's.
    """

    freed_bytes: int
    _parameters: tuple[_Parameter, ...]
    _places: dict[str, tuple[Place, ...]]
    _classes: dict[nn.Module, type[nn.Module]]
    _weights: FloatWeights

    def restore(self) -> None:
        """Give every layer its class and its weight back, bit for bit.

        Raises:
            WeightsError: the file of the weights is gone or was changed; nothing has been given back.
        """
        values = self._read()
        for parameter, value in values:
            parameter.module.register_parameter(parameter.name, value)
        for module, kind in self._classes.items():
            module.__class__ = kind
            for name in ("remote", "member", "products", "experts"):
                vars(module).pop(name, None)

    def _read(self) -> list[tuple[_Parameter, nn.Parameter]]:
        found: dict[tuple[nn.Module, str], Tensor] = {}
        tied = {(each.module, each.name) for each in self._parameters if each.tied_to is not None}
        for name, places in self._places.items():
            if all((place.module, place.parameter) in tied for place in places):
                continue
            stacked_NK = self._weights.read(name)
            shapes = [place.weight_NK.shape[0] for place in places]
            for place, part_NK in zip(places, stacked_NK.split(shapes), strict=True):
                stored = place.module.get_parameter(place.parameter)
                key = (place.module, place.parameter)
                value = found.setdefault(key, torch.empty(stored.shape, dtype=stored.dtype))
                part = value if place.expert is None else value[place.expert]
                part.copy_(part_NK.T if place.transposed else part_NK)
        return [
            (each, each.tied_to)
            if each.tied_to is not None
            else (each, nn.Parameter(found[each.module, each.name], requires_grad=each.requires_grad))
            for each in self._parameters
        ]


def move(found: Survey, groups: tuple[LinearGroup, ...], products: Products, weights: FloatWeights) -> Moved:
    """Take the weights away; from now on the layers ask ``products``.

    Args:
        found: what can be moved.
        groups: the same, as a worker knows them.
        products: who computes.
        weights: a copy of the weights, for the way back.
    """
    places = [place for each in found.groups.values() for place in each]
    classes = {place.module: type(place.module) for place in places}
    tables = {id(table): table for table in found.tables}
    parameters = []
    for module, name in dict.fromkeys((place.module, place.parameter) for place in places):
        parameter = module.get_parameter(name)
        parameters.append(_Parameter(module, name, parameter.requires_grad, tables.get(id(parameter))))
    freed = sum(each.module.get_parameter(each.name).nbytes for each in parameters if each.tied_to is None)
    for group in groups:
        call = GroupCall(group, products)
        for number, place in enumerate(found.groups[group.name]):
            if place.expert is None:
                _change(place.module, RemoteLayer, remote=call, member=number)
    for path, module in found.stacks.items():
        names = [
            (expert_group(path, expert, "gate_up_proj"), expert_group(path, expert, "down_proj"))
            for expert in range(len(module.get_parameter("down_proj")))
        ]
        _change(module, RemoteExperts, products=products, experts=names)
    for each in parameters:
        stored = each.module.get_parameter(each.name)
        empty = torch.empty_like(stored, device="meta", requires_grad=False)
        each.module.register_parameter(each.name, nn.Parameter(empty, requires_grad=False))
    return Moved(freed, tuple(parameters), found.groups, classes, weights)


def _change(module: nn.Module, mixin: type[nn.Module], **attributes: object) -> None:
    """Let a layer ask a worker: its class becomes a subclass of its own."""
    kind = type(module)
    vars(module).update(attributes)
    module.__class__ = type(f"Remote{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})
