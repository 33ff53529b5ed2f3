"""Try families of language models on the whole chain, each small and fresh from a config: docs/models.md.

python -m experiments.families.families            # all of them, ten minutes on a CPU core
python -m experiments.families.families gpt2 rwkv  # some, printed only

Each model is made with weights large enough to matter, samples and scores responses, takes two steps of vBoN, fills a
reference table, is exported, and is compared with Best-of-N. Its log-probabilities, as they are scored and as they were
sampled, are held against a plain forward pass over each text by itself: no padding, no cache, no positions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from tqdm.auto import tqdm

from tests.helpers import tiny_tokenizer
from tests.modules.setting import ALPHABET, VowelReward
from vbon_lightning import AlignmentDataModule, ReferenceSampler, TextSource, VBoN
from vbon_lightning._markdown import markdown_table
from vbon_lightning.actors import Actors
from vbon_lightning.callbacks import PolicyExport
from vbon_lightning.evaluation.command import compare
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.sampling.plain import runs_plain

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {
    **EXPERTS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "gpt_neox": {},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "falcon": {"alibi": False, "new_decoder_architecture": True},
    "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {**EXPERTS, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "decoder_sparse_step": 1},
    "qwen3_next": {**EXPERTS, **LINEAR, "head_dim": 16, "shared_expert_intermediate_size": 32},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "granite": {},
    "granitemoe": EXPERTS,
    "smollm3": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_oss": {**EXPERTS, "head_dim": 8, "sliding_window": 8},
    "nemotron": {},
    "persimmon": {},
    "helium": {"head_dim": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "jamba": {**EXPERTS, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "roberta": {"is_decoder": True},
    "bert": {"is_decoder": True},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "max_position_embeddings": None},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
}
"""Families, by transformers' model type, and what each needs beside :data:`SMALL`."""

SEQUENCE, SAMPLES, PROMPTS = 6, 3, ("a", "cab", "deadbeef" * 9, "fad")


class Verdict(NamedTuple):
    """What was found of a family."""

    word: str
    """right, refused or wrong."""
    way: str
    """How it is run: with a shared cache, or plain."""
    apart: float | None
    """Nats between a log-probability as it is scored or was sampled and that of a plain forward pass, at most."""
    said: str


def settings(name: str, root: Path) -> AlignmentDataModule:
    """Return the data module of a family."""
    tokenizer = tiny_tokenizer(alphabet=ALPHABET, model_max_length=128)
    if name == "qwen2":  # whose tokenizers are loaded as a class that adds this one where it is not there
        tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    tokenizer.save_pretrained(root / "tokenizer")
    (root / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    source = TextSource(path=str(root / "prompts.txt"))
    config = {"model_type": name, **SMALL, **FAMILIES[name]}
    config = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    return AlignmentDataModule(
        policy=ModelSpec(config=config, tokenizer=str(root / "tokenizer")),
        reward=VowelReward(),
        train=source,
        test=source,
        max_new_tokens=SEQUENCE,
        batch_size=4,
        reference_table=str(root / "table"),
    )


@torch.no_grad()
def apart(data: AlignmentDataModule) -> tuple[bool, float]:
    """Return whether a model is run plain, and how far its log-probabilities are from those of a plain pass."""
    actors = Actors.load(data.actors, trainable=False, reference=False)
    batch = data.prompt_batch(data.prompts("train"))
    scored = actors.scored_responses(batch, num_samples=SAMPLES, seed=0, stream="train", step=0)
    actors.reference = actors.policy
    rollout, _ = actors.statistics(scored)
    worst = 0.0
    for row in range(len(PROMPTS)):
        prompt = batch.tokens[row][batch.mask[row]]
        for sample in range(SAMPLES):
            mask = scored.completions.mask[row, sample]
            response = scored.completions.tokens[row, sample][mask]
            logits = actors.policy(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
            plain = logits.float().log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
            for ours in (rollout.log_probs, scored.completions.log_probs):
                worst = max(worst, float((ours[row, sample][mask] - plain).abs().max()))
    return runs_plain(actors.policy), worst


def chain(data: AlignmentDataModule, root: Path) -> None:
    """Fill a table, train, export and compare."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": root, "enable_checkpointing": False,
    }  # fmt: skip
    Trainer(**quiet).predict(ReferenceSampler(data.actors, samples=8), data, return_predictions=False)
    module = VBoN(data.actors, n=2, samples_per_prompt=SAMPLES)
    Trainer(**quiet, max_steps=2, callbacks=[PolicyExport(str(root / "export"))]).fit(module, data)
    # A reference made from a config is that of the seed, so the comparison makes the same one.
    compare(data, {"vBoN": str(root / "export")}, output=str(root / "out"), n=[2], samples=2, device="cpu")


def judge(name: str) -> Verdict:
    """Try a family."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder)
        try:
            data = settings(name, root)
            plain, worst = apart(data)
            with redirect_stdout(StringIO()):
                chain(data, root)
        except ModelError as error:
            return Verdict("refused", "-", None, " ".join(str(error).split())[:160])
        except Exception as error:  # what a user would see
            return Verdict("wrong", "-", None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        word = "right" if worst < 1e-3 else "wrong"
        return Verdict(word, "without a cache" if plain else "shared cache", worst, "")


def main(names: list[str]) -> None:
    """Judge families, all by default, and write the table of all."""
    verdicts = {name: judge(name) for name in tqdm(names or list(FAMILIES), disable=None)}
    header = ["family", "", "run", "nats apart, at most", ""]
    rows = [
        [name, found.word, found.way, "-" if found.apart is None else f"{found.apart:.1e}", found.said]
        for name, found in verdicts.items()
    ]
    text = markdown_table(header, rows, align="lllrl")
    print(text)
    if not names:
        page = Path("docs/models.md")
        before = page.read_text(encoding="utf-8").split("<!-- families -->")[0] if page.exists() else ""
        page.write_text(f"{before}<!-- families -->\n{text}", encoding="utf-8")
        results = Path("experiments/families/families.json")
        results.write_text(json.dumps({name: found._asdict() for name, found in verdicts.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
