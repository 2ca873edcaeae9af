"""Comparing networks on the same tokens: one pass over the data, exact CKA of corresponding layers, a sample for maps.

A `Comparison` reads batches with two or three models and keeps moments (`StreamingCKA`) for every pair of layers that
correspond, at every chosen site, and a seeded sample of rows for the layer × layer map and the intervals. Its state can
be stored and continued.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from litgpt.chat import Span
from litgpt.cka import MINIMUM_ROWS, OUTLIER_FACTOR, Likeness, StreamingCKA, corresponding, ordinary_rows, select_rows
from litgpt.ckasample import Spread, layer_map, spread
from litgpt.data import Batch
from litgpt.model import GPT, Block, LLaMAMoE
from litgpt.utils import UserError, progress

Site = Literal["block", "attention", "mlp"]
SITES: tuple[Site, ...] = ("block", "attention", "mlp")


class Place(NamedTuple):
    """Where in a network: the residual stream after a block, or what its attention or FFN (MoE) adds to it."""

    site: Site
    layer: int
    expert: int = -1
    """What this expert makes of every token, at site `mlp`; -1: what the layer makes of it."""


class Pair(NamedTuple):
    """What is compared with what."""

    a: str
    place_a: Place
    b: str
    place_b: Place


@dataclass(frozen=True)
class Found:
    """One pair's figures over all rows, and the spread of its sample (`None` where none was kept)."""

    pair: Pair
    cka: float
    biased: float
    likeness: Likeness
    spread: Spread | None

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not finite becomes None.

        The interval is the sample's, laid about the value of all rows: wider than need be, never too narrow for them.
        """
        found: dict[str, Any] = {"a": self.pair.place_a.layer, "b": self.pair.place_b.layer}
        if self.pair.place_b.expert >= 0:
            found["expert"] = self.pair.place_b.expert
        found |= {"cka": self.cka, "biased": self.biased} | self.likeness._asdict()
        if self.spread is not None:
            off = self.cka - self.spread.value
            found |= {"low": self.spread.low + off, "high": self.spread.high + off}
            found |= {"floor": self.spread.floor, "ceiling": self.spread.ceiling}
        return {key: _finite(value) for key, value in found.items()}


class Dropped(NamedTuple):
    """Tokens of the chosen spans that were no rows."""

    first: int
    outliers: int


class Comparison:
    """Two or more models that read the same batches.

    Args:
        models: by name, on their devices.
        versus: pairs of names; the layers of the first are compared with those that correspond in the second.
        sites: where.
        layers: of each first model; `None`: all.
        experts: also what each expert of the second makes of the tokens against the first's FFN.
        keep_spans: labels of the tokens that are rows.
        drop_first, outlier_factor: `select_rows` and `ordinary_rows` (at every block of every model); a token that is
            dropped anywhere is dropped everywhere, so that all figures are about the same rows.
        sample_rows: how many rows are kept for maps and intervals, each as likely as any other.
        seed: of the sample.
    """

    def __init__(
        self,
        models: Mapping[str, GPT],
        versus: Sequence[tuple[str, str]],
        *,
        sites: Sequence[Site] = ("block",),
        layers: Sequence[int] | None = None,
        experts: bool = False,
        keep_spans: Collection[Span],
        drop_first: bool = True,
        outlier_factor: float = OUTLIER_FACTOR,
        sample_rows: int = 2048,
        seed: int = 1337,
    ) -> None:
        self.models, self.versus, self.sites = models, list(versus), list(sites)
        self.keep_spans, self.drop_first, self.outlier_factor = keep_spans, drop_first, outlier_factor
        self.sample_rows = sample_rows
        self._seed, self.batches, self.rows, self.dropped = seed, 0, 0, Dropped(0, 0)
        self._sequences = 0
        self._streams: dict[Pair, StreamingCKA] = {pair: StreamingCKA() for pair in self._pairs(layers, experts)}
        self._experts = {pair.b for pair in self._streams if pair.place_b.expert >= 0}
        self._sample: dict[tuple[str, Site], list[Tensor]] = {
            (name, site): [] for name in models for site in self.sites
        }
        self._sample_sequences: list[Tensor] = []
        # Every row draws a number; those with the smallest are the sample.
        self._sample_keys: list[Tensor] = []
        self._largest_key = 1.0

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(iter(self.models.values())).transformer.wte.weight.device

    def _pairs(self, layers: Sequence[int] | None, experts: bool) -> Iterator[Pair]:
        for a, b in self.versus:
            depth_a, depth_b = self.models[a].config.n_layer, self.models[b].config.n_layer
            for i, j in corresponding(depth_a, depth_b):
                if layers is not None and i not in layers:
                    continue
                for site in self.sites:
                    yield Pair(a, Place(site, i), b, Place(site, j))
                if experts and j in self.models[b].config.moe_layers:
                    for expert in range(self.models[b].config.n_expert):
                        yield Pair(a, Place("mlp", i), b, Place("mlp", j, expert))

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        """Read a batch with every model.

        Raises:
            UserError: hidden states that are not finite.
        """
        device = self.device
        batch = batch.to(device)
        all_BT = select_rows(batch.spans_BT, batch.documents_BT, keep_spans=self.keep_spans, drop_first=False)
        kept_BT = all_BT
        if self.drop_first:
            kept_BT = select_rows(batch.spans_BT, batch.documents_BT, keep_spans=self.keep_spans)
        first = int(all_BT.sum() - kept_BT.sum())
        # Numbers that no two sequences of any batch share.
        width = int(batch.documents_BT.max()) + 1 if batch.documents_BT.numel() else 0
        number_BT = torch.arange(len(batch.ids_BT), device=device)[:, None] * width + batch.documents_BT.long()
        sequences_N = number_BT[kept_BT] + self._sequences
        self._sequences += width * len(batch.ids_BT)

        states = {name: self._read(name, model, batch, kept_BT) for name, model in self.models.items()}
        ordinary_N = torch.ones(len(sequences_N), dtype=torch.bool, device=device)
        if self.outlier_factor != float("inf"):
            blocks = [x_ND for of in states.values() for place, x_ND in of.items() if place.site == "block"]
            ordinary_N = ordinary_rows(blocks, sequences_N, factor=self.outlier_factor)
        self.dropped = Dropped(self.dropped.first + first, self.dropped.outliers + int((~ordinary_N).sum()))
        if not ordinary_N.all():
            states = {name: {place: x_ND[ordinary_N] for place, x_ND in of.items()} for name, of in states.items()}
        for pair, stream in self._streams.items():
            stream.update(states[pair.a][pair.place_a], states[pair.b][pair.place_b])
        self._keep(states, sequences_N[ordinary_N])
        self.rows += int(ordinary_N.sum())
        self.batches += 1

    def _read(self, name: str, model: GPT, batch: Batch, kept_BT: Tensor) -> dict[Place, Tensor]:
        """The kept rows at every place of a model, [N, D] each."""
        depth = model.config.n_layer
        # An expert of one model is compared with the FFN of the other.
        sites = {*self.sites, "mlp"} if self._experts else set(self.sites)
        with _listening(model, sites, kept_BT, name in self._experts) as found:
            output = model(batch.ids_BT, documents_BT=batch.documents_BT, layers=range(depth), return_logits=False)
        for layer, x_BTD in output.hidden_states.items():
            found[Place("block", layer)] = x_BTD[kept_BT]
        for place, x_ND in found.items():
            if not x_ND.isfinite().all():
                raise UserError(
                    f"hidden states of layer {place.layer} ({place.site}) of {name} are not finite: "
                    "is a checkpoint damaged?"
                )
        return found

    def _keep(self, states: Mapping[str, Mapping[Place, Tensor]], sequences_N: Tensor) -> None:
        generator = torch.Generator().manual_seed(self._seed + self.batches)
        key_N = torch.rand(len(sequences_N), generator=generator, dtype=torch.float64)
        chosen_N = (key_N < self._largest_key).nonzero()[:, 0]
        self._sample_keys.append(key_N[chosen_N])
        self._sample_sequences.append(sequences_N.cpu()[chosen_N])
        for (name, site), kept in self._sample.items():
            depth = self.models[name].config.n_layer
            of_layers = [states[name][Place(site, layer)][chosen_N.to(sequences_N.device)] for layer in range(depth)]
            kept.append(torch.stack(of_layers, 1).float().cpu())
        if sum(map(len, self._sample_keys)) > 2 * self.sample_rows:
            self._thin()

    def _thin(self) -> None:
        """Drop from the sample what is too much."""
        keys_N = torch.cat(self._sample_keys)
        if len(keys_N) > self.sample_rows:
            smallest_N = keys_N.argsort()[: self.sample_rows].sort().values
            self._largest_key = float(keys_N[smallest_N].max()) if self.sample_rows else 0.0
        else:
            smallest_N = torch.arange(len(keys_N))
        for kept in (self._sample_keys, self._sample_sequences, *self._sample.values()):
            kept[:] = [torch.cat(kept)[smallest_N]]

    def sample(self, name: str, site: Site) -> tuple[Tensor, Tensor]:
        """The rows kept of a model, fp32 [N, L, D], and the sequence that each is from."""
        self._thin()
        return self._sample[name, site][0], self._sample_sequences[0]

    def found(self, *, spreads: bool = True) -> list[Found]:
        """The figures of every pair.

        Args:
            spreads: also intervals, floor and ceiling, from the sample.

        Raises:
            UserError: fewer than 4 rows.
        """
        if self.rows < MINIMUM_ROWS:
            names = ", ".join(sorted(span.name.lower() for span in self.keep_spans))
            raise UserError(
                f"{self.rows} tokens in the spans {names}: CKA needs at least {MINIMUM_ROWS}; choose other --spans"
            )
        return [
            Found(
                pair,
                stream.result(),
                stream.result(unbiased=False),
                stream.likeness(),
                self._spread(pair) if spreads else None,
            )
            for pair, stream in progress(list(self._streams.items()), "comparing", unit="pair")
        ]

    def _spread(self, pair: Pair) -> Spread | None:
        if pair.place_b.expert >= 0:
            return None
        device = self.device
        (x_NLD, sequences_N), (y_NMC, _) = (
            self.sample(name, place.site) for name, place in ((pair.a, pair.place_a), (pair.b, pair.place_b))
        )
        if len(sequences_N) < MINIMUM_ROWS:
            return None
        x_ND, y_NC = x_NLD[:, pair.place_a.layer].to(device), y_NMC[:, pair.place_b.layer].to(device)
        return spread(x_ND, y_NC, sequences_N.to(device), seed=self._seed)

    def map(self, a: str, b: str, site: Site) -> np.ndarray:
        """Unbiased CKA of every layer of a with every layer of b on the sample; NaN with too few rows."""
        (x_NLD, _), (y_NMC, _) = self.sample(a, site), self.sample(b, site)
        if len(x_NLD) < MINIMUM_ROWS:
            return np.full((x_NLD.shape[1], y_NMC.shape[1]), np.nan)
        device = self.device
        return layer_map(x_NLD.to(device), y_NMC.to(device)).numpy()

    def state(self) -> dict[str, Any]:
        """All that was seen, as plain values and tensors."""
        self._thin()
        return {
            "batches": self.batches,
            "rows": self.rows,
            "dropped": list(self.dropped),
            "sequences": self._sequences,
            "streams": [stream.state() for stream in self._streams.values()],
            "sample": [kept[0] for kept in self._sample.values()],
            "sample_sequences": self._sample_sequences[0],
            "sample_keys": self._sample_keys[0],
            "largest_key": self._largest_key,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that another comparison of the same settings has seen."""
        self.batches, self.rows, self._sequences = state["batches"], state["rows"], state["sequences"]
        self.dropped = Dropped(*state["dropped"])
        for stream, stored in zip(self._streams.values(), state["streams"], strict=True):
            stream.restore(stored)
        for kept, stored in zip(self._sample.values(), state["sample"], strict=True):
            kept[:] = [stored.cpu()]
        self._sample_sequences, self._sample_keys = [state["sample_sequences"].cpu()], [state["sample_keys"].cpu()]
        self._largest_key = state["largest_key"]


@contextmanager
def _listening(model: GPT, sites: Collection[str], kept_BT: Tensor, experts: bool) -> Iterator[dict[Place, Tensor]]:
    """While inside, what attention and FFN of each block give for the kept rows lands in the dict."""
    found: dict[Place, Tensor] = {}

    def listen(place: Place, of_experts: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Any]) -> None:
            found[place] = (output[0] if isinstance(output, tuple) else output)[kept_BT]
            if of_experts and isinstance(module, LLaMAMoE):
                x_ND = inputs[0][kept_BT]
                for expert in range(module.gate.out_features):
                    ids_N1 = torch.full((len(x_ND), 1), expert, device=x_ND.device)
                    weights_N1 = torch.ones(len(x_ND), 1, dtype=x_ND.dtype, device=x_ND.device)
                    found[place._replace(expert=expert)] = module.experts(x_ND, ids_N1, weights_N1)

        return hook

    with ExitStack() as undo:
        for layer, block in enumerate(model.transformer.h):
            assert isinstance(block, Block)
            if "attention" in sites:
                undo.callback(block.attn.register_forward_hook(listen(Place("attention", layer), False)).remove)
            if "mlp" in sites:
                undo.callback(block.mlp.register_forward_hook(listen(Place("mlp", layer), experts)).remove)
        yield found


def _finite(value: float | None) -> float | int | None:
    return value if value is None or isinstance(value, int) or np.isfinite(value) else None
