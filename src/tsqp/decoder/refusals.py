"""Which models cannot be attached, and why: said before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tsqp.errors import InputError, SetupError, UnsupportedModelError

# What libraries of quantised weights call them, on modules that are no nn.Linear.
_QUANTISED_WEIGHTS = ("qweight", "qzeros", "weight_packed", "SCB")


def check_model(model: Any) -> None:  # noqa: ANN401  anything may be given
    """Refuse what is no Hugging Face decoder that runs on this CPU in floats.

    Raises:
        SetupError: transformers is not installed.
        InputError: it is no such model, is in training mode, or lies elsewhere.
        UnsupportedModelError: it is quantised, or encodes.
    """
    try:
        from transformers import PreTrainedModel  # noqa: PLC0415  of an extra
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[reference]'.") from error
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} cannot be attached: expected a causal language model of Hugging Face "
            "transformers, such as AutoModelForCausalLM.from_pretrained returns."
        )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be attached: it is no causal language model with a head."
        )
    _refuse_quantised(model)
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first; attached layers are for inference.")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InputError(
                f"the model's {name} is on {parameter.device}: the enclave computes on the CPU. Load the model without "
                "device_map, or move it with model.to('cpu')."
            )


def _refuse_quantised(model: nn.Module) -> None:
    """Name the format of a model that is not in floats."""
    config: Any = getattr(model.config, "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        raise _quantised(str(getattr(method, "value", method) or type(config).__name__))
    for name, module in model.named_modules():
        tensors: dict[str, Tensor] = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        weight = tensors.get("weight")
        integers = isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point()
        if integers or any(each in tensors for each in _QUANTISED_WEIGHTS):
            raise _quantised(f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}", f" ({name})")


def _quantised(method: str, where: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's weights are quantised as {method}{where}: TSQP quantises them itself. Load the original weights."
    )


def refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that have two places in the model, or a weight that is another layer's too.

    An embedding table may be a layer's weight: a tied head.

    Raises:
        UnsupportedModelError: there are such.
    """
    places: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is layer for layer in layers.values()):
            _claim(places, id(module), name, "module")
    weights: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            if parameter.ndim > 1:
                _claim(weights, id(parameter), name, "weight")


def _claim(taken: dict[int, str], key: int, name: str, what: str) -> None:
    if holder := taken.get(key):
        raise UnsupportedModelError(
            f"{holder} and {name} share one {what}: a shared layer cannot be moved. Give each a {what} of its own, "
            "or keep the model as it is."
        )
    taken[key] = name
