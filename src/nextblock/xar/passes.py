"""The passes of a sampling run through the model, one entity at a time: plain, and the fast way.

A run asks for velocities of the entity that is being denoised, again and again, and has each finished entity
remembered. Which numbers come out does not depend on who makes the passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.layers.attention import KVCache
from nextblock.xar.layers import GatedMLP, XARLayer
from nextblock.xar.model import XAR

KEPT_BYTES = 2**30  # most memory for what class and time make of the layers
MOST_RECORDED = 64  # recorded shapes; each keeps its own memory on the device

Run = Callable[[], Tensor | None]
Record = Callable[[Run], tuple[Callable[[], None], Tensor | None]]


class Passes:
    """The model as it is.

    Class and time steer every layer by six vectors (`XAR.modulations`). All entities are denoised at the same times,
    so where there are several, the vectors of a time are kept and used again, if `KEPT_BYTES` hold them.
    """

    def __init__(self, model: XAR) -> None:
        self.made_for = self.model = model
        self.labels: Tensor | None = None
        self.rows = 0
        self.cache: KVCache

    def begin(self, rows: int, labels: Tensor | None, guided: bool, times: Sequence[float]) -> None:
        """A new run of `rows` images at `times`; `labels` [rows], those for no class behind them if `guided`."""
        if guided:
            assert labels is not None
            labels = torch.cat((labels, torch.full_like(labels, self.model.null_label)))
        self.rows, self.labels = rows, labels
        self._begin_cache(rows * (2 if guided else 1))
        config = self.model.config
        vectors = rows * (2 if guided else 1) * config.depth * 6 * config.width * len(times)
        several = self.model.ordering.num_entities > 1
        self._keeps = several and vectors * self.model.tokens_in.weight.element_size() <= KEPT_BYTES
        self._kept: dict[float, list[Tensor]] = {}

    def velocities(self, entity: int, x: Tensor, t: float, *, doubled: bool) -> Tensor:
        """At `x` [rows, K, C·p·p] and time t; with `doubled`, those without a class behind them: [2 · rows, ...]."""
        found = self._pass(entity, self._given(x, doubled), t, remember=False)
        assert found is not None
        return found

    def remember(self, entity: int, x: Tensor, *, doubled: bool) -> None:
        """Keep the keys and values of a finished entity."""
        self._pass(entity, self._given(x, doubled), 0.0, remember=True)
        self.cache.keep(x.shape[1])

    def _begin_cache(self, rows: int) -> None:
        self.cache = self.model.new_cache()

    def _given(self, x: Tensor, doubled: bool) -> Tensor:
        x = x.to(self.model.tokens_in.weight.dtype)
        return torch.cat((x, x)) if doubled else x

    def _pass(self, entity: int, x: Tensor, t: float, *, remember: bool) -> Tensor | None:
        times = torch.full((len(x), 1), t, device=x.device)
        labels = None if self.labels is None else self.labels[: len(x)]
        return self._through(entity, x, times, labels, remember, self._modulations(t, len(x)))

    def _through(
        self,
        entity: int,
        x: Tensor,
        times: Tensor,
        labels: Tensor | None,
        remember: bool,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor | None:
        if remember:
            self.model.remember(x, times, labels, entity=entity, cache=self.cache, modulations=modulations)
            return None
        return self.model.velocities(
            x, times, labels, first=entity, cache=self.cache, masked=False, modulations=modulations
        )

    def _modulations(self, t: float, rows: int) -> list[Tensor] | None:
        if not self._keeps:
            return None
        if t not in self._kept:
            most = self.rows if self.labels is None else len(self.labels)
            times = torch.full((most, 1), t, device=self.model.position1.device)
            self._kept[t] = self.model.modulations(times, self.labels)
        return [vectors[:rows] for vectors in self._kept[t]]


@dataclass
class _Recorded:
    """A pass of one shape: what it reads, how it is run, what it fills."""

    x: Tensor
    times: Tensor
    labels: Tensor | None
    replay: Callable[[], None]
    out: Tensor | None


class CudaGraphs:
    """Records passes on one CUDA device. Replays follow each other, so all share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor | None]:
        """What `run` does, as a function that does it again, and the tensor that it fills."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, and lets libraries make their work space
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=side):
                out = run()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, out


class FastPasses(Passes):
    """Passes by compiled layers; on CUDA every shape is recorded once as a graph and replayed.

    Make one and hand it to every `sample_latents` of a model: compiling takes some seconds to a minute, once. It works
    on a copy of the model with its present weights, and raises RuntimeError when those have changed since.

    Args:
        model: the model that is sampled from.
        bf16: the weights of the copy's linear maps are bfloat16, and it runs under autocast: the same numbers as a
            float32 model under autocast, without rounding every weight anew in every recorded pass.
        backend: of torch.compile.
        record: how a pass is recorded; None = not. By default `CudaGraphs` on CUDA, else not.

    Raises ConfigError for a model whose layers compute their activations again (`activation_checkpointing`).
    """

    def __init__(
        self,
        model: XAR,
        *,
        bf16: bool = False,
        backend: str = "inductor",
        record: Record | str | None = "auto",
    ) -> None:
        if any("forward" in vars(layer) for layer in model.layers):  # it would run the original's weights
            raise ConfigError("layers with activation_checkpointing cannot be compiled for sampling.")
        super().__init__(copy.deepcopy(model).eval().requires_grad_(False))
        self.made_for, self.bf16, self._weights = model, bf16, _versions(model)
        self.device = model.position1.device
        if isinstance(record, str):
            record = CudaGraphs(self.device) if self.device.type == "cuda" else None
        self._record = record
        self._recorded: dict[tuple[int, int, bool], _Recorded] = {}
        self._cache_rows = 0
        for layer in self.model.layers:
            assert isinstance(layer, XARLayer)
            layer.mlp = _Joined(layer.mlp)  # type: ignore[assignment]
        _compile(self.model, backend)
        if bf16:
            for part in self.model.modules():
                if isinstance(part, nn.Linear):
                    part.to(torch.bfloat16)

    def _begin_cache(self, rows: int) -> None:
        """The room is kept from run to run, as recorded passes write into it, unless more is needed."""
        if self._weights != _versions(self.made_for):
            raise RuntimeError("the model's weights have changed since these passes were made. Make new ones.")
        if rows > self._cache_rows:
            self.cache = KVCache(self.model.config.depth, self.model.ordering.num_tokens, rows)
            self._cache_rows = rows
            self._recorded.clear()
        self.cache.clear()

    def _pass(self, entity: int, x: Tensor, t: float, *, remember: bool) -> Tensor | None:
        with self._precision():
            if self._record is None or 3 * self.model.ordering.num_entities > MOST_RECORDED:
                return super()._pass(entity, x, t, remember=remember)
            key = (entity, len(x), remember)
            if key not in self._recorded:
                if len(self._recorded) >= MOST_RECORDED:
                    self._recorded.clear()
                self._recorded[key] = self._recording(entity, x, remember)
            made = self._recorded[key]
            made.x.copy_(x)
            made.times.fill_(t)
            if made.labels is not None:
                assert self.labels is not None
                made.labels.copy_(self.labels[: len(x)])
            made.replay()
            return None if made.out is None else made.out.clone()

    def _precision(self) -> AbstractContextManager[object]:
        # whatever the caller's: what is recorded and kept is of one precision
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _recording(self, entity: int, x: Tensor, remember: bool) -> _Recorded:
        assert self._record
        static, times = x.clone(), torch.ones(len(x), 1, device=x.device)
        labels = None if self.labels is None else self.labels[: len(x)].clone()
        replay, out = self._record(lambda: self._through(entity, static, times, labels, remember))
        return _Recorded(static, times, labels, replay, out)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Where each weight lies, and how often it was written."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]


class _Joined(nn.Module):
    """A `GatedMLP` without dropout whose gate and value come out of one product: larger ones are faster."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        parts = (mlp.gate, mlp.value)
        self.both = nn.Linear(mlp.gate.in_features, 2 * mlp.gate.out_features, device="meta")
        self.both.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.both.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        self.out = mlp.out

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        found: Tensor = self.out(F.gelu(gate) * value)
        return found


def _compile(model: XAR, backend: str) -> None:
    """What comes before attention in a layer, and what comes after, each compiled once for all layers.

    Attention itself is a library's kernel, over ever more keys: left out, nothing is compiled anew for an entity.
    """
    before = torch.compile(XARLayer.before, backend=backend)
    after = torch.compile(XARLayer.after, backend=backend)
    for layer in model.layers:
        assert isinstance(layer, XARLayer)
        layer.before, layer.after = partial(before, layer), partial(after, layer)  # type: ignore[method-assign]
