"""A policy of low-rank adapters on the reference: equal to two separate models, at the memory of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.actors.test_loaded import Lengths
from tests.helpers import save_tiny_model
from tests.modules.setting import ALPHABET, make_data, make_files, make_module, make_trainer, weights
from vbon_lightning import TextSource
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.adapters import adapters_active, adapters_off, merged_copy, merged_parameters
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.models import ModelError, ModelSpec, load_causal_lm, model_identity

LORA = {"r": 2, "lora_alpha": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(params=["llama", "gpt2"])
def base(request: Any, files: Path) -> str:
    return str(files / request.param)


def scramble(actors: Actors) -> None:
    """Give the adapters weights, as training would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in actors.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def prompts_of(files: Path, base: str) -> Any:
    data = make_data(files, policy=base)
    data.setup("fit")
    return next(iter(data.split_dataloader("val")))


def test_equals_two_separate_models(files: Path, base: str, tmp_path: Path) -> None:
    def spec(policy: Any, reference: str | None) -> ActorSpec:
        return ActorSpec(policy, reference, reward=Lengths(), max_new_tokens=5, temperature=0.8)

    shared = Actors.load(spec(ModelSpec(base, lora=LORA), None))
    assert shared.shares_base
    assert shared.reference is None, "no second copy"
    scramble(shared)
    merged_copy(shared.policy).save_pretrained(tmp_path / "merged")
    shared.tokenizer.save_pretrained(tmp_path / "merged")
    apart = Actors.load(spec(str(tmp_path / "merged"), base))
    prompts = prompts_of(files, base)
    draw: dict[str, Any] = {"num_samples": 4, "seed": 1, "stream": "train", "step": 0, "reference_samples": 6}
    one, other = (actors.rollout(prompts, **draw) for actors in (shared, apart))
    assert torch.equal(one.completions.tokens, other.completions.tokens)
    assert torch.equal(one.reference_rewards, other.reference_rewards)
    assert one.token_kl.sum() > 0.1, "otherwise the adapters do nothing"
    assert torch.equal(shared.policy_log_probs(one), one.log_probs)
    for name in ("log_probs", "reference_log_probs", "token_kl"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5), name
    live, _ = shared.statistics(one)
    (live.log_probs.sum() + live.token_kl.sum()).backward()
    for name, parameter in shared.policy.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name), name


def test_new_adapters_change_nothing(files: Path, base: str) -> None:
    actors = Actors.load(ActorSpec(ModelSpec(base, lora=LORA), max_new_tokens=5))
    rollout = Lengths(), prompts_of(files, base)
    actors.reward = rollout[0]
    found = actors.rollout(rollout[1], num_samples=4, seed=1, stream="train", step=0)
    assert found.token_kl.abs().max() < 1e-6


def test_the_adapters_are_off_for_the_reference_only(base: str) -> None:
    model = load_causal_lm(ModelSpec(base, lora=LORA), trainable=True)
    plain = load_causal_lm(base, trainable=False)
    actors = Actors.load(ActorSpec(ModelSpec(base, lora=LORA)))
    actors.policy = model
    scramble(actors)
    tokens = torch.tensor([[3, 4, 5]])
    before = model(tokens).logits
    with adapters_off(model) as off:
        assert torch.allclose(off(tokens).logits, plain(tokens).logits, atol=1e-6)
    assert torch.equal(model(tokens).logits, before)
    assert not torch.allclose(before, plain(tokens).logits, atol=1e-3)


def test_merged_parameters_are_those_of_the_merged_model(base: str) -> None:
    actors = Actors.load(ActorSpec(ModelSpec(base, lora=LORA)))
    scramble(actors)
    plain = load_causal_lm(base, trainable=False)
    assert adapters_active(actors.policy)
    assert not adapters_active(plain)

    def check(found: Any, expected: torch.nn.Module) -> None:
        named, given = dict(expected.named_parameters()), dict(found)
        assert given.keys() == named.keys()
        for name, value in given.items():
            assert torch.allclose(value, named[name], atol=1e-6), name
            assert not value.requires_grad

    check(merged_parameters(actors.policy), merged_copy(actors.policy))
    with adapters_off(actors.policy):
        assert not adapters_active(actors.policy)
        check(merged_parameters(actors.policy), plain)
    check(merged_parameters(plain), plain)


def test_another_reference_is_a_model_of_its_own(files: Path, tmp_path: Path) -> None:
    load_causal_lm(str(files / "llama"), trainable=False).save_pretrained(tmp_path / "copy")
    data = make_data(files)
    data.tokenizer.save_pretrained(tmp_path / "copy")
    actors = Actors.load(ActorSpec(ModelSpec(str(files / "llama"), lora=LORA), str(tmp_path / "copy")))
    assert not actors.shares_base
    assert actors.reference is not None


@pytest.mark.parametrize("kind", ["vbon", "ppo", "sft"])
def test_only_the_adapters_are_trained_and_kept(kind: str, files: Path, tmp_path: Path) -> None:
    policy = ModelSpec(str(files / "llama"), lora=LORA)
    changes = {"train": make_text(files)} if kind == "sft" else {}

    def module() -> Any:
        data = make_data(files, policy=policy, **changes)
        return make_module(kind, data), data

    whole, data = module()
    make_trainer(tmp_path / "whole", PolicyExport(str(tmp_path / "export")), steps=4).fit(whole, data)
    checkpoint = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    assert all("lora" in key or key.startswith("critic") for key in checkpoint["state_dict"])
    assert any("lora" in key for key in checkpoint["state_dict"])

    half, data = module()
    make_trainer(tmp_path / "half", steps=2).fit(half, data)
    rest, data = module()
    make_trainer(tmp_path / "half", steps=4).fit(rest, data, ckpt_path=str(tmp_path / "half" / "last.ckpt"))
    expected = weights(whole)
    for name, value in weights(rest).items():
        assert torch.equal(value, expected[name]), name
    start = load_causal_lm(str(files / "llama"), trainable=False)
    assert any(value.any() for name, value in weights(whole).items() if "lora_B" in name), "training moves the adapters"
    with adapters_off(whole.policy) as off:
        tokens = torch.tensor([[3, 4, 5]])
        assert torch.allclose(off(tokens).logits, start(tokens).logits, atol=1e-6), "and nothing else"

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.allclose(exported(tokens).logits, whole.policy(tokens).logits, atol=1e-5)
    with safe_open(tmp_path / "export" / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert all("lora" in key for key in adapter.keys())  # noqa: SIM118


def make_text(files: Path) -> Any:
    return TextSource(path=str(files / "texts.txt"))


def test_a_checkpoint_of_other_adapters_is_refused(files: Path, tmp_path: Path) -> None:
    def fit(lora: dict[str, Any], **resume: Any) -> None:
        data = make_data(files, policy=ModelSpec(str(files / "llama"), lora=lora))
        make_trainer(tmp_path, steps=2 if not resume else 4).fit(make_module("klrl", data), data, **resume)

    fit(LORA)
    with pytest.raises(ValueError, match="lora"):
        fit(LORA | {"lora_alpha": 16}, ckpt_path=str(tmp_path / "last.ckpt"))


def test_the_identity_of_the_reference_knows_no_adapters(files: Path) -> None:
    plain, adapted = str(files / "llama"), ModelSpec(str(files / "llama"), lora=LORA, gradient_checkpointing=True)
    assert model_identity(ActorSpec(adapted).reference_spec) == model_identity(plain)
    assert model_identity(adapted) != model_identity(plain)
    assert model_identity(adapted.base()) == model_identity(plain)


def test_bad_entries_are_told(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="`lora` is refused by peft.*rank"):
        load_causal_lm(ModelSpec(str(files / "llama"), lora={"rank": 4}), trainable=True)
    with pytest.raises(ModelError, match="`lora` is refused by peft.*nowhere"):
        load_causal_lm(ModelSpec(str(files / "llama"), lora={"target_modules": ["nowhere"]}), trainable=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"`lora` needs peft: pip install 'vbon_lightning\[lora\]'"):
        load_causal_lm(ModelSpec(str(files / "llama"), lora=LORA), trainable=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_gradient_checkpointing_trains_the_same(lora: Any, files: Path, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = ModelSpec(str(files / "gpt2"), lora=lora, gradient_checkpointing=checkpointing)
        data = make_data(files, policy=policy)
        module = make_module("vbon", data, optimizer=sgd)
        make_trainer(tmp_path / str(checkpointing), steps=3).fit(module, data)
        recomputes = [getattr(part, "gradient_checkpointing", False) for part in module.policy.modules()]
        assert any(recomputes) == checkpointing
        found.append(weights(module))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=2e-5), name


def test_the_ratio_is_one_also_with_gradient_checkpointing(files: Path) -> None:
    data = make_data(files, policy=ModelSpec(str(files / "llama"), gradient_checkpointing=True))
    data.setup("fit")
    module = make_module("clipped", data)
    module.configure_model()
    module.train()
    rollout = module._sample(next(iter(data.split_dataloader("train"))), 0)
    module._experience = module._collect(rollout)
    _, _, logs = module._minibatch_update(module._next_minibatch(0, 0))
    assert float(logs["ratio"]) == 1.0


@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "export first"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_lightnings_weight_averaging(first: bool, lora: Any, files: Path, tmp_path: Path) -> None:
    data = make_data(files, policy=ModelSpec(str(files / "llama"), lora=lora))
    module = make_module("klrl", data)
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(weights(pl_module))

    callbacks = [EMAWeightAveraging(decay=0.5), PolicyExport(str(tmp_path / "export"))]
    make_trainer(tmp_path / "run", Keep(), *(callbacks if first else callbacks[::-1]), steps=3).fit(module, data)
    expected = seen[0]
    for later in seen[1:]:
        expected = {name: 0.5 * value + 0.5 * later[name] for name, value in expected.items()}
    for name, value in weights(module).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.allclose(exported(tokens).logits, module.policy(tokens).logits, atol=1e-5)


TIED = {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}


@pytest.mark.parametrize("lora", TIED, ids=str)
def test_adapters_on_tied_embeddings_are_refused_before_training(lora: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tied", alphabet=ALPHABET, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"`lora` trains \S*(embed_tokens|lm_head).*tie_word_embeddings: false"):
        load_causal_lm(ModelSpec(model, lora=LORA | lora), trainable=True)


def test_adapters_that_would_change_the_reference_are_refused(files: Path) -> None:
    with pytest.raises(ModelError, match="`lora` has bias 'all'"):
        load_causal_lm(ModelSpec(str(files / "gpt2"), lora=LORA | {"bias": "all"}), trainable=True)
    with pytest.raises(ModelError, match="`lora` trains parts of model.embed_tokens"):
        load_causal_lm(ModelSpec(str(files / "llama"), lora=LORA | {"trainable_token_indices": [3]}), trainable=True)


@pytest.mark.parametrize("lora", TIED, ids=str)
def test_whole_layers_beside_adapters_are_exported_as_they_are(
    lora: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    spec = ModelSpec(str(files / "llama"), lora=LORA | lora)  # its embeddings are two matrices
    data = make_data(files, policy=spec)
    module = make_module("klrl", data)
    export = PolicyExport(str(tmp_path / "export"))
    make_trainer(tmp_path, export, steps=3).fit(module, data)
    tokens = torch.tensor([[1, 4, 5, 6, 7]])
    exported = load_causal_lm(str(tmp_path / "export"), trainable=False)
    base = load_causal_lm(str(files / "llama"), trainable=False)
    policy = module.policy.eval()
    with torch.no_grad():
        live, merged = policy(tokens).logits, dict(merged_parameters(policy))
        torch.testing.assert_close(exported(tokens).logits, live)
        assert (live - base(tokens).logits).abs().max() > 1e-3
        named = (lora.get("modules_to_save") or lora["target_modules"])[0]
        learnt = {name: weight for name, weight in exported.named_parameters() if named in name}
        assert all((weight - base.get_parameter(name)).abs().max() > 1e-3 for name, weight in learnt.items()) and learnt
        for name, weight in exported.named_parameters():
            torch.testing.assert_close(merged.pop(name), weight)
        assert not merged
        with module.loaded.as_reference() as reference:
            torch.testing.assert_close(reference(tokens).logits, base(tokens).logits)
