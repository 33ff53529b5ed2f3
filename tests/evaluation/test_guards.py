"""What `vbon compare` refuses before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.data.test_module import ALPHABET, Lengths
from tests.helpers import save_tiny_model
from vbon_lightning.actors import Actors
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.decoding import BestOfN, SpeculativeRejection, TreeBoN
from vbon_lightning.decoding.drawing import device_named
from vbon_lightning.evaluation import command
from vbon_lightning.evaluation.guards import check_names, make_directory
from vbon_lightning.models import ModelError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), alphabet=ALPHABET)


@pytest.fixture
def data(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AlignmentDataModule:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Actors, "load", refuse)
    (tmp_path / "test.txt").write_text("ab\ncde\n")
    value = str(tmp_path / "nowhere")  # is read last of all
    return AlignmentDataModule(policy=model, reward=Lengths(), test=[{"text": "ab"}], value_model=value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a blank name": ({"policies": {" ": "x"}}, r"policies: a name is blank \(' '\)"),
    "an empty name": ({"decoders": {"": BestOfN(2)}}, r"decoders: a name is blank \(''\)"),
    "the reference": ({"policies": {"Reference": "x"}}, "policies: 'Reference' is what the comparison calls"),
    "Best-of-N": ({"policies": {"Best-of-16": "x"}}, "policies: 'Best-of-16' is what the comparison calls"),
    "a method of ours": ({"decoders": {"Best-of-N drawn": BestOfN(2)}}, "decoders: 'Best-of-N drawn' is what the"),
    "a method of nobody": ({"policies": {"mine": "x"}, "methods": {"yours": "A"}}, "methods: 'yours' is no policy or"),
    "a blank method": ({"policies": {"mine": "x"}, "methods": {"mine": " "}}, "methods: 'mine' has the method ' '"),
    "the reference's method": (
        {"decoders": {"drawn": BestOfN(2)}, "methods": {"drawn": "Best-of-N"}},
        "methods: 'drawn' has the method 'Best-of-N'",
    ),
    "one name twice": (
        {"policies": {"mine": "x"}, "decoders": {" mine": BestOfN(2)}},
        "decoders: ' mine' names a second thing, after one of policies",
    ),
    "one file's name twice": (
        {"policies": {"a/b": "x", "a b": "x"}},
        "policies: 'a b' is too much like 'a/b': both are 'a_b' as a file's name",
    ),
    "no capitals": ({"policies": {"vBoN": "x", "VBON": "x"}}, "policies: 'VBON' is too much like 'vBoN'"),
    "nothing for a file": ({"policies": {"?": "x", "!!": "x"}}, "policies: '!!' is too much like '?'"),
    "no samples": ({"samples": 0}, "samples must be an integer >= 1, got 0"),
    "fewer than none": ({"shown_prompts": -1}, "shown_prompts must be an integer >= 0, got -1"),
    "none to show": ({"shown_samples": 0}, "shown_samples must be an integer >= 1, got 0"),
    "no n": ({"n": [2, 0]}, r"n must be integers >= 1, got \[2, 0\]"),
    "one n twice": ({"n": [2, 4, 2]}, r"n names a number twice: \[2, 4, 2\]"),
    "a temperature": ({"temperatures": [0.0]}, "temperatures must be positive"),
    "no such device": ({"device": "cuda:99"}, "device 'cuda:99' is not there .*: give cpu, or auto"),
    "no device at all": ({"device": "toaster"}, "device 'toaster' is not there .*: give cpu, or auto"),
    "nothing's device": ({"device": "meta"}, "device 'meta' is not there .*: give cpu, or auto"),
    "nothing to judge": (
        {"decoders": {"drawn": SpeculativeRejection(4, every=32)}},
        "the decoder 'drawn': every is 32, and a response has at most 32 tokens: nothing would be judged on the way",
    ),
    "more layers than tokens": (
        {"decoders": {"drawn": TreeBoN(8, layers=33)}},
        "the decoder 'drawn': layers is 33, and a response has at most 32 tokens: ask for fewer",
    ),
    "a split": ({"split": "val"}, "no val data: set `data.val`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused_before_models_are_loaded(
    case: str, data: AlignmentDataModule, model: str, tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        command.compare(data, **({"policies": {"mine": model}, "output": str(tmp_path / "out")} | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_policy_that_diverged_is_named_before_anything_is_loaded(
    bad: float, data: AlignmentDataModule, model: str, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.norm.weight"][3] = bad
    save_file(weights, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    policies = {"good": model, "of NaN": str(tmp_path / "bad")}
    with pytest.raises(ModelError, match=r"the policy 'of NaN': the weight model\.norm\.weight in .*/bad/model\.safe"):
        command.compare(data, policies, output=str(tmp_path / "out"))
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"the policy 'of NaN': .*model\.safetensors' is broken or cut short"):
        command.compare(data, policies, output=str(tmp_path / "out"))
    with pytest.raises(ModelError, match="the policy 'gone': `name`: the directory './gone' does not exist"):
        command.compare(data, {"good": model, "gone": "./gone"}, output=str(tmp_path / "out"))


def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(ValueError, match=rf"output: '.*{place}' cannot be a directory \(.*\): name another"):
            make_directory(str(tmp_path / place))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"export' is the directory of a model, it holds config\.json"):
        make_directory(str(tmp_path / "export"))
    make_directory(str(tmp_path / "new" / "one"))
    assert (tmp_path / "new" / "one").is_dir()


def test_names_that_are_somebodys_own_are_taken() -> None:
    check_names({"vBoN n=4": 1, "vBoN n=2": 1, "a reference": 1}, {"Best-of-2 drawn": 1, "Guided": 1})


def test_devices_that_are_there() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*compare*.yaml")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_the_shipped_comparisons_have_names_of_their_own(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_names(values.get("policies", {}), values.get("decoders", {}))


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_output_is_not_the_current_directory(blank: str) -> None:
    with pytest.raises(ValueError, match=f"output: '{blank}' is blank: name a directory"):
        make_directory(blank)
