"""The peer of the benchmark: the same layer in torch, around scaled_dot_product_attention."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

NAME = "torch SDPA"


def available() -> tuple[ModuleType | None, str]:
    """Return torch, or None and the reason why it cannot be timed beside jax."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    torch = importlib.import_module("torch")
    platform = jax.devices()[0].platform
    if platform == "cpu" or (platform in ("gpu", "cuda") and torch.cuda.is_available()):
        return torch, ""
    return None, f"this torch does not run on the {platform}"


def layer(
    torch: ModuleType, shape: tuple[int, int, int], heads: tuple[int, int, int], dtype: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the forward pass, and forward with backward, of causal attention with its projections.

    Args:
      shape: (B, T, D).
      heads: (H, G, K).
      dtype: "float32" or "bfloat16".
    """
    batch, time, width = shape
    query_heads, groups, key_width = heads
    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    place = {"device": device, "dtype": getattr(torch, dtype)}

    def weight(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, **place) * columns**-0.5).requires_grad_()

    query = weight(query_heads * key_width, width)
    key, value = weight(groups * key_width, width), weight(groups * key_width, width)
    out = weight(width, query_heads * key_width)
    x_BTD = torch.randn(batch, time, width, **place).requires_grad_()
    cotangent_BTD = torch.randn(batch, time, width, **place)
    functional = torch.nn.functional

    def attend() -> Any:
        def project(matrix: Any, count: int) -> Any:
            return functional.linear(x_BTD, matrix).view(batch, time, count, key_width).transpose(1, 2)

        q, k, v = project(query, query_heads), project(key, groups), project(value, groups)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups < query_heads)
        return functional.linear(y.transpose(1, 2).reshape(batch, time, -1), out)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            attend()
        wait()

    def both() -> None:
        torch.autograd.grad(attend(), (x_BTD, query, key, value, out), cotangent_BTD)
        wait()

    return forward, both
