"""Which products a lane captures as CUDA graphs, one launch instead of many, and which it gives up again."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from tsqp.errors import DeviceMemoryError

# What graphs save is launches, which more rows than these outlast.
MAX_GRAPH_ROWS = 64
# Each keeps its operand and its result on the device. Of one lane:
MAX_GRAPHS = 512
MAX_GRAPH_BYTES = 256 << 20
# A shape is captured when it comes for the third time: prompts come in all lengths, tokens by ones and twos.
_USES_BEFORE_CAPTURE = 2
_MAX_SHAPES = 4096

_log = logging.getLogger(__name__)

# A group's name or a chain's, and a number of rows.
Shape = tuple[str, int]


class Graph(NamedTuple):
    """A captured product: ``replay`` writes ``result_MN`` from what is in ``operand_MK`` by then."""

    operand_MK: Tensor
    result_MN: Tensor
    replay: Callable[[], None]

    @property
    def nbytes(self) -> int:
        """What it keeps on the device."""
        return self.operand_MK.nbytes + self.result_MN.nbytes


class Capturing:
    """Whether products are captured at all: one for all lanes, of which the first that fails ends it.

    Args:
        enabled: whether to begin with it.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled

    def end(self, error: Exception) -> None:
        """Capture no more, which is said once."""
        self.enabled = False
        _log.warning("products are not captured as CUDA graphs from here on, which costs launches: %s", error)


class GraphCache:
    """Which shapes of one lane are captured: those that came often enough, the least recently used given up first.

    Args:
        capturing: shared by all lanes.
    """

    def __init__(self, capturing: Capturing) -> None:
        self._capturing = capturing
        self._uses: OrderedDict[Shape, int] = OrderedDict()
        self._graphs: OrderedDict[Shape, Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, shape: Shape, capture: Callable[[], Graph]) -> Graph | None:
        """Return the captured product of this shape if there is one, or if it is time to capture it."""
        graph = self._graphs.get(shape)
        if graph is None and self._is_due(shape):
            graph = self._captured(shape, capture)
        if graph is not None:
            self._graphs.move_to_end(shape)
        return graph

    def _is_due(self, shape: Shape) -> bool:
        """Count a use; tell whether the shape has been used often enough."""
        if not self._capturing.enabled or shape[1] > MAX_GRAPH_ROWS:
            return False
        self._uses[shape] = uses = self._uses.pop(shape, 0) + 1
        if len(self._uses) > _MAX_SHAPES:
            self._uses.popitem(last=False)
        return uses > _USES_BEFORE_CAPTURE

    def _captured(self, shape: Shape, capture: Callable[[], Graph]) -> Graph | None:
        """Capture. If that fails, this lane's graphs go too: they share memory with what was half recorded."""
        try:
            graph = capture()
        except (RuntimeError, DeviceMemoryError) as error:
            self._graphs.clear()
            self._capturing.end(error)
            return None
        del self._uses[shape]
        self._graphs[shape] = graph
        while len(self._graphs) > MAX_GRAPHS or (len(self._graphs) > 1 and self._nbytes() > MAX_GRAPH_BYTES):
            self._graphs.popitem(last=False)
        return graph

    def _nbytes(self) -> int:
        return sum(graph.nbytes for graph in self._graphs.values())
