"""Records real runs of one prompt at every level, over real links to real processes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from tsqp.audit.evidence import Evidence, word_groups
from tsqp.audit.recorder import Recorder
from tsqp.audit.simulate import MaskedRun
from tsqp.config import EnclaveConfig
from tsqp.launch import local_worker
from tsqp.levels import Model, open_model, runnable
from tsqp.loaded import Runnable

DEALERS = 2
SESSIONS = 4
_PROMPTS_PER_SESSION = 2
_DTYPE = "float32"
_ZERO_NOTE = "masked, r = 0: the integers recorded at `verified`, to which a mask of zeros adds nothing"

OnStep = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Capture:
    """How to record: the model's name and settings, the prompt, and where progress goes."""

    config: EnclaveConfig
    ids: tuple[int, ...]
    threads: int
    on_step: OnStep = lambda _name, _done: None

    def evidence(self, levels: Sequence[str], *, attention: bool) -> Evidence:
        """Run the prompt at `open`, and at the levels asked for.

        Args:
            levels: of ``suite.LEVELS``; `masked` records `verified` too, to compare with.
            attention: also record `open` with attention's products sent out.

        Raises:
            TsqpError: as starting or running a level does.
        """
        model = open_model(self.config.model, "open", self.on_step)
        groups = frozenset(word_groups(model.architecture))
        with self._worker(model) as url:
            config = replace(self._settings, worker=url)
            opened = self._recorded("open", model, config, groups, "recording open", 1)
            offloaded = None
            if attention:
                recorder = self._recorded("open", model, config, groups, "recording attention", 1, offload=True)
                offloaded = recorder.recording("worker")
        evidence = Evidence(self.ids, opened.recording("worker"), offloaded)
        return self._with_integers(evidence, groups, levels)

    @property
    def _settings(self) -> EnclaveConfig:
        """Settings without peers, which are started here; in float32, which the attacks' tolerances are for."""
        return replace(
            self.config, dtype=_DTYPE, wire_dtype=None, worker_key=None, dealers=(), dealer_keys=(), masks=None
        )

    def _with_integers(self, evidence: Evidence, groups: frozenset[str], levels: Sequence[str]) -> Evidence:
        if not {"verified", "masked"} & set(levels):
            return evidence
        model = open_model(self.config.model, "masked", self.on_step)
        with ExitStack() as stack:
            worker = stack.enter_context(self._worker(model))
            config = replace(self._settings, worker=worker, codes=str(model.directory), mask_pool=0)
            recorder = self._recorded("verified", model, config, groups, "recording verified", 1)
            evidence = replace(evidence, verified=recorder.recording("worker"))
            if "masked" not in levels:
                return evidence
            dealers = [stack.enter_context(self._worker(model, "ipc", "dealer")) for _ in range(DEALERS)]
            config = replace(config, masks="dealers", dealers=tuple(dealers))
            runs = [self._masked(model, config, groups, number) for number in range(SESSIONS)]
        return replace(evidence, masked=tuple(runs), simulated=(_ZERO_NOTE,))

    def _masked(self, model: Model, config: EnclaveConfig, groups: frozenset[str], number: int) -> MaskedRun:
        """Run one session: a new one has new keys."""
        step = f"recording masked, session {number + 1} of {SESSIONS}"
        recorder = self._recorded("masked", model, config, groups, step, _PROMPTS_PER_SESSION)
        return MaskedRun(recorder.recording("worker"), recorder.others("worker"))

    def _recorded(
        self,
        level: str,
        model: Model,
        config: EnclaveConfig,
        groups: frozenset[str],
        step: str,
        prompts: int,
        *,
        offload: bool = False,
    ) -> Recorder:
        """Predict with every link recorded."""
        self.on_step(step, 0.0)
        recorder = Recorder(groups)
        ids_BT = torch.tensor([self.ids])
        with runnable(
            level, model, config, offload_attention=offload, wrap=recorder.wrap, on_notice=_no_notice
        ) as loaded:
            _predict(loaded, ids_BT, prompts)
        self.on_step(step, 1.0)
        return recorder

    @contextmanager
    def _worker(self, model: Model, scheme: str = "ipc", command: str = "worker") -> Iterator[str]:
        name = f"starting a {command}"
        self.on_step(name, 0.0)
        arguments = ["--model", str(model.directory), "--device", "cpu", "--threads", str(self.threads)]
        if command == "worker":
            arguments += ["--dtype", _DTYPE]
        with local_worker(arguments, scheme, command=command) as url:
            self.on_step(name, 1.0)
            yield url


def _no_notice(_sentence: str) -> None:
    """Peers are processes of this command, started for what they receive to be recorded: keys would protect nothing."""


def _predict(model: Runnable, ids_BT: torch.Tensor, prompts: int) -> None:
    for _ in range(prompts):
        model.predict(ids_BT)
