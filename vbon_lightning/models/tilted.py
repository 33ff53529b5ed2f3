r"""A language model that another body tilts: log-probabilities of a frozen base plus what a tower says of each token.

    log pi(a | s)  =  log ref(a | s) + sum_j (log N / log 8)^j <h(s), q_j(a)>   (and the constant that normalises it)

Best-of-N's next-token distribution is the reference's times ``W_N(s a) / W_N(s)``: the tower has that factor to learn
and nothing else. It starts from a body that knows what the reward looks at, a value model's or a reward model's; at
N = 1, and before training at any N, the model is its base. One pass of each gives all next tokens.

An export carries this file, so that transformers alone can load it: it imports nothing else.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

SCALE = math.log(8.0)
"""log N at which every power of log N is 1."""


class TiltedConfig(PreTrainedConfig):
    """Configuration of a :class:`TiltedLM`.

    Args:
        base_config: The base's.
        tower_config: The tower's.
        n: The N of Best-of-N that the tilt is for, a real number >= 1; any other may be set at any time.
        degree: Degree of the polynomial in log N.
        calibration: Pairs of an N and the N that the polynomial is evaluated at to have its KL, both increasing and
            above 1; without them the two are the same.
    """

    model_type = "vbon_tilted_lm"
    sub_configs = {"base_config": AutoConfig, "tower_config": AutoConfig}

    def __init__(
        self,
        base_config: Any = None,
        tower_config: Any = None,
        n: float = 8.0,
        degree: int = 1,
        calibration: list[list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.calibration = calibration
        self.base_config, self.tower_config = _as_config(base_config), _as_config(tower_config)
        self.n, self.degree = n, degree
        parts = [config.get_text_config() for config in (self.base_config, self.tower_config) if config is not None]
        if parts:
            # What a cache is made by: the base's layers, then the tower's.
            kwargs |= {
                "vocab_size": parts[0].vocab_size,
                "hidden_size": sum(part.hidden_size for part in parts),
                "num_hidden_layers": sum(part.num_hidden_layers for part in parts),
                "layer_types": [kind for part in parts for kind in _layer_types(part)],
                "max_position_embeddings": min(getattr(part, "max_position_embeddings", 2**62) for part in parts),
            }
            windows = {window for part in parts if (window := _window(part)) is not None}
            if len(windows) > 1:
                raise ValueError(f"base and tower have sliding windows of different lengths: {sorted(windows)}")
            kwargs["sliding_window"] = next(iter(windows), None)
        super().__init__(**kwargs)


def _as_config(entries: Any) -> Any:
    if not isinstance(entries, dict):
        # A copy: a config that takes another in resets the attention that it chose.
        return copy.deepcopy(entries)
    values = dict(entries)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _layer_types(config: Any) -> list[str]:
    windowed = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [windowed] * config.num_hidden_layers


def _window(config: Any) -> int | None:
    return config.sliding_window if "sliding_attention" in _layer_types(config) else None


class _Part(Cache):
    """The layers of a cache that belong to one of the two models."""

    def __init__(self, whole: Cache, first: int, count: int) -> None:
        self.whole, self.first, self.count = whole, first, count
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> Any:  # type: ignore[override]
        return self.whole.layers[self.first : self.first + self.count]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.whole.update(key_states, value_states, layer_idx + self.first, *args, **kwargs)


class TiltedLM(PreTrainedModel, GenerationMixin):
    """A frozen causal language model and the tower that tilts its next-token distribution.

    Args:
        config: Its configuration.
        base: The causal language model; made from the config where it is missing.
        tower: A causal body that reads the same tokens; likewise.
    """

    config_class = TiltedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, config: TiltedConfig, base: PreTrainedModel | None = None, tower: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        self.base: Any = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        self.tower: Any = AutoModel.from_config(config.tower_config) if tower is None else tower
        self.heads = nn.ModuleList()
        self.add_heads(config.degree)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module in set(self.heads):
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def add_heads(self, degree: int) -> None:
        """Raise the degree of the polynomial in log N; what is new is zero.

        Args:
            degree: The degree, at least 1 and not below what it was.

        Raises:
            ValueError: If it is.
        """
        if degree < max(1, len(self.heads)):
            raise ValueError(f"the tilt's degree must be at least {max(1, len(self.heads))}, got {degree}")
        width, vocabulary = self.tower.config.get_text_config().hidden_size, self.config.vocab_size
        like = next(self.tower.parameters())
        for _ in range(degree - len(self.heads)):
            self.heads.append(nn.Linear(width, vocabulary, dtype=like.dtype, device=like.device))
            self._init_weights(self.heads[-1])
        self.config.degree = degree

    @property
    def n(self) -> float:
        """Return the N that the tilt is for."""
        return float(self.config.n)

    def turn(self, n: float) -> None:
        """Tilt for another N.

        Args:
            n: A real number; at 1 the model is its base.

        Raises:
            ValueError: If n is below 1 or not finite.
        """
        if not 1 <= n < math.inf:
            raise ValueError(f"a policy is dialled to a finite N >= 1, got {n}")
        self.config.n = float(n)

    def calibrate(self, pairs: list[list[float]] | None) -> None:
        """Say at which N the polynomial is to be evaluated for the N that is asked for.

        Between the pairs, and 1 which stays 1, it is linear in the logarithms; beyond them log N keeps its last factor.

        Args:
            pairs: ``[N, where]`` each, both increasing and above 1; None for N itself.

        Raises:
            ValueError: If they are not.
        """
        before = [1.0, 1.0]
        for pair in pairs or []:
            if len(pair) != 2 or not all(low < high < math.inf for low, high in zip(before, pair, strict=True)):
                raise ValueError(f"calibration is pairs of finite numbers above 1, both increasing, got {pairs}")
            before = pair
        self.config.calibration = [[float(n), float(where)] for n, where in pairs] if pairs else None

    @property
    def log_strength(self) -> float:
        """Return log N, or the logarithm of what calibration puts in its place."""
        x = math.log(self.n)
        left, log_left = 0.0, 0.0
        for n, where in self.config.calibration or []:
            right, log_right = math.log(n), math.log(where)
            if x <= right:
                return log_left + (log_right - log_left) * (x - left) / (right - left)
            left, log_left = right, log_right
        return x * log_left / left if left else x

    def tilt(self, states: Tensor) -> Tensor:
        """Return what is added to the base's logits, up to a constant a state.

        Args:
            states: ``[..., H]`` last hidden states of the tower.

        Returns:
            ``[..., V]``.
        """
        x = self.log_strength / SCALE
        powers = [x**power for power in range(1, len(self.heads) + 1)]
        heads: Any = self.heads
        weight, bias = powers[0] * heads[0].weight, powers[0] * heads[0].bias
        for power, head in zip(powers[1:], heads[1:], strict=True):
            weight, bias = weight + power * head.weight, bias + power * head.bias
        return nn.functional.linear(states, weight, bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> None:
        """Return None: no one layer makes the logits."""

    def body_and_head(self) -> tuple[Any, Any]:
        """Return what gives states and what makes logits of them, so that logits need not all live at once.

        Where the base does more to its logits than multiply, they are not the model's.
        """
        return self.body, JointHead(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[N, L, V]`` of the next tokens, the tilted ones, at temperature 1.

        Args:
            input_ids: ``[N, L]``.
            attention_mask: ``[N, past + L]``.
            position_ids: ``[N, L]``.
            past_key_values: A cache with the base's layers and the tower's behind them.
            use_cache: Whether to keep one.
            logits_to_keep: Logits of this many last positions, or of those given; 0 for all.
            **kwargs: Passed to both models.
        """
        shared = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        ours, theirs, past_key_values = self._caches(past_key_values, use_cache)
        output = self.base(**shared, **ours, logits_to_keep=logits_to_keep)
        states = self.tower(**shared, **theirs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=output.logits + self.tilt(states[:, kept]), past_key_values=past_key_values
        )

    def body(
        self, input_ids: Tensor, past_key_values: Cache | None = None, use_cache: bool = False, **kwargs: Any
    ) -> Any:
        """Return the last hidden states of base and tower side by side: ``last_hidden_state [N, L, H + H']``."""
        ours, theirs, past_key_values = self._caches(past_key_values, use_cache)
        base = self.base.base_model(input_ids=input_ids, **ours, **kwargs).last_hidden_state
        tower = self.tower(input_ids=input_ids, **theirs, **kwargs).last_hidden_state
        return BaseModelOutputWithPast(
            last_hidden_state=torch.cat([base, tower], dim=-1), past_key_values=past_key_values
        )

    def _caches(
        self, cache: Cache | None, use_cache: bool | None
    ) -> tuple[dict[str, Any], dict[str, Any], Cache | None]:
        """Return each model's arguments about the cache, and the cache."""
        if cache is None and not use_cache:
            return {"use_cache": False}, {"use_cache": False}, None
        cache = DynamicCache(config=self.config) if cache is None else cache
        count = self.base.config.get_text_config().num_hidden_layers
        rest = self.config.num_hidden_layers - count
        parts = _Part(cache, 0, count), _Part(cache, count, rest)
        first, second = ({"past_key_values": part, "use_cache": True} for part in parts)
        return first, second, cache


def new_tilted_lm(base: PreTrainedModel, tower: PreTrainedModel) -> TiltedLM:
    """Put a tower beside a model; it tilts nothing yet.

    Args:
        base: A causal language model.
        tower: A causal body that reads the same tokens.
    """
    config = TiltedConfig(base_config=base.config, tower_config=tower.config)
    for part in (config.base_config, config.tower_config):
        part._name_or_path = ""  # it would be saved: where it came from is no part of what it is
    model = TiltedLM(config, base, tower)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(base.config.get_text_config(), name, None))
    if base.generation_config is not None:
        model.generation_config = base.generation_config
    return model


class JointHead:
    """Make the logits of the states of base and tower, side by side.

    Args:
        model: Whose they are.
    """

    def __init__(self, model: TiltedLM) -> None:
        self.model = model
        self.base: Any = model.base.get_output_embeddings()
        self.split = model.base.config.get_text_config().hidden_size
        self.in_features, self.out_features = model.config.hidden_size, model.config.vocab_size

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits ``[..., V]`` of states ``[..., H + H']``."""
        logits: Tensor = self.base(states[..., : self.split]) + self.model.tilt(states[..., self.split :])
        return logits


AutoConfig.register(TiltedConfig.model_type, TiltedConfig)
AutoModelForCausalLM.register(TiltedConfig, TiltedLM)
TiltedConfig.register_for_auto_class()
TiltedLM.register_for_auto_class("AutoModelForCausalLM")
