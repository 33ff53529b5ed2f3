"""Exports in other people's programs: as the policy of TRL's trainers, and the files that serving engines read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.callbacks.replay import make_trainer
from tests.callbacks.tiny import Tiny
from tests.models.setting import make_valued_files
from vbon_lightning.adapters import add_lora
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.models import load_causal_lm, load_tokenizer, save_pretrained

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", params=["plain", "lora", "tilted"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a policy of each kind, with a chat template."""
    place: Path = tmp_path_factory.mktemp(request.param)
    out = place / "export"
    module = Tiny()
    module.tokenizer.chat_template = TEMPLATE
    if request.param == "lora":
        pytest.importorskip("peft")
        add_lora(module.policy, {"r": 2})
        for name, parameter in module.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    if request.param == "tilted":
        files = make_valued_files(place / "files")
        module.policy = load_causal_lm({"name": str(files / "llama"), "tilt": str(files / "value")}, trainable=True)
        module.policy.add_heads(2)
        module.tokenizer = load_tokenizer(str(files / "llama"))
        module.tokenizer.chat_template = TEMPLATE
        save_pretrained(module.policy, module.tokenizer, out, generation=module.generation_settings())
    else:
        make_trainer(place, PolicyExport(str(out)), max_steps=1).fit(module)
    return out


def is_tilted(export: Path) -> bool:
    return export.parent.name.startswith("tilted")


def train(trl: Any, name: str, export: Path, directory: Path, data: dict[str, Any], **arguments: Any) -> Any:
    """Train an export by one step of one of TRL's trainers, which loads it by itself, and return what changed."""
    from datasets import Dataset

    reward = {"reward_funcs": arguments.pop("reward")} if "reward" in arguments else {}
    options = getattr(trl, f"{name}Config")(
        output_dir=str(directory),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"} | ({"trust_remote_code": True} if is_tilted(export) else {}),
        **arguments,
    )
    made = getattr(trl, f"{name}Trainer")(
        model=str(export), args=options, train_dataset=Dataset.from_dict(data), **reward
    )
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made.train()
    return [name for name, value in made.model.named_parameters() if not torch.equal(value, before[name])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RLOO", "SFT"])
def test_it_is_the_policy_of_a_trl_trainer(name: str, export: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(set(completion[0]["content"]))) + len(seen) for completion in completions]

    asked = [[{"role": "user", "content": f"Hello {letter}"}] for letter in "ab"]
    told = [[*talk, {"role": "assistant", "content": "head"}] for talk in asked]
    options: dict[str, Any] = {"data": {"messages": told}}
    if name == "RLOO":
        options = {"data": {"prompt": asked}, "num_generations": 4, "max_completion_length": 5, "reward": reward}
    if is_tilted(export):  # docs/models.md: its distribution is not that of one output head
        with pytest.raises(AttributeError, match="last_hidden_state"):
            train(trl, name, export, tmp_path, **options)
        return
    assert train(trl, name, export, tmp_path, **options)
    assert len(seen) == (4 if name == "RLOO" else 0)
    assert all(prompt in asked and completion[0]["role"] == "assistant" for prompt, completion in seen)


def test_it_has_the_files_that_serving_engines_read(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    kind = "TiltedLM" if is_tilted(export) else "LlamaForCausalLM"
    assert config["architectures"] == [kind]
    assert [path.name for path in export.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(export.glob("*.bin"))
    generation = json.loads((export / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"], generation["max_new_tokens"]) == (True, 0.7, 9)
    assert (export / "tokenizer.json").is_file()
    assert (export / "chat_template.jinja").read_text() == TEMPLATE
    talk = [{"role": "user", "content": "Hi"}]
    text = AutoTokenizer.from_pretrained(export).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<user>Hi</s><assistant>"


def test_the_adapters_alone_give_the_merged_model(export: Path) -> None:
    if not export.parent.name.startswith("lora"):
        assert not (export / "adapter").exists()
        return
    from peft import PeftModel

    base = Tiny().policy.eval()
    tokens = torch.arange(3, 13)[None]
    merged = AutoModelForCausalLM.from_pretrained(export).eval()
    adapted = PeftModel.from_pretrained(base, str(export / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-5)
        assert not torch.allclose(Tiny().policy.eval()(tokens).logits, merged(tokens).logits, atol=1e-3)
