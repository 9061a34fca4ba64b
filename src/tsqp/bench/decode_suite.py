"""``tsqp bench decode``: generation at every level, one request and many at once, against transformers, in one run.

What is timed is the part of a run in which every request has a token in every step (``decode_watch.Watch``). Requests
have prompts of one length, all different, and answers of one length; choices are greedy and nothing ends early.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from msgspec import structs

from tsqp.bench.children import OnStep, Peers, Process, peers
from tsqp.bench.decode_child import DecodeAsk, DecodeOrder, DecodeSample
from tsqp.bench.plans import DECODE_PLANS, Plan
from tsqp.bench.prefill_suite import Prepared
from tsqp.bench.summary import model_heading, ratio, spread
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.enclave.mask_pool import peak_bytes
from tsqp.errors import InputError, InternalError, WeightsError
from tsqp.levels import open_model
from tsqp.measurements import DecodePoint, DecodeReport, Ratio, StepParts
from tsqp.model.architecture import LlamaConfig, linear_groups

PROMPT_TOKENS = 32
BATCHES = (1, 16)
LEAST_TOKENS = 16
MOST_AT_ONCE = EngineConfig().max_running
TOP_P = 0.9
_WARM_UP = 1
_WARM_UP_TOKENS = 16
# What the project promises, it promises for this.
_PROMISED_TOKENS, _PROMISED_DTYPE, _PROMISED_BATCH = 32, "float32", 16
_MOST_OVERHEAD_MS = 3.0
# Whose steps are shown by part; sampling's cost is that of the engine, whatever the level.
_WITH_PARTS = ("local", "open", "masked")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure: tokens of an answer, and numbers of requests at once, in order, 1 among them."""

    tokens: int
    batches: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, batches: Sequence[int]) -> Sizes:
        """Check what was asked for. One request is always measured.

        Raises:
            InputError: too few tokens, or more requests than an engine runs at once.
        """
        if tokens < LEAST_TOKENS:
            raise InputError(f"--tokens {tokens}: at least {LEAST_TOKENS} are needed, to have steps of all requests.")
        if max(batches) > MOST_AT_ONCE:
            raise InputError(f"--batch {max(batches)}: an engine runs at most {MOST_AT_ONCE} requests at once.")
        return cls(tokens, tuple(sorted({1, *batches})))

    @property
    def most(self) -> int:
        """The largest number of requests."""
        return self.batches[-1]

    @property
    def together(self) -> int:
        """The number of requests that is compared with one: what promises are made for, if it is measured."""
        return _PROMISED_BATCH if _PROMISED_BATCH in self.batches else self.most

    @property
    def mask_rows(self) -> int:
        """For how many tokens masks are used in a run of the most requests, prompts included."""
        return self.most * (PROMPT_TOKENS + self.tokens)

    def asks(self, plan: Plan) -> list[DecodeAsk]:
        """Return what one turn of a variant is."""
        asked = [DecodeAsk(batch=batch, tokens=self.tokens) for batch in self.batches]
        if plan.name in _WITH_PARTS:
            asked.append(DecodeAsk(batch=self.together, tokens=self.tokens, parts=True))
            if plan.name == "open":
                asked.append(DecodeAsk(batch=self.together, tokens=self.tokens, parts=True, top_p=TOP_P))
        return asked


@dataclass(slots=True)
class Child:
    """A running variant: what it is asked in a turn, and all it answered."""

    plan: Plan
    process: Process
    samples: dict[DecodeAsk, list[DecodeSample]] = field(default_factory=dict)

    @property
    def first_tokens(self) -> set[int]:
        """What its greedy answers to the first prompt began with."""
        return {one.first_token for ask, samples in self.samples.items() if ask.top_p == 1 for one in samples}

    def turn(self) -> None:
        """Let it do once all that it is asked."""
        for ask, samples in self.samples.items():
            samples.append(self.process.answer(ask, DecodeSample))


def run(config: EnclaveConfig, sizes: Sizes, threads: int, *, rounds: int, on_step: OnStep) -> DecodeReport:
    """Measure every variant with every number of requests, in turns.

    Args:
        config: a plain model, the dtype of the levels in floats.
        sizes: which.
        threads: per process.
        rounds: turns of each variant, each of one run with each number of requests and, of some, of one whose parts
            are timed.
        on_step: told the fraction done.

    Raises:
        WeightsError: the model has no tokenizer.
        InputError: prompt and answer are longer than the model's context.
        TsqpError: the worker does not start, or a variant fails.
    """
    architecture = _checked(config, sizes, on_step)
    prepared = Prepared.of(config, PROMPT_TOKENS + sizes.most - 1, on_step)
    memory = peak_bytes(linear_groups(architecture), sizes.mask_rows, sizes.mask_rows)
    with _children(prepared, config, sizes, memory, threads) as children:
        _take_turns(children, rounds, on_step)
    _check_agreement(children)
    points = [_point(child, ask) for child in children for ask in child.samples if not ask.parts]
    steps = [_parts(child, ask) for child in children for ask in child.samples if ask.parts]
    promised = (sizes.tokens, config.dtype) == (_PROMISED_TOKENS, _PROMISED_DTYPE)
    return DecodeReport(
        **model_heading(_command(config, sizes, threads, rounds), config, threads, rounds, _WARM_UP),
        prompt_tokens=PROMPT_TOKENS,
        tokens=sizes.tokens,
        mask_pool=sizes.mask_rows,
        mask_pool_bytes=memory,
        points=points,
        steps=steps,
        ratios=ratios(points, steps, sizes.together, promised=promised),
    )


def _checked(config: EnclaveConfig, sizes: Sizes, on_step: OnStep) -> LlamaConfig:
    """Return the architecture of a model that can generate so many tokens."""
    model = open_model(config.model, "open", on_step)
    if model.tokenizer is None:
        raise WeightsError("a model without tokenizer.json cannot generate text.")
    room = model.architecture.context_length - PROMPT_TOKENS
    if sizes.tokens > room:
        raise InputError(
            f"--tokens {sizes.tokens}: this model's context has room for {room} after a prompt of {PROMPT_TOKENS}."
        )
    return model.architecture


def _command(config: EnclaveConfig, sizes: Sizes, threads: int, rounds: int) -> str:
    return (
        f"tsqp bench decode --model {config.model} --tokens {sizes.tokens} --batch {','.join(map(str, sizes.batches))} "
        f"--dtype {config.dtype} --threads {threads} --rounds {rounds}"
    )


@contextmanager
def _children(
    prepared: Prepared, config: EnclaveConfig, sizes: Sizes, memory: int, threads: int
) -> Iterator[list[Child]]:
    """Run a process per variant, and the peers that they need, for the time of a ``with`` block."""
    with ExitStack() as stack:
        workers = stack.enter_context(peers((prepared.directory, prepared.packed), config, threads, dealer=True))
        children = []
        for plan in DECODE_PLANS:
            order = _order(prepared, plan, workers, config, sizes, memory, threads)
            process = Process(plan.name, "tsqp.bench.decode_child", order, plan.environment)
            stack.callback(process.close)
            children.append(Child(plan, process, {ask: [] for ask in sizes.asks(plan)}))
        yield children


def _order(  # noqa: PLR0917  one for each thing that a variant is told
    prepared: Prepared, plan: Plan, workers: Peers, config: EnclaveConfig, sizes: Sizes, memory: int, threads: int
) -> DecodeOrder:
    """Return what one variant's process loads."""
    common = structs.asdict(prepared.order(plan, workers, config, threads))
    if plan.masks_ready:
        common |= {"mask_pool": sizes.mask_rows, "mask_memory": memory}
    return DecodeOrder(**common, prompt_tokens=PROMPT_TOKENS, masks_ready=plan.masks_ready)


def _take_turns(children: Sequence[Child], rounds: int, on_step: OnStep) -> None:
    """Let every variant warm up, then go round, so that drift of the machine hits each alike."""
    total = len(children) * (rounds + 1)
    for done, child in enumerate(children):
        on_step("benchmark", done / total)
        for ask in child.samples:
            child.process.answer(structs.replace(ask, tokens=_WARM_UP_TOKENS), DecodeSample)
    for done in range(len(children), total):
        on_step("benchmark", done / total)
        children[done % len(children)].turn()
    on_step("benchmark", 1.0)


def _check_agreement(children: Sequence[Child]) -> None:
    """Refuse to report times of variants that do not begin the same answer: in floats, and over the packed model."""
    for packed in (False, True):
        first = {child.plan.name: child.first_tokens for child in children if child.plan.packed == packed}
        if len(set().union(*first.values())) > 1:
            raise InternalError(f"the variants do not agree on the first token: {first}.")


def _point(child: Child, ask: DecodeAsk) -> DecodePoint:
    samples = child.samples[ask]
    seconds = [sample.total_s / sample.steps for sample in samples]
    median_s = statistics.median(seconds)
    one = samples[min(range(len(samples)), key=lambda place: abs(seconds[place] - median_s))]
    return DecodePoint(
        name=child.plan.name,
        settings=child.plan.settings,
        level=child.plan.level,
        masks="" if child.plan.level != "masked" else "ready" if child.plan.masks_ready else "made within",
        batch=ask.batch,
        tokens_per_s=ask.batch / median_s,
        median_s=median_s,
        p10_s=spread(seconds, 0.1),
        p90_s=spread(seconds, 0.9),
        p95_s=spread(seconds, 0.95),
        all_s=seconds,
        bytes_per_token=one.bytes_moved / (one.steps * ask.batch),
        mask_wait_s=one.mask_wait_s / one.steps,
        mask_fill_s=one.mask_fill_s / one.steps,
    )


def overhead_s(sample: DecodeSample) -> float:
    """Return what one step took without products and attention."""
    return (sample.total_s - sample.products_s - sample.attention_s) / sample.steps


def _parts(child: Child, ask: DecodeAsk) -> StepParts:
    samples = child.samples[ask]
    overheads = [overhead_s(sample) for sample in samples]
    median_s = statistics.median(overheads)
    one = min(samples, key=lambda sample: abs(overhead_s(sample) - median_s))
    # The engine counts a step once its tokens are told: its waiting is of as many steps, begun and ended one earlier.
    waited_s = min(one.waited_s, one.products_s)
    seconds = {
        "step_s": one.total_s,
        "products_s": one.products_s,
        "worker_s": min(one.worker_s, waited_s),
        "wire_s": max(0.0, waited_s - one.worker_s),
        "attention_s": one.attention_s,
        "between_s": one.computed_s - one.products_s - one.attention_s,
        "sampling_s": one.told_s,
        "scheduling_s": one.total_s - one.computed_s - one.told_s,
    }
    return StepParts(
        name=child.plan.name,
        sampling="greedy" if ask.top_p == 1 else f"top-p {ask.top_p:g}",
        batch=ask.batch,
        overhead_s=median_s,
        all_overhead_s=overheads,
        **{name: value / one.steps for name, value in seconds.items()},
    )


def ratios(points: Sequence[DecodePoint], steps: Sequence[StepParts], together: int, *, promised: bool) -> list[Ratio]:
    """Compare tokens per second; where it is what they were ``promised`` for, against their limits.

    ``transformers`` is the better of the two OpenMP settings. ``together`` is how many requests are compared with one.
    The overhead is in milliseconds, and no ratio.
    """
    rates = {(point.name, point.batch): point.tokens_per_s for point in points}
    of_one, of_many = _alone(rates), [*(_together(rates, together) if together > 1 else ()), *_overheads(steps)]
    return [
        *(of_one if promised else map(_without_limit, of_one)),
        *(of_many if promised and together == _PROMISED_BATCH else map(_without_limit, of_many)),
    ]


def _without_limit(judged: Ratio) -> Ratio:
    return ratio(judged.name, judged.value)


def _alone(rates: Mapping[tuple[str, int], float]) -> list[Ratio]:
    """Compare what one request gets."""
    baseline = max(rates["transformers-active", 1], rates["transformers-passive", 1])
    return [
        ratio("1 request: open / transformers generate", rates["open", 1] / baseline, at_least=1.0),
        ratio("1 request: open / local", rates["open", 1] / rates["local", 1], at_least=0.7),
        ratio("1 request: local / transformers generate", rates["local", 1] / baseline),
        ratio("1 request: masked, pool filled / local", rates["masked", 1] / rates["local", 1]),
    ]


def _together(rates: Mapping[tuple[str, int], float], many: int) -> list[Ratio]:
    """Compare what many requests get with what one gets."""

    def gain(name: str, label: str, at_least: float | None = None) -> Ratio:
        return ratio(f"{_requests(many)} / 1: {label}", rates[name, many] / rates[name, 1], at_least=at_least)

    baseline = max(rates["transformers-active", many], rates["transformers-passive", many])
    return [
        gain("open", "open", 4.0),
        gain("masked", "masked, pool filled", 4.0),
        gain("masked-sustained", "masked, sustained, enclave masks"),
        gain("masked-dealer-sustained", "masked, sustained, one dealer"),
        gain("local", "local"),
        ratio(f"{_requests(many)}: open / transformers generate", rates["open", many] / baseline),
        ratio(f"{_requests(many)}: open / local", rates["open", many] / rates["local", many]),
        ratio(f"{_requests(many)}: masked, pool filled / local", rates["masked", many] / rates["local", many]),
    ]


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _overheads(steps: Sequence[StepParts]) -> list[Ratio]:
    """Judge what a step of `open` takes without products and attention."""
    return [
        ratio(
            f"{_requests(step.batch)}: overhead, {step.name}, {step.sampling}, ms",
            step.overhead_s * 1e3,
            at_most=_MOST_OVERHEAD_MS if step.name == "open" else None,
        )
        for step in steps
    ]
