"""Distributional value models: a causal body and a head that says in which bin the reward of a response will lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from vbon_lightning.functional import RewardBins, forecast_log_probs
from vbon_lightning.functional.reward_bins import HEAD_EXTRA
from vbon_lightning.models.errors import ModelError, cannot_load
from vbon_lightning.models.files import check_directory, locate
from vbon_lightning.models.loading import (
    check_body,
    check_causal,
    check_finite,
    check_no_missing_weights,
    checkpoint_arguments,
    disable_dropout,
    new_model,
    new_weights,
    pretrained_model,
)
from vbon_lightning.models.spec import ModelSpec, as_spec, parse_dtype, refuse_policy_fields


class ValueModelConfig(PreTrainedConfig):
    """Configuration of a :class:`ValueModel`.

    Args:
        text_config: The body's.
        edges: K - 1 inner edges of the bins.
        atoms: K lists of Q quantiles of the reward within each bin.
        longest: Response tokens that the head tells apart.
        table: What the rewards are of: the fingerprint of the reference table, and the missing-EOS penalty that was
            subtracted from its rewards.
    """

    model_type = "vbon_value_model"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        edges: list[float] | None = None,
        atoms: list[list[float]] | None = None,
        longest: int = 0,
        table: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            entries = dict(text_config)
            text_config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        self.text_config = text_config
        self.edges = [0.0] if edges is None else edges
        self.atoms = [[0.0], [1.0]] if atoms is None else atoms
        self.longest, self.table = longest, {} if table is None else table
        super().__init__(**kwargs)


class ValueModel(PreTrainedModel):
    """Predict the distribution of the final reward after a prompt and each prefix of a response.

    The head is linear in the body's last hidden states, plus a bias for how many tokens the response has: a body cannot
    see where the prompt ends, and how much is still to come decides how much is still open.

    Args:
        config: Its configuration.
    """

    config_class = ValueModelConfig
    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ValueModelConfig, body: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.body: PreTrainedModel = AutoModel.from_config(config.text_config) if body is None else body
        outputs = len(config.atoms) + HEAD_EXTRA
        self.head = nn.Linear(config.text_config.hidden_size, outputs)
        # Of each length: a bias of every output, and the logarithm of the location's gain.
        self.progress = nn.Embedding(config.longest + 1, outputs + 1)
        self._bins: RewardBins | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        elif module is self.progress:
            nn.init.zeros_(self.progress.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Return the body's."""
        embeddings: nn.Module = self.body.get_input_embeddings()
        return embeddings

    @property
    def bins(self) -> RewardBins:
        """Return the bins, on the model's device."""
        device = self.head.weight.device
        if self._bins is None or self._bins.edges.device != device:
            self._bins = RewardBins(
                torch.tensor(self.config.edges, dtype=torch.float64, device=device),
                torch.tensor(self.config.atoms, dtype=torch.float64, device=device),
            )
        return self._bins

    def forecast(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Turn hidden states into log-probabilities of the bins.

        Args:
            states: ``[..., H]`` last hidden states.
            lengths: ``[...]`` long, broadcast against them: how many tokens of the response each state has seen.

        Returns:
            ``[..., K]`` float32, normalised.
        """
        biases = self.progress(lengths.clamp(max=self.progress.num_embeddings - 1)).float()
        # In float32 whatever the body is: a location and its scale leave half precision behind.
        outputs = nn.functional.linear(states.float(), self.head.weight.float(), self.head.bias.float())
        place = outputs.shape[-1] - HEAD_EXTRA
        location = outputs[..., place : place + 1] * biases[..., -1:].exp()
        outputs = torch.cat([outputs[..., :place], location, outputs[..., place + 1 :]], dim=-1) + biases[..., :-1]
        return forecast_log_probs(outputs, self.bins)

    def forward(self, input_ids: Tensor, lengths: Tensor, **kwargs: Any) -> Tensor:
        """Return the bins' log-probabilities after each token, ``[N, L, K]``.

        Args:
            input_ids: ``[N, L]``.
            lengths: ``[N, L]``: how many tokens of the response there are up to each; 0 within the prompt.
            **kwargs: Passed to the body.
        """
        return self.forecast(self.body(input_ids=input_ids, **kwargs).last_hidden_state, lengths)


AutoConfig.register(ValueModelConfig.model_type, ValueModelConfig)
AutoModel.register(ValueModelConfig, ValueModel)


def new_value_model(
    spec: str | Mapping[str, Any] | ModelSpec,
    bins: RewardBins,
    *,
    longest: int,
    fingerprint: Mapping[str, Any],
    seed: int = 0,
    dropout: bool = False,
) -> ValueModel:
    """Put a new head for K bins on a model's body, to be trained.

    Args:
        spec: A language model, a reward model or a value model whose body to start from.
        bins: The bins.
        longest: Tokens of the longest response.
        fingerprint: What the rewards are of, in plain values: the config's ``table``.
        seed: Seed of a new body; the global random state is left as it was.
        dropout: Keep the dropout that the model's config asks for.

    Returns:
        A model in training mode whose head says the same of every prefix.

    Raises:
        ModelError: If the model cannot be found or loaded, or lacks weights of its body.
    """
    spec = as_spec(spec)
    refuse_policy_fields(spec, "a value model")
    with new_weights(seed):
        body = load_body(spec, seed)
        attention = body.config._attn_implementation  # a config that takes it in resets it
        config = ValueModelConfig(
            text_config=body.config,
            edges=bins.edges.tolist(),
            atoms=bins.atoms.tolist(),
            longest=longest,
            table=dict(fingerprint),
        )
        model = ValueModel(config, body)
    body.config._attn_implementation = attention
    body.config._name_or_path = ""  # it would be saved: where the body came from is no part of what it is
    nn.Module.to(model, dtype=next(body.parameters()).dtype)
    if not dropout:
        disable_dropout(model)
    if spec.gradient_checkpointing:
        model.body.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train().requires_grad_(True)


def load_body(spec: ModelSpec, seed: int = 0) -> PreTrainedModel:
    """Load the body of a language model, a reward model or a value model, or make one from a config.

    Raises:
        ModelError: If the model cannot be found or loaded, lacks weights of its body, or reads ahead.
    """
    if spec.config is not None:
        body = new_model(AutoModel, "model", spec, seed=seed)
    elif is_value_model(spec):
        body = _trained(spec).body
    else:
        body, info = pretrained_model(AutoModel, spec)
        check_body(spec, body, info)
    check_causal(spec, body)
    return body


def load_value_model(spec: str | Mapping[str, Any] | ModelSpec) -> ValueModel:
    """Load a trained value model, frozen.

    Args:
        spec: What ``vbon fit`` with ``ValueModelling`` exported.

    Returns:
        A model in evaluation mode whose parameters require no gradient.

    Raises:
        ModelError: If there is no such model, or it is none of the reward to come.
    """
    model = _trained(as_spec(spec))
    disable_dropout(model)
    frozen: ValueModel = model.eval().requires_grad_(False)
    return frozen


def _trained(spec: ModelSpec) -> ValueModel:
    """Load a trained value model as it was saved, with the dropout that its config asks for."""
    refuse_policy_fields(spec, "a value model")
    if spec.name is None:
        raise ModelError("a value model is trained first: give its directory as `name`")
    name, _ = locate("name", spec.name)
    if os.path.isdir(name):
        check_directory(name, None)
    if not is_value_model(spec):
        raise ModelError(
            f"{name!r} is no value model (one of the reward to come): train one with `ValueModelling` and give its "
            "export"
        )
    arguments = checkpoint_arguments(spec, None)
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    try:
        loading: Any = ValueModel.from_pretrained
        model, info = loading(name, dtype=parse_dtype(spec.dtype), output_loading_info=True, **arguments)
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise cannot_load("value model", "name", name, error) from error
    check_no_missing_weights(name, info)
    check_finite(name, model)
    trained: ValueModel = model
    return trained


def is_value_model(spec: ModelSpec) -> bool:
    """Return whether a checkpoint's config says that it is a value model."""
    if spec.name is None or spec.gguf_file is not None:
        return False
    name, _ = locate("name", spec.name)
    try:
        config = AutoConfig.from_pretrained(name, **checkpoint_arguments(spec, None))
    except Exception as error:  # transformers raises many types here; every one means the same to a user
        raise cannot_load("config", "name", name, error) from error
    return isinstance(config, ValueModelConfig)
