"""Model configuration: one dataclass with LitGPT 0.5.13's field names, so `model_config.yaml` works in both programs.

- The fields that this model implements are few; every other LitGPT field must hold its neutral value, otherwise
  building the config fails and names it. Nothing is read and then ignored.
- `tie_embeddings` and `dense_layers` are ours. LitGPT refuses keys that it does not know, so these are kept in
  `provenance.yaml`.
- `from_hf` derives everything from a `config.json` (transformers 4 and 5 spell RoPE differently; both are read).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml

from litgpt.utils import UserError

HFFamily = Literal["qwen3", "qwen3_moe", "qwen2", "llama", "mistral", "mixtral"]

# LitGPT fields that describe other architectures, and the value that means "not used".
NEUTRAL: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "rotary_percentage": 1.0,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "bias": False,
    "gelu_approximate": "none",
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "routed_scaling_factor": 1.0,
    "scale_embeddings": False,
    "lm_head_bias": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
}

_SIZES = ("block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "n_head")
_DERIVED = ("padded_vocab_size", "n_query_groups", "head_size", "intermediate_size")  # 0 or None: see below
_REALS = ("norm_eps", "rope_base")
_MOE_ONLY = (
    *("n_expert", "n_expert_per_token", "moe_intermediate_size", "norm_topk_prob"),
    *("n_shared_expert", "first_k_dense_replace", "dense_layers"),
)
OURS = ("tie_embeddings", "dense_layers")
"""Fields that LitGPT does not know."""


@dataclass
class Config:
    """Shape and structure of a model. Field names, order and defaults are LitGPT's; the last two fields are ours.

    The defaults are LitGPT's too (a key missing from its yaml means its default), and they describe a GPT-NeoX, which
    this model is not. Start from `from_name(..., n_layer=2, ...)`, `from_file`, `from_checkpoint` or `from_hf`.

    Raises:
        UserError: a field that is not implemented differs from its neutral value, or the sizes contradict each other.
    """

    name: str = ""
    hf_config: dict[str, Any] = field(default_factory=dict)
    block_size: int = 4096
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512
    padded_vocab_size: int = 0  # 0 or None: vocab_size rounded up to padding_multiple
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_qk: bool = False
    norm_qk_type: str = "default"
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    n_head: int = 32
    head_size: int = 0  # 0 or None: n_embd / n_head
    n_query_groups: int = 0  # key/value heads; 0 or None: n_head
    attn_bias: bool = False
    attention_scores_scalar: int | None = None
    sliding_window_size: int | None = None
    sliding_window_indices: list[int] | None = None
    attention_logit_softcapping: float | None = None
    rope_base: float = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: int = 1
    rope_adjustments: dict[str, Any] | None = None
    rope_interleave: bool = False
    intermediate_size: int = 0  # of the dense MLP; in a MoE, of the experts too where moe_intermediate_size is None
    moe_intermediate_size: int | None = None
    bias: bool = True
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_shared_expert: int | None = None
    n_expert_groups: int | None = None
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None
    n_expert_per_token: int = 0
    first_k_dense_replace: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scale_embeddings: bool = False
    lm_head_bias: bool = False
    final_logit_softcapping: float | None = None
    norm_1: bool = True
    norm_2: bool = True
    latent_attention: dict[str, Any] | None = None
    rope_local_base_freq: float | None = None
    rope_indices: list[int] | None = None
    tie_embeddings: bool = False
    """lm_head and wte are one parameter. Never written to model_config.yaml."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers of a MoE that keep a dense MLP. LitGPT knows only the first k of them (`first_k_dense_replace`)."""

    def __post_init__(self) -> None:
        self.name = self.name or self.hf_config.get("name", "")
        for key, neutral in NEUTRAL.items():
            if (value := getattr(self, key)) != neutral:
                raise UserError(
                    f"config {self.name!r}: {key} is {value!r}, but only {neutral!r} is implemented here; "
                    "use a Llama-, Mistral-, Mixtral-, Qwen2- or Qwen3-like model"
                )
        for key in (*_SIZES, *_DERIVED, *_REALS):
            value = getattr(self, key)
            fits = isinstance(value, (int, float) if key in _REALS else int) and value > 0
            if not fits and (value or key not in _DERIVED):
                self._fail(f"{key} is {value!r}, expected a positive {'number' if key in _REALS else 'whole number'}")
        self._derive()
        self._check()

    def _derive(self) -> None:
        if not self.head_size:
            if self.n_embd % self.n_head:
                self._fail(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; set head_size")
            self.head_size = self.n_embd // self.n_head
        if not self.padded_vocab_size:
            self.padded_vocab_size = -(-self.vocab_size // self.padding_multiple) * self.padding_multiple
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        self.n_query_groups = self.n_query_groups or self.n_head
        if self.is_moe:
            self.intermediate_size = self.intermediate_size or 4 * self.n_embd
            # LitGPT's router renormalises whatever this says (its own Qwen3-MoE entries say False); so does ours.
            self.norm_topk_prob = True
            self.n_shared_expert = self.n_shared_expert or None
            self.dense_layers = sorted(self.dense_layers) or list(range(self.first_k_dense_replace or 0))
            prefix = self.dense_layers == list(range(len(self.dense_layers)))
            self.first_k_dense_replace = len(self.dense_layers) or None if prefix else None

    def _check(self) -> None:
        if not self.intermediate_size:
            self._fail("intermediate_size is missing")
        if self.n_head % self.n_query_groups:
            self._fail(f"n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}")
        if self.head_size % 2:
            self._fail(f"head_size {self.head_size} is odd; RoPE rotates pairs, so it must be even")
        if self.mlp_class_name not in ("LLaMAMLP", "LLaMAMoE"):
            self._fail(f"mlp_class_name is {self.mlp_class_name!r}, expected 'LLaMAMLP' or 'LLaMAMoE'")
        if self.is_moe and not 1 <= self.n_expert_per_token <= self.n_expert:
            self._fail(f"n_expert_per_token {self.n_expert_per_token} must be between 1 and n_expert {self.n_expert}")
        if self.is_moe and not set(self.dense_layers) < set(range(self.n_layer)):
            self._fail(
                f"dense_layers {self.dense_layers} must be layers of 0 ... {self.n_layer - 1}, but not all of them"
            )
        for key in () if self.is_moe else _MOE_ONLY:
            if getattr(self, key):
                self._fail(f"{key} is {getattr(self, key)}, but mlp_class_name is 'LLaMAMLP'; experts need 'LLaMAMoE'")

    def _fail(self, what: str) -> NoReturn:
        raise UserError(f"config {self.name!r}: {what}")

    @property
    def is_moe(self) -> bool:
        """Whether blocks hold a mixture of experts (all but `dense_layers`) rather than a dense MLP."""
        return self.mlp_class_name == "LLaMAMoE"

    @property
    def moe_layers(self) -> list[int]:
        """The layers with experts; none in a dense model."""
        return [layer for layer in range(self.n_layer) if self.is_moe and layer not in self.dense_layers]

    @property
    def expert_size(self) -> int:
        """Inner width F of one expert, or of the dense MLP."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def hf_family(self) -> HFFamily:
        """transformers' `model_type` with this structure. A Llama and a Mistral are equal but for the name.

        Raises:
            UserError: no family of transformers has this combination.
        """
        if self.n_shared_expert:
            self._fail(
                "no Hugging Face family with these attention layers has a shared expert without a gate of its own; "
                "such a model trains and runs here and in LitGPT"
            )
        if self.norm_qk and not self.attn_bias:
            return "qwen3_moe" if self.is_moe else "qwen3"
        if not self.norm_qk and self.is_moe and not self.attn_bias:
            if self.dense_layers:
                self._fail(f"Mixtral's format needs experts in all layers, and layers {self.dense_layers} are dense")
            return "mixtral"
        if not self.norm_qk and not self.is_moe:
            if self.attn_bias:
                return "qwen2"
            return "mistral" if "mistral" in self.name.lower() else "llama"
        raise UserError(
            f"config {self.name!r}: no Hugging Face family has norm_qk={self.norm_qk}, attn_bias={self.attn_bias} "
            f"and mlp_class_name={self.mlp_class_name!r} together"
        )

    @property
    def has_hf_family(self) -> bool:
        """Whether some family of transformers has this structure, so that the model can be exported."""
        try:
            return bool(self.hf_family)
        except UserError:
            return False

    @classmethod
    def from_name(cls, name: str, /, **overrides: Any) -> Config:
        """A known model by its name, with or without `Qwen/` in front.

        Raises:
            UserError: unknown name or unknown field.
        """
        entry = _ENTRIES.get(name.removeprefix("Qwen/"))
        if entry is None:
            raise UserError(
                f"unknown model {name!r}; known: {', '.join(_ENTRIES)}; for others use Config.from_hf(config.json)"
            )
        return cls._build(entry | overrides, f"model {name!r}")

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Config:
        """Read a `model_config.yaml` written here or by LitGPT.

        Raises:
            UserError: no such file, not a yaml mapping, unknown key, or a field that is not implemented.
        """
        path = Path(path)
        return cls._build(_read_mapping(path, yaml.safe_load) | overrides, str(path))

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path, **overrides: Any) -> Config:
        """Config of a lit dir: `model_config.yaml`, and `tie_embeddings` from `provenance.yaml` where there is one.

        Raises:
            UserError: the directory or its config is missing; the message says which command makes it.
        """
        folder = Path(checkpoint_dir)
        if not (folder / "model_config.yaml").is_file():
            what = "holds no model_config.yaml" if folder.is_dir() else "does not exist"
            first = "" if (folder / "config.json").is_file() else "download a model there (scripts/download.py), then "
            convert = f"python scripts/convert_hf_checkpoint.py --checkpoint_dir {folder}"
            raise UserError(f"{folder} {what}; {first}run: {convert}")
        provenance = folder / "provenance.yaml"
        if provenance.is_file():
            said = _read_mapping(provenance, yaml.safe_load)
            overrides = {key: said[key] for key in OURS if key in said} | overrides
        return cls.from_file(folder / "model_config.yaml", **overrides)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path, *, name: str | None = None, **overrides: Any) -> Config:
        """Derive the config from a Hugging Face `config.json` (as a mapping, a file or the directory around it).

        Args:
            source: Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen3-MoE; keys as transformers 4 or 5 writes them.
            name: model name; without it the directory's name, or else the `model_type`.
            overrides: LitGPT fields that win over what the file says, e.g. a `block_size` below a sliding window.

        Raises:
            UserError: the model needs something that is not implemented; the message names the field.
        """
        if isinstance(source, (str, Path)):
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            hf: Mapping[str, Any] = _read_mapping(path, json.loads)
            name = name or path.absolute().parent.name
        else:
            hf = source
        return cls._build(_lit_fields(hf, name, overrides), f"config.json of {name or 'the model'}")

    @classmethod
    def _build(cls, values: Mapping[str, Any], where: str) -> Config:
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise UserError(f"{where}: unknown config field {unknown[0]!r}; LitGPT 0.5.13's field names are expected")
        return cls(**values)

    def upcycled(
        self,
        n_expert: int,
        n_expert_per_token: int,
        *,
        granularity: int = 1,
        shared: bool = False,
        layers: Collection[int] | None = None,
    ) -> Config:
        """The mixture of experts that a dense model of this config becomes.

        One of Qwen2, or one with a shared expert, has no Hugging Face family (`hf_family` says so): it trains and runs
        here and in LitGPT only.

        Args:
            n_expert: experts E a layer, each as wide as the dense MLP.
            n_expert_per_token: experts K that a token goes through.
            granularity: G splits each expert into G finer ones: E·G of them, K·G a token, the same cost.
            shared: beside the routed experts, one that every token goes through.
            layers: those that get experts; `None`: all.

        Raises:
            UserError: this is a MoE already, fewer experts than experts per token, a width that G does not divide, or
                layers that do not exist.
        """
        if self.is_moe:
            self._fail(f"is a mixture of {self.n_expert} experts already; upcycling starts from a dense model")
        if not 1 <= n_expert_per_token <= n_expert:
            self._fail(f"n_expert_per_token {n_expert_per_token} must be between 1 and n_expert {n_expert}")
        if granularity < 1 or self.intermediate_size % granularity:
            self._fail(
                f"granularity {granularity} does not divide the FFN's width {self.intermediate_size} into equal parts"
            )
        chosen = set(range(self.n_layer) if layers is None else layers)
        if not chosen or not chosen <= set(range(self.n_layer)):
            self._fail(f"layers {sorted(chosen)}: expected one or more of 0 ... {self.n_layer - 1}")
        kind = (f"-G{granularity}" if granularity > 1 else "") + ("-shared" if shared else "")
        return replace(
            self,
            # LitGPT picks its exporter by the name, so the base model's name stays in front.
            name=f"{self.name}-MoE-{n_expert}x{n_expert_per_token}{kind}",
            hf_config={},
            mlp_class_name="LLaMAMoE",
            moe_intermediate_size=self.intermediate_size // granularity,
            n_expert=n_expert * granularity,
            n_expert_per_token=n_expert_per_token * granularity,
            n_shared_expert=1 if shared else None,
            dense_layers=[layer for layer in range(self.n_layer) if layer not in chosen],
            norm_topk_prob=True,
        )

    def to_lit_dict(self) -> dict[str, Any]:
        """The 51 keys of LitGPT's `model_config.yaml`, in its order."""
        return {key: value for key, value in asdict(self).items() if key not in OURS}

    def ours(self) -> dict[str, Any]:
        """The fields that LitGPT does not know, for `provenance.yaml`."""
        return {key: getattr(self, key) for key in OURS}

    def to_hf(self) -> dict[str, Any]:
        """A complete `config.json`, every default written out (readers of the file disagree about the defaults).

        Token ids (bos, eos, pad) and the dtype are not known to the config: whoever writes the file adds them.
        """
        family = self.hf_family
        values = {"architectures": [_ARCHITECTURES[family]], "model_type": family}
        values |= {hf_key: getattr(self, key) for key, hf_key in _HF_KEYS.items()}
        if self.is_moe:
            values |= {hf_keys[0]: getattr(self, key) for key, hf_keys in _HF_MOE_KEYS[family].items()}
        values |= _HF_WRITTEN["all"] | _HF_WRITTEN[family]
        return values | ({"mlp_only_layers": self.dense_layers} if family == "qwen3_moe" else {})


_ARCHITECTURES: dict[HFFamily, str] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

_HF_KEYS = {
    "padded_vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "head_size": "head_dim",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
# The first name is written; either is read (transformers 5 calls the experts of every family num_local_experts).
_HF_MOE_KEYS = {
    "qwen3_moe": {
        "n_expert": ("num_experts", "num_local_experts"),
        "n_expert_per_token": ("num_experts_per_tok",),
        "moe_intermediate_size": ("moe_intermediate_size",),
    },
    "mixtral": {
        "n_expert": ("num_local_experts", "num_experts"),
        "n_expert_per_token": ("num_experts_per_tok",),
        "expert_size": ("intermediate_size",),
    },
}

# HF fields of which one value is implemented; a model that needs another one is refused.
_HF_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "router_jitter_noise": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

# What transformers assumes where a config.json is silent.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "all": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768},
    "qwen3_moe": {"max_position_embeddings": 32768, "norm_topk_prob": False},
    "qwen2": {"max_position_embeddings": 32768},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
}

# What `to_hf` adds to the sizes.
_NO_WINDOW = {"sliding_window": None}
_NO_QWEN_WINDOW = _NO_WINDOW | {"use_sliding_window": False}
_HF_WRITTEN: dict[str, dict[str, Any]] = {
    "all": {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "use_cache": True,
    },
    "qwen3": {"attention_bias": False} | _NO_QWEN_WINDOW,
    "qwen3_moe": {
        "attention_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    | _NO_QWEN_WINDOW,
    "qwen2": _NO_QWEN_WINDOW,
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": _NO_WINDOW,
    "mixtral": {"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0} | _NO_WINDOW,
}


def _lit_fields(hf: Mapping[str, Any], name: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config.json into LitGPT fields, refusing what is not implemented."""
    family = hf.get("model_type")
    if family not in _ARCHITECTURES:
        raise UserError(f"config.json: model_type is {family!r}, expected one of {', '.join(_ARCHITECTURES)}")
    name = name or str(hf.get("_name_or_path") or family).rstrip("/").rsplit("/", 1)[-1]
    where = f"config.json of {name}"
    hf = _HF_DEFAULTS["all"] | _HF_DEFAULTS[family] | {k: v for k, v in hf.items() if v is not None or "window" in k}
    hf |= _rope(hf, where)
    for key, neutral in _HF_NEUTRAL.items():
        if hf.get(key, neutral) != neutral:
            raise UserError(f"{where}: {key} is {hf[key]!r}, but only {neutral!r} is implemented")

    def read(*keys: str) -> Any:
        for key in keys:
            if key in hf:
                return hf[key]
        raise UserError(f"{where}: {keys[0]} is missing")

    hf.setdefault("num_key_value_heads", read("num_attention_heads"))
    hf.setdefault("head_dim", read("hidden_size") // read("num_attention_heads"))
    values = _COMMON | {key: read(hf_key) for key, hf_key in _HF_KEYS.items()}
    values |= {"name": name, "hf_config": {"name": name}, "vocab_size": values["padded_vocab_size"]}
    values |= {"norm_qk": family in ("qwen3", "qwen3_moe"), "attn_bias": family == "qwen2"}
    if family in _HF_MOE_KEYS:
        values |= {key: read(*keys) for key, keys in _HF_MOE_KEYS[family].items() if key != "expert_size"}
        values["mlp_class_name"] = "LLaMAMoE"
        values["dense_layers"] = hf.get("mlp_only_layers") or []
    if (known := _ENTRIES.get(name)) and known["padded_vocab_size"] == values["padded_vocab_size"]:
        values["vocab_size"] = known["vocab_size"]  # how many ids are real is not in config.json
    values |= overrides

    window = _sliding_window(hf, family)
    if window is not None and window < values["block_size"]:
        raise UserError(
            f"{where}: sliding_window {window} is in use and not implemented; override block_size with {window} or "
            "less to use the model on texts that the window never cuts"
        )
    return values


def _rope(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `partial_rotary_factor`, wherever this version of transformers keeps them."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: RoPE scaling, rope_type {kind!r}, is not implemented, only 'default' is")
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    base = float(found.get("rope_theta", hf["rope_theta"]))
    return found | {"rope_theta": int(base) if base.is_integer() else base}


def _sliding_window(hf: Mapping[str, Any], family: str) -> int | None:
    """Width of the window that some layer really uses, or None."""
    if family == "llama":
        return None
    if family.startswith("qwen"):
        in_all_but = 0 if family == "qwen3_moe" else hf.get("max_window_layers", 28)
        if not hf.get("use_sliding_window", False) or in_all_but >= hf["num_hidden_layers"]:
            return None
        return hf.get("sliding_window", 4096)
    return hf.get("sliding_window")


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold a mapping of config fields, found {type(values).__name__}")
    return values


_COMMON: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}


class _Size(NamedTuple):
    n_layer: int
    n_embd: int
    n_head: int
    n_query_groups: int
    intermediate_size: int
    tie_embeddings: bool = False
    has_base: bool = True
    moe: tuple[int, int, int] | None = None  # expert width, experts, experts per token


# Source: LitGPT 0.5.13's entries, which agree with the models' config.json but for block_size: LitGPT gives the -Base
# models the 40960 of the chat models, their config.json says 32768.
_QWEN3 = {
    "0.6B": _Size(28, 1024, 16, 8, 3072, tie_embeddings=True),
    "1.7B": _Size(28, 2048, 16, 8, 6144, tie_embeddings=True),
    "4B": _Size(36, 2560, 32, 8, 9728, tie_embeddings=True),
    "8B": _Size(36, 4096, 32, 8, 12288),
    "14B": _Size(40, 5120, 40, 8, 17408),
    "32B": _Size(64, 5120, 64, 8, 25600, has_base=False),
    "30B-A3B": _Size(48, 2048, 32, 4, 6144, moe=(768, 128, 8)),
    "235B-A22B": _Size(94, 4096, 64, 4, 12288, has_base=False, moe=(1536, 128, 8)),
}


def _qwen3_entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for label, size in _QWEN3.items():
        entry = _COMMON | size._asdict()
        entry |= {"block_size": 40960, "vocab_size": 151643, "padded_vocab_size": 151936, "head_size": 128}
        entry |= {"norm_eps": 1e-6, "norm_qk": True, "rope_base": 1000000}
        has_base, moe = entry.pop("has_base"), entry.pop("moe")
        if moe:
            entry |= dict(zip(("moe_intermediate_size", "n_expert", "n_expert_per_token"), moe, strict=True))
            entry["mlp_class_name"] = "LLaMAMoE"
        for name in (f"Qwen3-{label}", f"Qwen3-{label}-Base")[: 1 + has_base]:
            entries[name] = entry | {"name": name, "hf_config": {"org": "Qwen", "name": name}}
    return entries


_ENTRIES = _qwen3_entries()
