"""The exact log-probability under Best-of-N against the binomial sum that defines it: time and error.

python -m benchmarks.exact_target

The sum over i = 1..N of C(N,i) F^(N-i) p^i is evaluated in float64 by log-gamma and log-sum-exp, which a float
binomial could not do from N = 1030 on; the reference is (F + p)^N - F^N in 50-digit arithmetic. Ours gets float32.
"""

from __future__ import annotations

import time

import mpmath
import torch
from jsonargparse import auto_cli

from benchmarks.bench import median, table, write
from vbon_lightning.functional import bon_log_prob

RESPONSES = 256


def binomial_sum(log_p: torch.Tensor, log_f: torch.Tensor, n: int, terms: int = 2**22) -> torch.Tensor:
    """Sum the definition in float64, in blocks of terms so that memory stays bounded."""
    log_p, log_f, total = log_p.double(), log_f.double(), None
    size = max(1, terms // len(log_p))
    for start in range(1, n + 1, size):
        i = torch.arange(start, min(start + size, n + 1), dtype=torch.float64)
        choose = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
        part = (choose + (n - i) * log_f[:, None] + i * log_p[:, None]).logsumexp(-1)
        total = part if total is None else torch.logaddexp(total, part)
    return total


def truth(log_p: torch.Tensor, log_f: torch.Tensor, n: int) -> list[float]:
    """Return log((F + p)^n - F^n), in 50 digits."""
    mpmath.mp.dps = 50
    found = []
    for one, below in zip(log_p.tolist(), log_f.tolist(), strict=True):
        p, f = mpmath.exp(mpmath.mpf(one)), mpmath.exp(mpmath.mpf(below))
        ratio = p / f
        # f^n ((1 + p/f)^n - 1), without cancellation
        found.append(n * mpmath.log(f) + mpmath.log(mpmath.expm1(n * mpmath.log1p(ratio))))
    return found


def seconds(call: object, repeats: int) -> float:
    """Return the median time of a call."""
    marks = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        marks.append(time.perf_counter() - start)
    return median(marks[1:])


def main(repeats: int = 20) -> None:
    """Measure at n = 2 ... 10^6.

    Args:
        repeats: Timed calls.
    """
    torch.manual_seed(0)
    results, rows = [], []
    for n in (2, 10, 100, 1000, 10_000, 100_000, 1_000_000):
        # Responses that Best-of-n picks have 1 - F of about 1/n, and their own probability is within 1 - F: from
        # half of it down to e^-60 of it. (Where it is all of it, log pi_bon is 0 and has no relative error.)
        log_f = torch.log1p(-(0.05 + 2 * torch.rand(RESPONSES)) / (n + 1))
        log_p = torch.log(-torch.expm1(log_f)) - 0.7 - 60 * torch.rand(RESPONSES)
        exact = truth(log_p, log_f, n)

        def error(found: torch.Tensor, exact: list[float] = exact) -> float:
            pairs = zip(found.double().tolist(), exact, strict=True)
            return max(float(abs((one - other) / other)) for one, other in pairs)

        ours = bon_log_prob(log_p, log_f, n=n)
        summed = binomial_sum(log_p, log_f, n)
        found = {
            "n": n,
            "seconds": seconds(lambda n=n, p=log_p, f=log_f: bon_log_prob(p, f, n=n), repeats),
            "relative_error": error(ours),
            "sum_seconds": seconds(lambda n=n, p=log_p, f=log_f: binomial_sum(p, f, n), max(1, repeats // 10)),
            "sum_relative_error": error(summed),
        }
        results.append(found)
        rows.append(
            [
                f"{n:,}",
                f"{found['seconds'] * 1e3:.3f} ms",
                f"{found['relative_error']:.1e}",
                f"{found['sum_seconds'] * 1e3:,.2f} ms",
                f"{found['sum_relative_error']:.1e}",
                f"{found['sum_seconds'] / found['seconds']:,.1f}",
            ]
        )
        print(rows[-1], flush=True)
    write(
        "exact_target",
        f"log pi_bon of {RESPONSES} responses: time of a call and largest relative error against 50 digits, ours in "
        "float32, the binomial sum in float64.",
        table(["n", "ours", "error", "binomial sum", "its error", "time ratio"], rows),
        results,
        ["mpmath"],
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
