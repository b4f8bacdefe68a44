"""The rivals: every function takes q, k, v of shape (batch, heads, n, d) and returns causal attention of that shape.

Three functions are compared, each with its own kind: "softmax" attention; "linear" attention complete with the features
elu + 1 and the normaliser; and the "bare" one without either, for a fair comparison of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.linear_attention import attention_weights, elu_plus_one, linear_attention, softmax_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Method(NamedTuple):
    """A rival.

    Attributes
    ----------
    name
        As in tables and pictures.
    function
        "softmax", "linear" or "bare": which function it computes.
    prepare
        Called once; returns the attention, or raises where a package is missing.
    tokens_first
        Its tensors are laid out as (batch, n, heads, d) in memory, though indexed like all others.
    """

    name: str
    function: str
    prepare: Callable[[], Attention]
    tokens_first: bool = False


def methods(kind: str) -> list[Method]:
    """All rivals for a kind of device, "cpu" or "cuda"."""
    rivals = [
        Method("naive softmax", "softmax", lambda: softmax_attention),
        # On CUDA these answer with the tokens first, and would copy a gradient in another layout.
        Method("SDPA flash", "softmax", lambda: _sdpa(SDPBackend.FLASH_ATTENTION), tokens_first=kind == "cuda"),
        Method("linear, torch", "linear", lambda: lambda q, k, v: linear_attention(q, k, v)[0]),
    ]
    if kind == "cuda":
        rivals += [
            Method("SDPA cuDNN", "softmax", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION), tokens_first=True),
            Method("SDPA efficient", "softmax", lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION), tokens_first=True),
            Method("flex_attention", "softmax", _flex),
            Method("linear, Triton", "linear", lambda: _triton(bare=False)),
            Method("bare, Triton", "bare", lambda: _triton(bare=True)),
            Method("bare, fla chunk", "bare", lambda: _fla("chunk_linear_attn"), tokens_first=True),
            Method("bare, fla fused", "bare", lambda: _fla("fused_chunk_linear_attn"), tokens_first=True),
        ]
    return rivals


def reference(function: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the attention in float64 by its definition, with the whole n × n matrix of weights."""
    if function == "softmax":
        return softmax_attention(q, k, v)
    bare = function == "bare"
    return attention_weights(q, k, feature_map=None if bare else elu_plus_one, normalize=not bare) @ v


def _sdpa(backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):  # the call below raises where the device does not have it
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=True), {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        if n not in masks:
            masks.clear()
            masks[n] = BlockMask.from_kv_blocks(
                *causal_blocks(n, q.device), BLOCK_SIZE=128, mask_mod=_not_later, seq_lengths=(n, n)
            )
        return compiled(q, k, v, block_mask=masks[n])

    return attend


def _not_later(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def causal_blocks(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count and number the blocks of 128 that a row of blocks needs: one to be masked, then those that are whole.

    `create_block_mask` would make an n × n tensor to find them.
    """
    rows = torch.arange(-(-n // 128), dtype=torch.int32, device=device)
    every = rows.expand(len(rows), -1).contiguous()
    diagonal = torch.cat([rows[:, None], every[:, 1:]], 1)  # only its first column is read
    return tuple(x[None, None] for x in (torch.ones_like(rows), diagonal, rows, every))


def _triton(bare: bool) -> Attention:
    if find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    from helpers.speed.kernels import linear_attention_triton

    if bare:
        return lambda q, k, v: linear_attention_triton(q, k, v, normalize=False)[0]
    return lambda q, k, v: linear_attention_triton(elu_plus_one(q), elu_plus_one(k), v)[0]


def _fla(name: str) -> Attention:
    if find_spec("fla") is None:
        raise RuntimeError("flash-linear-attention is not installed")
    chosen = getattr(import_module("fla.ops.linear_attn"), name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its tensors are (batch, n, heads, d); left alone, it scales by 1/√d and normalises.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return chosen(q, k, v, scale=1.0, normalize=False)[0].transpose(1, 2)

    return attend
