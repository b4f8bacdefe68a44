"""A small causal language model of bytes, its data and its training: one instrument for 08, 09, 10 and 11.

An *attention* here is a function of (q, k, v, state) to (output, state) with q, k, v of shape (batch, heads, n, d). The
state is all that it remembers of the tokens before; None at the start. A *block* is a module that takes (x, state) with
x of shape (batch, n, width) and returns both. So a sequence may be given whole, in pieces, or one byte after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from helpers.data import load_moby_dick
from helpers.linear_attention import delta_rule, linear_attention

Attention = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]
BYTES = 256
DATA = Path(__file__).parent / "data"


def softmax_cached(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Causal softmax attention by torch; the state is all keys and values so far, and grows with every token."""
    if state is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), (k, v)
    k, v = torch.cat([state[0], k], -2), torch.cat([state[1], v], -2)
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), (k, v)


def linear_stateful(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Causal linear attention with elu + 1; the state is d × (d + 1) numbers a head, however long the sequence."""
    return linear_attention(q, k, v, initial_state=state)


def decay_stateful(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Causal linear attention with elu + 1 and RetNet's decay, 1 - 2^(-5 - h) for head h."""
    decay = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], device=q.device))
    return linear_attention(q, k, v, decay=decay, initial_state=state)


def delta_stateful(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Write keys and ask queries of length 1 by the delta rule with beta = 1: no feature map, no normaliser."""
    return delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, initial_state=state)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): a pre-norm transformer layer.

    Parameters
    ----------
    width, heads
        Each head has width / heads features.
    attention
        What the heads do.
    """

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split into {heads} heads")
        self.heads, self.attention = heads, attention
        self.norm, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute q, k and v of the heads, each of shape (batch, heads, n, width / heads)."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map (batch, n, width) to the same shape, and the state before to the state after."""
        mixed, state = self.attention(*self.project(x), state)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm_feed(x)), state


class ByteModel(nn.Module):
    """Predict every next byte: embedding and sinusoidal positions, `blocks`, a norm, a linear layer to 256 logits.

    Parameters
    ----------
    blocks
        The layers, from the first to the last.
    width
        Features of a token.
    """

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(BYTES, width), nn.ModuleList(blocks)
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, BYTES)
        self.register_buffer("rate", 10_000.0 ** (-torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Give the logits of the byte after each token, (batch, n) to (batch, n, 256), and the state after the last."""
        start, states = state or (0, [None] * len(self.blocks))
        angle = torch.arange(start, start + tokens.shape[1], device=tokens.device)[:, None] * self.rate
        x = self.embed(tokens) + torch.cat([angle.sin(), angle.cos()], -1)[:, : self.embed.embedding_dim]
        after = []
        for block, before in zip(self.blocks, states, strict=True):
            x, now = block(x, before)
            after.append(now)
        return self.logits(self.norm(x)), (start + tokens.shape[1], after)


def transformer(
    attention: Attention | Sequence[Attention],
    *,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ByteModel:
    """Build a `ByteModel` of `AttentionBlock`s; with one seed, two attentions start from the same weights.

    Parameters
    ----------
    attention
        One for all layers, or one a layer.
    dtype
        Of the weights. In float32 the losses of two processors differ in the third digit after some hundred steps.
    """
    attentions = [attention] * layers if callable(attention) else list(attention)
    if len(attentions) != layers:
        raise ValueError(f"{len(attentions)} attentions were given for {layers} layers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteModel([AttentionBlock(width, heads, each) for each in attentions], width).to(dtype)


def load_bytes() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the text, its first nine tenths to train on and the rest to validate."""
    text = load_moby_dick()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def batches(text: NDArray[np.uint8], length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield pieces of the text without end, int64, shape (batch, length + 1), drawn evenly from all places."""
    if len(text) <= length:
        raise ValueError(f"the text has {len(text)} bytes, which is too short for pieces of {length} + 1")
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(text) - length, batch)
        yield torch.from_numpy(text[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def next_byte_loss(model: nn.Module, piece: Tensor) -> Tensor:
    """Mean cross-entropy of each byte but the first, in nats; 5.55 for guessing evenly among 256."""
    logits, _ = model(piece[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())


def train(
    model: nn.Module,
    *,
    steps: int,
    length: int = 128,
    batch: int = 8,
    lr: float = 5e-3,
    seed: int = 0,
    stop: int | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
) -> list[float]:
    """Train on `load_bytes` with AdamW, a linear warm-up over a tenth of the steps and a cosine to zero.

    Parameters
    ----------
    steps, length, batch
        The budget: steps · batch · length bytes are seen.
    seed
        Of the pieces; the same seed shows two models the same text in the same order.
    stop
        End after so many steps, to repeat the beginning of a longer training.
    on_step
        Called after each backward pass and before the step, for measuring gradients.

    Returns
    -------
    list of float
        The training loss of each step, in nats a byte.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm, losses = max(steps // 10, 1), []
    pieces = batches(load_bytes()[0], length, batch, seed)
    for step in range(steps if stop is None else min(stop, steps)):
        rate = min((step + 1) / warm, 0.5 + 0.5 * np.cos(np.pi * max(step - warm, 0) / max(steps - warm, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr * float(rate)
        loss = next_byte_loss(model, next(pieces))
        optimizer.zero_grad()
        loss.backward()
        if on_step is not None:
            on_step(step, model)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def validate(model: nn.Module, *, length: int = 128, pieces: int = 64) -> float:
    """Mean loss in nats a byte on `pieces` pieces spread evenly over the part of the text that is kept back."""
    text = load_bytes()[1]
    starts = np.linspace(0, len(text) - length - 1, pieces).astype(int)
    return next_byte_loss(
        model, torch.from_numpy(text[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    ).item()


# --- Training that took too long for a notebook, done once and stored


class Runs(NamedTuple):
    """Recorded trainings: several variants, several seeds each.

    Attributes
    ----------
    losses : dict of ndarray, shape (seeds, steps)
        By variant, the training losses in nats a byte.
    validation : dict of ndarray, shape (seeds,)
        By variant, what `validate` said after the last step.
    made : str
        When, on what and with what.
    extra : dict of ndarray
        What else was measured, under names of its own.
    """

    losses: dict[str, NDArray[np.float32]]
    validation: dict[str, NDArray[np.float32]]
    made: str
    extra: dict[str, NDArray[Any]]


def load_runs(topic: str) -> Runs:
    """Read what ``python -m helpers.authoring train`` recorded for a topic, such as "08_linear_attention"."""
    with np.load(DATA / f"runs_{topic}.npz") as stored:
        parts: dict[str, dict[str, NDArray[Any]]] = {"losses": {}, "validation": {}, "extra": {}}
        for key in stored.files:
            if key != "made":
                kind, _, name = key.partition("/")
                parts[kind][name] = stored[key]
        return Runs(parts["losses"], parts["validation"], str(stored["made"]), parts["extra"])


def load_trained(name: str) -> ByteModel:
    """Build the recorded model of 08, "softmax" or "linear", with its trained weights (kept in half precision)."""
    model = transformer({"softmax": softmax_cached, "linear": linear_stateful}[name])
    with np.load(DATA / f"byte_model_{name}.npz") as stored:
        model.load_state_dict({key: torch.from_numpy(stored[key].astype(np.float32)) for key in stored.files})
    return model.eval()
