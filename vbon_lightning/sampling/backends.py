"""The ways to sample, by the name that ``data.sampler`` gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from vbon_lightning.sampling.decode import sample_completions
from vbon_lightning.sampling.passes import InPasses, Sampler
from vbon_lightning.sampling.static import GraphSampler

SAMPLERS = ("eager", "graph", "vllm")
"""``eager`` (the decode loop), ``graph`` (the same in fixed shapes, captured on CUDA) and ``vllm``."""


class SamplerError(ValueError):
    """A way to sample that is not known, not installed, or cannot do what is asked."""


def check_sampler(name: str, *, max_rows: int | None = None, engine_options: Mapping[str, Any] | None = None) -> None:
    """Refuse what :func:`make_sampler` cannot make, but for packages that are not installed.

    Raises:
        SamplerError: Naming the option.
    """
    if name not in SAMPLERS:
        raise SamplerError(f"data.sampler must be one of {', '.join(SAMPLERS)}; got {name!r}")
    if max_rows is not None and max_rows < 1:
        raise SamplerError(f"data.max_rows must be at least 1, got {max_rows}")
    if engine_options and name != "vllm":
        raise SamplerError(f"data.engine_options are arguments of vLLM's engine, but data.sampler is {name!r}")


def make_sampler(name: str, *, max_rows: int | None = None, engine_options: Mapping[str, Any] | None = None) -> Sampler:
    """Make what samples.

    Args:
        name: One of :data:`SAMPLERS`.
        max_rows: Most rows (prompts x samples) at once; None for no limit.
        engine_options: Arguments of ``vllm.LLM``, for ``vllm``.

    Raises:
        SamplerError: For an unknown name, or where vLLM is asked for and not installed.
    """
    check_sampler(name, max_rows=max_rows, engine_options=engine_options)
    sampler: Sampler = sample_completions
    if name == "graph":
        sampler = GraphSampler()
    elif name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise SamplerError("data.sampler=vllm needs vLLM: pip install 'vbon_lightning[vllm]'")
        from vbon_lightning.sampling.vllm_backend import VllmSampler

        sampler = VllmSampler(engine_options)
    return sampler if max_rows is None else InPasses(sampler, max_rows)
