"""What of a model can be moved, which layers read the same input, and which models are refused before any change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.any_decoder import build
from tsqp.decoder.survey import Survey, survey
from tsqp.errors import InputError, UnsupportedModelError


def members(found: Survey) -> list[str]:
    """Say of each group of the first layer what it consists of."""
    return [name.removeprefix("model.layers.0.") for name in found.groups if ".0." in name]


def test_layers_that_read_the_same_tensor_are_a_group() -> None:
    found = survey(build("Llama"))
    assert members(found) == [
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj+up_proj",
        "mlp.down_proj",
    ]
    assert list(found.groups)[-1] == "lm_head"
    assert not found.experts
    assert list(found.stayed) == ["model.embed_tokens"]


def test_fused_layers_are_alone() -> None:
    assert members(survey(build("Phi-3"))) == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]


def test_experts_have_two_groups_each() -> None:
    found = survey(build("Mixtral", num_hidden_layers=1))
    assert [name for name in members(found) if "experts" in name] == [
        f"mlp.experts.{expert}.{part}" for expert in range(4) for part in ("gate_up_proj", "down_proj")
    ]
    assert found.experts
    assert "model.layers.0.mlp.gate" in found.stayed
    assert [path for path in found.moved if "experts" in path] == ["model.layers.0.mlp.experts"]


class Routed(nn.Module):
    """Experts in a list, as in models before transformers 5; only the first is ever used."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rooms[0](x)
        return found


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(48, 8), nn.Linear(8, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.w2(self.w1(x) * self.w3(x))
        return found


def with_mlp(mlp: nn.Module) -> Any:
    model = build("Llama", num_hidden_layers=1)
    model.model.layers[0].mlp = mlp.eval()
    return model


def test_experts_that_no_token_went_to_are_grouped_like_others() -> None:
    found = survey(with_mlp(Routed()))
    assert {f"model.layers.0.mlp.rooms.{index}.w1+w3" for index in range(3)} <= found.groups.keys()
    assert {f"model.layers.0.mlp.rooms.{index}.w2" for index in range(3)} <= found.groups.keys()
    assert found.experts, "which of them is asked for depends on the tokens"


class Odd(nn.Module):
    """A layer that is called, one that is not, one that is more than linear, and one whose forward was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.idle, self.scaled, self.patched = (
            nn.Linear(48, 48),
            nn.Linear(48, 48),
            Scaled(48, 48),
            nn.Linear(48, 48),
        )
        self.patched.forward = lambda x: x  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.scaled(self.called(x)) + self.patched(x)
        return found


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as torch.nn.Linear calls it
        return 2 * super().forward(input)


def test_what_stays_is_listed_with_the_reason() -> None:
    found = survey(with_mlp(Odd()))
    assert "model.layers.0.mlp.called" in found.moved
    why = {path.rpartition(".")[2]: reason for path, reason in found.stayed.items()}
    assert why["idle"] == "was not called when the model was run"
    assert why["scaled"] == "a Scaled, which is more than a linear layer"
    assert why["patched"] == "a Linear, which is more than a linear layer"
    assert "embedding table" in why["embed_tokens"]
    assert not found.experts


def refused(model: Any, sentence: str, kind: type[Exception] = UnsupportedModelError) -> None:
    with pytest.raises(kind, match=sentence):
        survey(model)


def test_a_module_in_two_places_is_refused() -> None:
    model = build("Llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    refused(model, r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one module")


def test_two_layers_with_one_weight_are_refused() -> None:
    model = build("Llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one weight")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (SimpleNamespace(quant_method=SimpleNamespace(value="bitsandbytes")), "bitsandbytes"),
        (SimpleNamespace(quant_method="awq"), "awq"),
    ],
)
def test_a_quantised_model_is_refused_by_its_format(config: object, name: str) -> None:
    model = build("Llama")
    model.config.quantization_config = config
    refused(model, f"quantised as {name}: ")


class QuantLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(6, 48, dtype=torch.int32))


class Linear8bit(nn.Linear):
    def __init__(self) -> None:
        super().__init__(48, 48)
        self.weight = nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [QuantLinear, Linear8bit])
def test_a_quantised_layer_is_refused_by_its_name(kind: type[nn.Module]) -> None:
    refused(with_mlp(kind()), rf"{kind.__name__} \(model\.layers\.0\.mlp\)")


def test_what_is_no_decoder_is_refused() -> None:
    refused(nn.Linear(2, 2), "a Linear cannot be attached", InputError)
    refused(build("Llama").model, "no causal language model with a head")


def test_a_model_elsewhere_or_in_training_is_refused() -> None:
    refused(build("Llama").train(), "training mode", InputError)
    refused(build("Llama").to("meta"), "is on meta: the enclave computes on the CPU", InputError)


def test_a_model_that_does_not_run_is_refused() -> None:
    refused(with_mlp(nn.Linear(7, 7)), "does not run on token ids alone")


def test_a_model_with_nothing_to_move_is_refused() -> None:
    model = build("Llama", num_hidden_layers=0)
    model.lm_head = Scaled(48, 101, bias=False).eval()
    refused(model, "no layer that can be moved: model.embed_tokens is an embedding table")
