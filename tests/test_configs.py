"""Every shipped YAML says which command runs it, and that command parses."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import run as torch_run
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from vbon_lightning import cli
from vbon_lightning.adapters import add_lora

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Parse a `vbon ...` command without running it, and return its configuration."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VBON_DATA", "/data")
    if cli.COMMANDS[words[0]].module is not None:
        return cli.command_module(words[0]).build_parser().parse_args(words[1:])
    seen: dict[str, object] = {}
    monkeypatch.setattr("sys.argv", ["vbon"])  # LightningCLI warns where arguments come from both places
    monkeypatch.setattr(cli.VbonCLI, "_set_seed", lambda self: None)
    monkeypatch.setattr(
        cli.VbonCLI, "instantiate_classes", lambda self: seen.update(config=self.config[self.subcommand])
    )
    monkeypatch.setattr(cli.VbonCLI, "_run_subcommand", lambda self, subcommand: None)
    cli.run(words)
    return seen["config"]


STARTERS = {"vbon": ["vbon"], "srun": ["vbon"], "torchrun": ["-m", "vbon_lightning"]}
"""What a command line may begin with, and what stands right before the words that `vbon` gets."""


def launched(text: str) -> list[tuple[list[str], list[str]]]:
    """Return the `vbon ...` commands of comments or of a shell block, continued lines joined, and what starts each."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("# ").strip()
        before = STARTERS.get(line.split(" ")[0])
        if before is not None:
            words = shlex.split(line.removesuffix("&"), comments=True)
            place = words.index(before[-1]) + 1
            assert words[place - len(before) : place] == before, line
            found.append((words[: place - len(before)], words[place:]))
    return found


def commands(text: str) -> list[list[str]]:
    """Return the `vbon ...` commands of :func:`launched`."""
    return [words for _, words in launched(text)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_yaml_is_headed_by_a_command_that_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    found = commands(header)
    assert found, f"{path} does not begin with the command that runs it"
    for words in found:
        assert str(path.relative_to(ROOT)) in words, f"the command of {path} does not use it"
        parse(words, monkeypatch)


def test_the_readme_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (ROOT / "README.md").read_text().split("```sh")[1:]
    found = [words for block in blocks for words in commands(block.split("```")[0])]
    data = shlex.split("--config configs/demo/data.yaml")
    runnable = [words for words in found if "..." not in words]
    assert len(runnable) >= 5
    for words in runnable:
        words = [part for word in words for part in (data if word == "$data" else [word])]
        config = parse(words, monkeypatch)
        assert config is not None


GUIDES = ["docs/decoding.md", "docs/scaling.md", "docs/tables.md"]

SBATCH = {
    "array",
    "cpus-per-task",
    "gpus-per-node",
    "gpus-per-task",
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "requeue",
    "signal",
    "time",
}
"""Options of `sbatch` (its manual) that the guides use."""


def shell_blocks(guide: str) -> list[str]:
    """Return the shell blocks of a page."""
    return [block.split("```")[0] for block in (ROOT / guide).read_text().split("```sh\n")[1:]]


def sbatch_options(block: str) -> dict[str, str]:
    """Return the options at the head of a batch script; empty for other blocks."""
    lines = [line.removeprefix("#SBATCH --") for line in block.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_parse(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in shell_blocks(guide):
        found = launched(block)
        assert found, block
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        script = sbatch_options(block)
        for starter, words in found:
            config: Any = parse(words, monkeypatch)
            trainer = getattr(config, "trainer", None)
            if trainer is None or trainer.devices == "auto":  # another command, or whatever there is
                assert not starter
                continue
            processes = trainer.num_nodes, int(trainer.devices)
            if starter[:1] == ["torchrun"]:
                given = torch_run.get_args_parser().parse_args([*starter[1:], "-m", "vbon_lightning"])
                assert (int(given.nnodes.split(":")[-1]), int(given.nproc_per_node)) == processes
            assert bool(script) == (starter[:1] == ["srun"])
            if script:
                assert set(script) <= SBATCH
                assert block.startswith("#!/bin/bash\n#SBATCH"), "options behind the first command are ignored"
                tasks = (
                    int(script.get("ntasks-per-node", 1)) * int(script.get("nodes", 1)) * int(script.get("ntasks", 1))
                )
                assert tasks == processes[0] * processes[1]


def test_the_yaml_of_the_page_on_scaling_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (ROOT / "docs/scaling.md").read_text().split("```yaml\n")[1:]
    (tmp_path / "overlay.yaml").write_text(block.split("```")[0])
    words = shlex.split("fit --config configs/demo/data.yaml --config configs/demo/sft.yaml --config")
    config: Any = parse([*words, str(tmp_path / "overlay.yaml")], monkeypatch)
    assert config.trainer.strategy.class_path.endswith("ShardedStrategy")


def test_the_readers_of_guides_see_what_they_are_to_check() -> None:
    head = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --requeue\n"
    text = f"{head}srun --a=1 vbon fit \\\n --x 1 &\nwait $!\n# vbon test\n# It's said of vbon.\nvbonx y\n"
    assert launched(text) == [(["srun", "--a=1"], ["fit", "--x", "1"]), ([], ["test"])]
    assert sbatch_options(text) == {"nodes": "2", "requeue": ""}
    assert launched("torchrun --nnodes 2 -m vbon_lightning fit") == [(["torchrun", "--nnodes", "2"], ["fit"])]


def test_the_adapters_of_the_summarisation_setting_fit_its_kind_of_model() -> None:
    """Parsing does not show whether peft takes them: on a tiny model with the modules and layers of Pythia-2.8B."""
    pytest.importorskip("peft")
    lora = yaml.safe_load((ROOT / "configs/tldr/data.yaml").read_text())["data"]["policy"]["lora"]
    config = GPTNeoXConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    add_lora(model, lora)
    trained = {name.split(".layers.")[1].split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert trained == {f"{layer}.{part}" for layer in range(24, 32) for part in parts}


def test_the_parse_helper_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--config", "configs/demo/data.yaml", "--config", "configs/demo/vbon.yaml"]
    with pytest.raises(SystemExit):
        parse([*words, "--model.init_args.m", "4"], monkeypatch)


def test_the_yaml_of_the_page_on_metrics_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (ROOT / "docs/metrics.md").read_text().split("```yaml\n")[1:]
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.split("```")[0])
        words = [
            "fit",
            "--config",
            "configs/demo/data.yaml",
            "--config",
            "configs/demo/vbon.yaml",
            "--config",
            str(path),
        ]
        assert parse(words, monkeypatch) is not None
