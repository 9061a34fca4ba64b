"""``tsqp bench prefill``: prefill at every level, against transformers and against the published client, in one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tsqp.bench.child import Ask, Order
from tsqp.bench.children import WARM_UP, Child, OnStep, Peers, check_agreement, peers, started, take_turns
from tsqp.bench.plans import PLANS, Plan
from tsqp.bench.summary import model_heading, ratio, variant
from tsqp.bench.trace import Recording
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model
from tsqp.measurements import BenchReport, Ratio, Variant
from tsqp.model.architecture import LlamaConfig, weight_shapes
from tsqp.model.locate import locate_packed
from tsqp.prefill import prompt_ids

_OPEN = "open over shm / monolithic"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a suite's variants load.

    Attributes:
        directory: of the float model.
        packed: of the packed one.
        architecture: the model's.
        ids: of the prompt.
        device: of the workers.
    """

    directory: Path
    packed: Path
    architecture: LlamaConfig
    ids: list[int]
    device: str

    @classmethod
    def of(cls, config: EnclaveConfig, tokens: int, on_step: OnStep, device: str = "cpu") -> Prepared:
        """Find the model, pack it, and make a prompt.

        Raises:
            SetupError: the model is missing or damaged, or the prompt does not fit it.
        """
        opened = open_model(config.model, "open", on_step)
        ids = prompt_ids(opened.architecture, opened.tokenizer, None, tokens)
        packed = locate_packed(config.model, lambda done: on_step("packing the model", done))
        return cls(opened.directory, packed, opened.architecture, ids, device)

    def order(self, plan: Plan, worker: Peers, config: EnclaveConfig, threads: int) -> Order:
        """Return what one variant's process loads."""
        pool = len(self.ids) if config.mask_pool is None else config.mask_pool
        return Order(
            level=plan.level,
            model=str(self.packed if plan.packed else self.directory),
            ids=self.ids,
            dtype=config.dtype,
            threads=threads,
            worker=worker.links[plan.link],
            all_logits=plan.all_logits,
            mask_pool=pool if plan.masks_ready else 0,
            mask_memory=config.mask_memory,
            dealers=worker.dealers if plan.dealer else (),
            dealer_keys=worker.dealer_keys if plan.dealer else (),
            own_key=config.own_key if plan.dealer else None,
            micro_batches=config.micro_batches,
            floor=plan.floor,
            device=self.device,
        )

    @contextmanager
    def children(self, plans: tuple[Plan, ...], config: EnclaveConfig, threads: int) -> Iterator[list[Child]]:
        """Run a process per variant, and the peers that they need, for the time of a ``with`` block."""
        dealer = any(plan.dealer for plan in plans)
        models = (self.directory, self.packed)
        with ExitStack() as stack:
            workers = stack.enter_context(peers(models, config, threads, self.device, dealer=dealer))
            yield [stack.enter_context(started(plan, self.order(plan, workers, config, threads))) for plan in plans]


def run(
    config: EnclaveConfig, tokens: int, threads: int, *, rounds: int, trace: bool, device: str, on_step: OnStep
) -> tuple[BenchReport, dict[str, Recording]]:
    """Measure every variant.

    Args:
        config: a plain model, the dtype of the levels in floats, and masks: ``enclave`` leaves out the variants with
            dealers, ``dealers`` those without; given dealers take the place of one that is started here.
        tokens: prompt length.
        threads: per process.
        rounds: turns of each variant, each of one run to warm up and four that count.
        trace: record one more prefill at each level with a worker.
        device: of the workers.
        on_step: told the fraction done.

    Returns:
        The report, and recordings by level.

    Raises:
        TsqpError: the worker does not start, or a variant fails.
    """
    plans = tuple(
        plan
        for plan in PLANS
        if config.masks is None or plan.level != "masked" or plan.dealer == (config.masks == "dealers")
    )
    prepared = Prepared.of(config, tokens, on_step, device)
    with prepared.children(plans, config, threads) as children:
        take_turns(children, rounds, on_step)
        recordings = recorded(children) if trace else {}
        variants = [variant(child, tokens) for child in children]
    check_agreement(children)
    report = BenchReport(
        **model_heading(command("prefill", config, prepared, threads, rounds), config, threads, rounds, WARM_UP),
        tokens=tokens,
        variants=variants,
        ratios=ratios(variants, model_bytes(prepared.architecture), tokens, config.dtype),
    )
    return report, recordings


def command(name: str, config: EnclaveConfig, prepared: Prepared, threads: int, rounds: int) -> str:
    """Return the command that measures the same again."""
    words = f"tsqp bench {name} --model {config.model} --tokens {len(prepared.ids)}"
    words += f" --dtype {config.dtype} --threads {threads}"
    words += f" --device {prepared.device}" if prepared.device != "cpu" else ""
    chosen = {"--masks": config.masks, "--micro-batches": config.micro_batches, "--mask-pool": config.mask_pool}
    return f"{words} --rounds {rounds}" + "".join(f" {flag} {value}" for flag, value in chosen.items() if value)


def recorded(children: list[Child]) -> dict[str, Recording]:
    """Record one prefill of each variant that is worth it."""
    found = {child.plan.name: child.run(Ask(trace=True)).recording for child in children if child.plan.traced}
    return {name: recording for name, recording in found.items() if recording is not None}


def model_bytes(architecture: LlamaConfig) -> int:
    """Return the size of the model in float32."""
    return 4 * sum(math.prod(shape) for shape in weight_shapes(architecture).values())


def ratios(variants: list[Variant], float_bytes: int, tokens: int, dtype: str) -> list[Ratio]:
    """Compare the variants, in float32 against limits: at 128 tokens against all, at 1024 against that of `open`.

    ``monolithic`` is the better of the two OpenMP settings. The published client computed attention's products on the
    worker; that it is four times as slow is promised of that, on the fastest transport of each side.
    """
    by_name = {each.name: each for each in variants}
    baseline_s = min(by_name[name].median_s for name in ("monolithic-active", "monolithic-passive"))
    found = [
        *_against_transformers(by_name, baseline_s),
        *_against_local(by_name),
        *_against_the_published_client(by_name),
        *_memory(by_name["open"], float_bytes),
    ]
    promised = {128: [each.name for each in found], 1024: [_OPEN]}.get(tokens, []) if dtype == "float32" else []
    return [each if each.name in promised else ratio(each.name, each.value) for each in found]


def _against_transformers(by_name: Mapping[str, Variant], baseline_s: float) -> list[Ratio]:
    masked = by_name.get("masked") or by_name["masked-dealer"]
    others = (
        ("local", "local"),
        ("local-int8", "local int8"),
        ("verified", "verified"),
        ("masked-sustained", "masked, masks made within"),
        ("masked-dealer", "masked, dealer, pool filled"),
        ("masked-dealer-sustained", "masked, dealer, fetched within"),
    )
    return [
        ratio(_OPEN, by_name["open"].median_s / baseline_s, at_most=1.0),
        ratio("open over ipc / monolithic", by_name["open-ipc"].median_s / baseline_s, at_most=1.10),
        ratio(f"{masked.name}, pool filled / monolithic", masked.median_s / baseline_s, at_most=1.8),
        *_protection(masked),
        *(
            ratio(f"{label} / monolithic", by_name[name].median_s / baseline_s)
            for name, label in others
            if name in by_name and name != masked.name
        ),
    ]


def _protection(masked: Variant) -> list[Ratio]:
    """Compare protection with the time: all of it, and without what is done while the worker computes."""
    total_s = masked.enclave_s + masked.waited_s
    critical_s = masked.protection_s - masked.ahead_s
    return [
        ratio(f"{masked.name}: protection / total, all of it", masked.protection_s / total_s, at_most=0.10),
        ratio(f"{masked.name}: protection / total, on the critical path", critical_s / total_s),
    ]


def _against_local(by_name: Mapping[str, Variant]) -> list[Ratio]:
    masked, local_s = by_name.get("masked") or by_name["masked-dealer"], by_name["local"].median_s
    return [
        ratio("open over shm / local", by_name["open"].median_s / local_s),
        ratio(f"{masked.name}, pool filled / local", masked.median_s / local_s),
    ]


def _against_the_published_client(by_name: Mapping[str, Variant]) -> list[Ratio]:
    open_, ipc, legacy, with_matmul = (by_name[name] for name in ("open", "open-ipc", "legacy", "legacy-matmul"))
    share, every = open_.bytes_per_token, by_name["open-all-logits"].bytes_per_token
    return [
        ratio(
            "legacy client with Matmul over tcp / open over shm", with_matmul.median_s / open_.median_s, at_least=4.0
        ),
        ratio("legacy client with fused attention over tcp / open over shm", legacy.median_s / open_.median_s),
        ratio("legacy client with fused attention over tcp / open over ipc", legacy.median_s / ipc.median_s),
        ratio("bytes per token: open / legacy", share / legacy.bytes_per_token, at_most=0.73),
        ratio("bytes per token: open / legacy with Matmul", share / with_matmul.bytes_per_token, at_most=0.53),
        ratio("bytes per token: open with head at every position / legacy", every / legacy.bytes_per_token),
    ]


def _memory(open_: Variant, float_bytes: int) -> list[Ratio]:
    """Compare the enclave's memory with the model's size, where the system says how much it is."""
    if not open_.peak_bytes:
        return []
    return [ratio("memory of the enclave at open / float32 model", open_.peak_bytes / float_bytes, at_most=0.35)]
