"""ModernBertConfig: one frozen dataclass that reads every dialect of a ModernBERT `config.json`."""

import dataclasses
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modernbert.weights.remap import FLEXBERT_CONFIG

logger = logging.getLogger("modernbert")

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_pytorch_tanh", "gelu_new", "silu", "swish", "relu")
POOLINGS = ("cls", "mean")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PROBLEM_TYPES = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
# A configuration is data from strangers: these bounds stop a number of 10^9 before it takes memory.
INTEGER_BOUNDS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "max_position_embeddings": (1, 2**24),
    "local_attention": (0, 2**24),
    "global_attn_every_n_layers": (1, 1024),
    "num_labels": (1, 2**20),
}
POSITIVE = ("norm_eps", "global_rope_theta", "local_rope_theta", "initializer_cutoff_factor")
# Other values of these keys would change the arithmetic of the model: refused, never ignored.
MUST_BE: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, False),
    "causal_mask": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "parallel_attn": (None, False),
    "attention_layer": (None, "rope"),
    "bert_layer": (None, "prenorm"),
    "mlp_layer": (None, "glu"),
    "embedding_layer": (None, "sans_pos"),
    "normalization": (None, "layernorm", "low_precision_layernorm", "triton_layernorm"),
    "embed_norm": (None, True),
    "final_norm": (None, True),
    "skip_first_prenorm": (None, True),
    "rotary_emb_interleaved": (None, False),
    "rotary_emb_dim": (None,),
}
# Written by other programs for themselves; meaningless or unsafe (auto_map) in a file of ours.
NOT_KEPT = (
    "auto_map",
    "head_dim",
    "num_key_value_heads",
    "position_embedding_type",
    "reference_compile",
    "repad_logits_with_grad",
    "transformers_version",
)
FLEXBERT_TYPES = ("bert", "flex_bert")
# FlexBERT's keys that other programs write too, so that they prove nothing.
AMBIGUOUS = {"attention_probs_dropout_prob", "hidden_act", "sliding_window"}


@dataclass(frozen=True)
class ModernBertConfig:
    """Sizes and switches of a ModernBERT model, under Hugging Face's names.

    `local_attention` is the whole window: token i sees token j in a local layer if and only if
    |i - j| <= local_attention // 2. `layer_types` follows from `global_attn_every_n_layers`
    (layer l is global if l % n == 0) unless it is given. `extra` holds unknown but harmless keys
    of the file that was read, so that saving loses nothing.

    Raises `ValueError` for a value that this library cannot honour, with its name and value.
    Source: Warner et al. 2024, arXiv 2412.13663, and `transformers` 4.48 to 5.23.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    eos_token_id: int | list[int] | None = 50282
    bos_token_id: int | None = 50281
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] = ()
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    deterministic_flash_attn: bool = False
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = -100
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: Mapping[int, str] | None = None
    problem_type: str | None = None
    dtype: str | None = None
    architectures: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in INTEGER_BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected an integer in [{low}, {high}]")
        object.__setattr__(self, "layer_types", tuple(self.layer_types or self._pattern()))
        self._check_types()
        self._check_sizes()
        self._check_choices()

    def _pattern(self) -> tuple[str, ...]:
        n = self.global_attn_every_n_layers
        return tuple(SLIDING if i % n else FULL for i in range(self.num_hidden_layers))

    def _check_types(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{spec.name} is {value!r}; expected a number")
                if not 0 <= value <= sys.float_info.max:
                    raise ValueError(f"{spec.name} is {value!r}; expected a finite number >= 0")
                # transformers 5 refuses a 1 where it expects 1.0.
                object.__setattr__(self, spec.name, float(value))
            elif spec.type is bool and not isinstance(value, bool):
                raise ValueError(f"{spec.name} is {value!r}; expected true or false")
            elif spec.name.endswith("_token_id") and value is not None:
                ids = value if isinstance(value, list) and spec.name == "eos_token_id" else [value]
                if not all(type(i) is int and i >= 0 for i in ids):
                    raise ValueError(f"{spec.name} is {value!r}; expected an id >= 0 or null")
        if type(self.sparse_pred_ignore_index) is not int:
            raise ValueError(f"sparse_pred_ignore_index is {self.sparse_pred_ignore_index!r}")

    def _check_sizes(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head size {self.head_dim} (hidden_size {self.hidden_size} / "
                f"{self.num_attention_heads} heads) is odd; rotary embeddings need an even one"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id {self.pad_token_id} is outside vocab_size {self.vocab_size}; "
                "give the pad id of your tokenizer, or None"
            )
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ValueError(
                f"id2label names {len(self.id2label)} labels, num_labels is {self.num_labels}"
            )
        for name in POSITIVE:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number > 0")
        for name in ("attention", "embedding", "mlp", "classifier"):
            if getattr(self, f"{name}_dropout") >= 1:
                raise ValueError(f"{name}_dropout is {getattr(self, f'{name}_dropout')!r}, not < 1")

    def _check_choices(self) -> None:
        choices: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("hidden_activation", self.hidden_activation, ACTIVATIONS),
            ("classifier_activation", self.classifier_activation, ACTIVATIONS),
            ("classifier_pooling", self.classifier_pooling, POOLINGS),
            ("problem_type", self.problem_type, (None, *PROBLEM_TYPES)),
            ("dtype", self.dtype, (None, *DTYPES)),
        ]
        choices += [("layer_types", kind, (FULL, SLIDING)) for kind in self.layer_types]
        for name, value, allowed in choices:
            if value not in allowed:
                names = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{name} is {value!r}; this library implements {names}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sliding_window(self) -> int:
        """Tokens seen on each side in a local layer: local_attention // 2, both ends included."""
        return self.local_attention // 2

    @property
    def label2id(self) -> dict[str, int]:
        """Names of the labels to their ids, `LABEL_0`... where the file names none."""
        return {name: i for i, name in self._labels().items()}

    def _labels(self) -> dict[int, str]:
        if self.id2label is not None:
            return dict(self.id2label)
        return {i: f"LABEL_{i}" for i in range(self.num_labels)}

    def replace(self, **changes: Any) -> "ModernBertConfig":
        """A copy with other values; `layer_types` follows a changed depth if it was regular."""
        depth = {"num_hidden_layers", "global_attn_every_n_layers"} & changes.keys()
        if depth and "layer_types" not in changes and self.layer_types == self._pattern():
            changes["layer_types"] = ()
        if changes.get("id2label") is not None:
            changes.setdefault("num_labels", len(changes["id2label"]))
        elif changes.get("num_labels", self.num_labels) != self.num_labels:
            changes["id2label"] = None
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> "ModernBertConfig":
        """Read a parsed `config.json`: transformers v4 and v5, FlexBERT, and their aliases.

        `source` names the file in errors. Raises `ValueError` by key name and value.
        """
        try:
            config = cls(**_translate(dict(raw)))
            for name, own in (
                ("head_dim", config.head_dim),
                ("num_key_value_heads", config.num_attention_heads),
            ):
                if raw.get(name) not in (None, own):
                    raise ValueError(f"{name} is {raw[name]!r}; this library implements {own} only")
            return config
        except ValueError as error:
            raise ValueError(f"{source}: {str(error)[:500]}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that transformers 4.48, 4.57 and 5.x all read with the same meaning."""
        if self.layer_types != self._pattern():
            logger.warning(
                "layer_types is not 'every n-th layer global': transformers 4 ignores the list and "
                "would run this model with other layers; transformers 5 reads it correctly"
            )
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        labels, extra = self._labels(), own.pop("extra")
        for name in ("id2label", "num_labels", "problem_type", "dtype", "architectures"):
            own.pop(name)
        for name in ("hidden_activation", "classifier_activation"):
            if own[name] == "gelu_tanh":  # FlexBERT's name
                own[name] = "gelu_pytorch_tanh"
        own["layer_types"] = list(self.layer_types)
        own["rope_parameters"] = {
            FULL: {"rope_type": "default", "rope_theta": self.global_rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": self.local_rope_theta},
        }
        own["model_type"] = "modernbert"
        own["position_embedding_type"] = "absolute"  # transformers 4 looks for it; it has no effect
        if self.architectures:
            own["architectures"] = list(self.architectures)
        if self.id2label is not None or self.num_labels != 2:
            own["id2label"] = {str(i): name for i, name in labels.items()}
            own["label2id"] = {name: i for i, name in labels.items()}
        if self.problem_type is not None:
            own["problem_type"] = self.problem_type
        if self.dtype is not None:
            own["dtype"] = own["torch_dtype"] = self.dtype
        return {**extra, **own}


def _translate(raw: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `ModernBertConfig` for any dialect of `config.json`."""
    _flexbert(raw, raw.pop("model_type", None))
    for name, allowed in MUST_BE.items():
        value = raw.get(name)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise ValueError(f"{name} is {value!r}, which this library does not implement")
    _aliases(raw)
    _rope(raw)
    _labels(raw)
    fields = {spec.name: spec for spec in dataclasses.fields(ModernBertConfig)}
    known, extra = {}, {}
    for name, value in raw.items():
        if name in fields and name != "extra":
            # In a field that has no null, null means "the default".
            if value is not None or fields[name].default is None or name.endswith("_token_id"):
                known[name] = value
        elif not name.startswith("_") and name not in NOT_KEPT:
            extra[name] = value
    for name in ("layer_types", "architectures"):
        if name in known:
            if not isinstance(known[name], list | tuple):
                raise ValueError(f"{name} is {known[name]!r}; expected a list")
            known[name] = tuple(known[name])
    if known.get("layer_types") == ():
        raise ValueError("layer_types is an empty list")
    return {**known, "extra": extra}


def _flexbert(raw: dict[str, Any], model_type: object) -> None:
    """Rename FlexBERT's keys in place; its -1 sentinels get their meaning."""
    norm = raw.pop("norm_kwargs", None) or {}
    if not isinstance(norm, Mapping):
        raise ValueError(f"norm_kwargs is {norm!r}; expected an object")
    nested = {f"norm_kwargs.{name}": value for name, value in norm.items()}
    given = {name: raw.pop(name, nested.get(name)) for name in FLEXBERT_CONFIG}
    given = {name: value for name, value in given.items() if value is not None}
    certain = given.keys() - AMBIGUOUS
    if not (model_type in (None, "modernbert") or (model_type in FLEXBERT_TYPES and certain)):
        raise ValueError(
            f"model_type is {model_type!r}; this library loads 'modernbert' models only"
        )
    if model_type == "modernbert" and not certain and type(given.get("sliding_window")) is int:
        given["sliding_window"] *= 2  # transformers 5 means the reach to one side
    renamed = {FLEXBERT_CONFIG[name]: value for name, value in given.items()}
    raw.update({name: value for name, value in renamed.items() if raw.get(name) is None})
    depth = raw.get("num_hidden_layers")
    if certain and type(depth) is int and 0 < depth <= INTEGER_BOUNDS["num_hidden_layers"][1]:
        every = raw.get("global_attn_every_n_layers", 3)
        if raw.get("local_attention") == -1:  # no window anywhere
            raw["layer_types"] = [FULL] * depth
            raw.pop("local_attention")
        elif type(every) is int and every <= 0:
            raw["layer_types"] = [SLIDING] * depth
        if type(every) is int and every <= 0:
            raw.pop("global_attn_every_n_layers", None)


def _aliases(raw: dict[str, Any]) -> None:
    if raw.get("norm_eps") is None and raw.get("layer_norm_eps") is not None:
        raw["norm_eps"] = raw["layer_norm_eps"]
    raw.pop("layer_norm_eps", None)  # where both are present, norm_eps decides
    torch_dtype = raw.pop("torch_dtype", None)
    if raw.get("dtype") is None and torch_dtype is not None:
        raw["dtype"] = torch_dtype
    if isinstance(raw.get("dtype"), str):
        raw["dtype"] = raw["dtype"].removeprefix("torch.")
    if raw.get("initializer_cutoff_factor", 2.0) is None:
        raw["initializer_cutoff_factor"] = 3.0  # transformers 4's reading of null


def _rope(raw: dict[str, Any]) -> None:
    """Settle both thetas: rope_parameters, else *_rope_theta, else 160000 / 10000."""
    if raw.get("global_rope_theta") is None:
        raw["global_rope_theta"] = 160000.0
    if "local_rope_theta" in raw and raw["local_rope_theta"] in (None, -1):
        raw["local_rope_theta"] = raw["global_rope_theta"]
    parameters = raw.pop("rope_parameters", None) or {}
    scaling = raw.pop("rope_scaling", None) or {}  # transformers 5 merges it into both kinds
    if not isinstance(parameters, Mapping) or parameters.keys() - {FULL, SLIDING}:
        raise ValueError(f"rope_parameters is {parameters!r}; expected {FULL} and {SLIDING}")
    for kind, theta in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
        own = parameters.get(kind) or {}
        if not isinstance(own, Mapping) or not isinstance(scaling, Mapping):
            raise ValueError(f"RoPE settings of {kind} are {own!r}, {scaling!r}; expected objects")
        settings = {**own, **scaling}
        types = [settings.get(name, "default") for name in ("rope_type", "type")]
        if types != ["default"] * 2 or settings.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"RoPE settings of {kind} are {settings!r}; "
                "this library implements rope_type 'default' over the whole head only"
            )
        if settings.get("rope_theta") is not None:
            raw[theta] = settings["rope_theta"]


def _labels(raw: dict[str, Any]) -> None:
    labels = raw.get("id2label")
    raw.pop("label2id", None)
    if labels is None:
        return
    if not isinstance(labels, Mapping) or not labels:
        raise ValueError(f"id2label is {labels!r}; expected an object of id: name")
    try:
        raw["id2label"] = {int(i): str(name) for i, name in labels.items()}
    except (TypeError, ValueError):
        raise ValueError(f"id2label has a key that is not an integer: {list(labels)!r}") from None
    if sorted(raw["id2label"]) != list(range(len(labels))):
        raise ValueError(f"id2label keys are {sorted(raw['id2label'])}, not 0..{len(labels) - 1}")
    raw["num_labels"] = len(labels)
