"""Continue a prompt with a Hugging Face decoder whose linear layers a worker multiplies.

    python examples/any_decoder.py --model path/to/model --level masked

Without ``--model`` the bundled SmolLM2 is used; without ``--worker`` a worker is started here for the time of the run.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tsqp
from tsqp.errors import TsqpError
from tsqp.model.locate import BUNDLED, locate


def main() -> None:
    """Attach the model, say what moved, continue the prompt, and detach it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED, help="a Hugging Face directory of any decoder")
    parser.add_argument("--level", default="masked", help="open, verified, masked or local")
    parser.add_argument("--worker", help="address of a worker that serves this model's linear map")
    parser.add_argument("--worker-key", help="its public key")
    parser.add_argument("--accept-expert-leak", action="store_true", help="let the worker see which experts run")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=12)
    arguments = parser.parse_args()
    try:
        directory = locate(arguments.model)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        ids_BT: torch.Tensor = tokenizer(arguments.prompt, return_tensors="pt").input_ids
        with tsqp.attach(
            model,
            arguments.worker,
            arguments.level,
            accept_expert_leak=arguments.accept_expert_leak,
            worker_key=arguments.worker_key,
        ) as attached:
            print(attached)
            options = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": arguments.max_tokens}
            print(tokenizer.decode(model.generate(ids_BT, do_sample=False, **options)[0]))
            meter = attached.meter
            sent = f"{meter.round_trips} round trips, {meter.bytes_sent / 1e6:.1f} MB sent"
            print(f"{sent}, {meter.verified_rows} rows checked")
    except TsqpError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
