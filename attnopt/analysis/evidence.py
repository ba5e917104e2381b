"""Evidence: what a pass may ask of the calibration data. Everything is measured when it is first asked for.

    evidence.linear(node)          channels of what a linear layer reads: mean, variance, range
    evidence.second_moment(node)   X'X / rows of what it reads
    evidence.concentrated_moments(layers)    the same, tokens counted by the attention that they receive
    evidence.attention(site)       where an attention looks
    evidence.left_out(site, …)     what sparser forms of it would leave out
    evidence.hold(values)          what some values hold on one batch after another

Without calibration data every answer is None, and a pass proposes what it can without. One question measures all layers (or sites)
of its kind in one sweep, as many at a time as memory holds; second moments, of C^2 numbers, are kept only for the last group.
While evidence is `bounded`, a sweep ends where time is up, and what it says is of the batches that it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from attnopt.analysis.attention_mass import AttentionMeasure
from attnopt.analysis.calibration import Batch, Calibration
from attnopt.analysis.concentration import LEAST, ConcentrationMeasure, values_of
from attnopt.analysis.left_out import LeftOut, LeftOutMeasure, forms_of
from attnopt.analysis.linear_inputs import ChannelMeasure, MomentMeasure, input_width, linear_inputs
from attnopt.analysis.operands import number, tapped
from attnopt.analysis.padding import Padding
from attnopt.analysis.running import RunningChannels
from attnopt.analysis.statistics import AttentionStatistics, ChannelStatistics, LinearStatistics, joined
from attnopt.analysis.store import Store, fingerprint, key_of
from attnopt.analysis.sweep import MEMORY, Sweep
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Host, NotIsolated, Site
from attnopt.ir.spec import AttentionSpec


class Evidence:
    """Statistics of one host on calibration data, which is the half to choose by. The host and the data must not change.

    sites: the attentions of the host, on which `attention` answers. store: where finished measurements are kept.
    memory: bytes that taps and running sums may take at a time; a block of weights takes up to 100 MB beside it.
    A node or site that is asked about may be that of a copy of the host, whatever a pass made of it: it is known by name.
    """

    def __init__(
        self,
        host: Host,
        calibration: Calibration | None = None,
        *,
        sites: Sequence[Site] = (),
        store: Store | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.host = host
        self.calibration = calibration or Calibration(())
        self.store = store or Store()
        self.memory = memory
        self.sites = tuple(sites)
        self._padding = Padding.of(host.graph)
        self._contents = ""
        self._linear: dict[str, ChannelStatistics] | None = None
        self._seen: frozenset[str] | None = None
        self._moments: dict[str, Tensor] = {}
        self._attention: dict[str, AttentionStatistics] | None = None
        self._left_out: dict[str, dict[str, list[LeftOut]]] = {}
        self._late: Callable[[], bool] = lambda: False
        self._cut: list[str] = []

    @contextmanager
    def bounded(self, late: Callable[[], bool]) -> Iterator[list[str]]:
        """Until it ends, no sweep goes on when time is up; the list is filled with what saw fewer batches, in words.

        Then second moments that saw fewer are forgotten: what is rounded by them is rounded by all data.
        """
        self._late, self._cut = late, []
        try:
            yield self._cut
        finally:
            if self._cut:
                self._moments = {}
            self._late = lambda: False

    @property
    def samples(self) -> int:
        return self.calibration.samples

    def linear(self, node: Node) -> LinearStatistics | None:
        """Channels of what a linear layer reads; None without data, or for a node that is no linear layer with a constant weight."""
        if input_width(node) is None or node.inputs[0] is None or not self.samples:
            return None
        if self._linear is None:
            measures = [
                ChannelMeasure(self.key("channels", value.name), value, self._padding, RunningChannels(width))
                for value, width in self.tappable().items()
            ]
            swept = self.sweep().measured(measures, "inputs of linear layers")
            self._linear = {m.reads[0].name: joined(ChannelStatistics, result) for m, result in swept}
        found = self._linear.get(node.inputs[0].name)
        return None if found is None else LinearStatistics(node.name, found)

    def sees(self, node: Node) -> bool:
        """Whether there are data, and what this linear layer reads can be tapped. Nothing is run."""
        reads = node.inputs[0] if node.inputs else None
        if self._seen is None:
            self._seen = frozenset(value.name for value in self.tappable())
        return bool(self.samples) and reads is not None and reads.name in self._seen

    def on(self, host: Host) -> Evidence:
        """The same data on a copy of the host whose weights were changed since; nodes and sites are known by name. Nothing is stored."""
        twins = {v.name: v for v in (*host.graph.inputs, *(v for n in host.graph.nodes for v in n.outputs))}
        sites = [s.reading({o.value: twins[o.value.name] for o in s.reads if o.value.name in twins}) for s in self.sites]
        return Evidence(host, self.calibration, sites=sites, memory=self.memory)

    def second_moment(self, node: Node) -> Tensor | None:
        """X'X / rows [C, C] in float64 of what a linear layer reads; None as for `linear`. Ask in the order of the graph."""
        if input_width(node) is None or node.inputs[0] is None or not self.samples:
            return None
        name = node.inputs[0].name
        if name not in self._moments:
            self._moments = self.moments_from(name)
        return self._moments.get(name)

    def moments_from(self, name: str) -> dict[str, Tensor]:
        """Second moments of the named value and of those that follow, as many as memory holds at a time."""
        values = list(self.tappable().items())
        start = next((i for i, (value, _) in enumerate(values) if value.name == name), None)
        if start is None:
            return {}
        sweep = self.sweep()
        measures = [MomentMeasure(self.key("moment", v.name), v, width, self._padding) for v, width in values[start:]]
        group = next(sweep.groups(measures))
        return {m.reads[0].name: result["moment"] for m, result in sweep.measured(group, "second moments")}

    def concentrated_moments(
        self, layers: Sequence[tuple[Site, Sequence[Node]]], least: float = LEAST
    ) -> Iterator[dict[str, Tensor]]:
        """For each layer the second moments of what its linear nodes read, by node name, tokens counted by the attention they receive.

        In the order given, as many layers at a time as memory holds. A node that cannot be tapped is absent; so are all of a layer
        whose attention cannot be.
        """
        measures = [self.concentration(site, nodes, least) for site, nodes in layers]
        made = [m for m in measures if m is not None]
        swept = self.sweep().measured(made, "weighted second moments") if made else iter(())
        for (_, nodes), measure in zip(layers, measures, strict=True):
            result = {} if measure is None else next(swept)[1]
            yield {n.name: result[n.inputs[0].name] for n in nodes if n.inputs[0] is not None and n.inputs[0].name in result}

    def concentration(self, site: Site, nodes: Sequence[Node], least: float) -> ConcentrationMeasure | None:
        known = next((s for s in self.sites if s.name == site.name), None)
        if known is None or not self.samples or not self.can_tap(tapped(known)):
            return None
        wanted = {n.inputs[0].name for n in nodes if n.inputs[0] is not None}
        read = {value: width for value, width in self.tappable().items() if value.name in wanted}
        key = self.key("concentration", f"{least}", values_of(known, list(read)))
        return ConcentrationMeasure(key, known, self.host.graph, self._padding, read, least)

    def attention(self, site: Site) -> AttentionStatistics | None:
        """Where an attention of the host looks, before any rewrite; None without data, or where its operands cannot be tapped."""
        if not self.samples:
            return None
        if self._attention is None:
            measures = [self.attention_measure(s) for s in self.sites if self.can_tap(tapped(s))]
            swept = self.sweep().measured(measures, "attentions")
            self._attention = {m.site.name: m.value(result) for m, result in swept if isinstance(m, AttentionMeasure)}
        return self._attention.get(site.name)

    def attention_measure(self, site: Site) -> AttentionMeasure:
        reads = ", ".join(f"{o}" for o in (site.q, site.k, site.v, *site.operands.values()))
        return AttentionMeasure(self.key("attention", site.name, str(site.spec), reads), site, self.host.graph, self._padding)

    def longest(self, site: Site) -> int:
        """The most keys that the attention has in any batch, 0 without data or where no input says how many."""
        found = [number(site.size("k"), self.host.graph.sizes(batch)) or 0 for batch in self.calibration.batches]
        return max(found, default=0)

    def left_out(self, site: Site, name: str, forms: Callable[[Site], Sequence[AttentionSpec]]) -> Sequence[LeftOut] | None:
        """What each of `forms(site)` would leave out, before any other rewrite; None as for `attention`, or where there are none.

        name: of who asks. One question measures the forms of all sites.
        """
        if not self.samples:
            return None
        if name not in self._left_out:
            asked = [(s, tuple(forms(s))) for s in self.sites if self.can_tap(tapped(s))]
            measures = [
                LeftOutMeasure(
                    self.key("left out", s.name, str(s.spec), *map(str, found)), s, self.host.graph, self._padding, found
                )
                for s, found in asked
                if found
            ]
            swept = self.sweep().measured(measures, f"forms of attentions: {name}") if measures else iter(())
            self._left_out[name] = {m.site.name: forms_of(result) for m, result in swept if isinstance(m, LeftOutMeasure)}
        return self._left_out[name].get(site.name)

    def hold(self, values: Sequence[Value]) -> Iterator[tuple[Batch, list[Tensor]]]:
        """Each batch of inputs with what these values of the host hold on it. Raises NotIsolated for what cannot be tapped."""
        tap = self.host.tapper(values)
        for inputs in self.calibration.batches:
            yield inputs, tap(inputs)

    def tappable(self) -> dict[Value, int]:
        return {v: width for v, width in linear_inputs(self.host.graph).items() if self.can_tap((v,))}

    def can_tap(self, values: Sequence[Value]) -> bool:
        """Whether all of these exist in the host's main graph; those inside of a loop or branch cannot be tapped."""
        graph = self.host.graph
        mine = {*graph.inputs, *(v for n in graph.nodes for v in n.outputs)}
        return all(v in mine for v in values)

    def sweep(self) -> Sweep:
        return Sweep(self.host, self.calibration.batches, self.store, self.memory, self._late, self._cut)

    def key(self, *what: str) -> str:
        """The key of a measurement: of the model, its weights, the data, and what is measured."""
        if self.store.folder is not None and not self._contents:
            self._contents = key_of(fingerprint(self.host.graph), self.calibration.fingerprint)
        return key_of(self._contents, *what)


__all__ = ["Evidence", "NotIsolated"]
