"""One tool's CKA of the two models and the data that `benchmarks/cka.py` has stored; started by it, prints JSON.

The tools hook modules whose output is a tensor, so each model is wrapped: a tap for every layer, an identity. To
torch-cka and pytorch-cka samples are rows and the rest is flattened, so their taps see one row a token, the best they
can be given; ckatorch takes the tokens of each sample.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litgpt.model import GPT


class Tapped(nn.Module):
    """A model whose layers' hidden states pass through modules `taps.0`, `taps.1`, …"""

    def __init__(self, model: GPT, *, flat: bool) -> None:
        super().__init__()
        self.model, self.flat = model, flat
        self.taps = nn.ModuleList(nn.Identity() for _ in range(model.config.n_layer))

    def forward(self, ids: Tensor) -> Tensor:
        states = self.model(ids, layers=range(len(self.taps)), return_logits=False).hidden_states
        last = ids
        for layer, tap in enumerate(self.taps):
            last = tap(states[layer].flatten(0, 1) if self.flat else states[layer])
        return last


def torch_cka(a: nn.Module, b: nn.Module, names: list[str], loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    """torch-cka 0.21."""
    from torch_cka import CKA

    with torch.no_grad():
        cka = CKA(a, b, "a", "b", names, names, device="cpu")
        cka.compare(loader, loader)
    return cka.export()["CKA"]


def pytorch_cka(a: nn.Module, b: nn.Module, names: list[str], loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    """pytorch-cka 1.1.3."""
    from cka import compute_cka

    return compute_cka(a, b, loader, layers=names, device="cpu", progress=False)[0]


def ckatorch(a: nn.Module, b: nn.Module, names: list[str], loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    """ckatorch 1.0.3, one epoch in place of its ten."""
    from ckatorch import CKA

    return CKA(a, b, names, first_name="a", second_name="b")(loader, epochs=1)


PEERS: dict[str, Callable[..., Tensor]] = {
    "torch-cka 0.21": torch_cka,
    "pytorch-cka 1.1.3": pytorch_cka,
    "ckatorch 1.0.3": ckatorch,
}


def main() -> None:
    """Arguments: the tool's name, the stored file, the batch size."""
    name, path, batch_size = sys.argv[1:]
    # This folder's cka.py would hide the package of that name.
    sys.path.remove(str(Path(__file__).resolve().parent))
    stored = torch.load(path, weights_only=False)
    warnings.simplefilter("ignore")
    models = []
    for state in stored["states"]:
        model = GPT(stored["config"])
        model.load_state_dict(state)
        models.append(Tapped(model.requires_grad_(False), flat=not name.startswith("ckatorch")).eval())
    a, b = models
    names = [f"taps.{layer}" for layer in range(len(a.taps))]
    loader = DataLoader(TensorDataset(stored["ids"]), batch_size=int(batch_size))
    start = time.perf_counter()
    try:
        values = PEERS[name](a, b, names, loader)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}))
        return
    print(json.dumps({"seconds": time.perf_counter() - start, "map": values.tolist()}))


if __name__ == "__main__":
    main()
