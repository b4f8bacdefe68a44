"""Record trainings that take longer than a notebook may; notebooks show the records and repeat their first steps."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from helpers.byte_model import (
    DATA,
    ByteModel,
    decay_stateful,
    delta_stateful,
    linear_stateful,
    softmax_cached,
    train,
    transformer,
    validate,
)
from helpers.flash import RowMeter, flash_model, rotary_softmax
from helpers.linear_attention import linear_attention
from helpers.transnormer import (
    TrainingMeter,
    diag_attention,
    norm_attention,
    norm_stateful,
    two_stage,
    unscaled_stateful,
)

STEPS, SEEDS = 1200, 5


def relu_stateful(q: Tensor, k: Tensor, v: Tensor, state: tuple | None = None) -> tuple:
    """Linear attention with relu; the sum of the weights may be zero, hence the eps."""
    return linear_attention(q, k, v, feature_map=torch.relu, eps=1e-6, initial_state=state)


def relu_norm_stateful(q: Tensor, k: Tensor, v: Tensor, state: tuple | None = None) -> tuple:
    """NormAttention with relu: no denominator that could be small."""
    return norm_attention(q, k, v, state, feature_map=torch.relu)


def block_linear(q: Tensor, k: Tensor, v: Tensor, state: None = None, *, block: int = 32) -> tuple[Tensor, None]:
    """Linear attention with elu + 1 inside blocks, as local as DiagAttention but with no softmax; full blocks only."""
    out, _ = linear_attention(*(x.unflatten(-2, (-1, block)) for x in (q, k, v)))
    return out.flatten(-3, -2), None


class ClippingMeter(TrainingMeter):
    """Read the gradients, then clip all of them together to length 1, so that no step is a spike."""

    def __call__(self, step: int, model: ByteModel) -> None:
        """Read the gradients of this step, then clip them."""
        super().__call__(step, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


#: By topic and variant: what builds a model from a seed.
VARIANTS: dict[str, dict[str, Callable[..., ByteModel]]] = {
    "08_linear_attention": {
        "softmax": partial(transformer, softmax_cached),
        "linear": partial(transformer, linear_stateful),
        "decay": partial(transformer, decay_stateful),
        "delta rule": partial(transformer, delta_stateful),
    },
    "10_transnormer": {
        "softmax": partial(transformer, softmax_cached),
        "linear": partial(transformer, linear_stateful),
        "unscaled": partial(transformer, unscaled_stateful),
        "norm": partial(transformer, norm_stateful),
        "diag+norm": partial(transformer, two_stage()),
        "diag+linear": partial(transformer, two_stage(late=linear_stateful)),
        "relu": partial(transformer, relu_stateful),
    },
    "10_transnormer_controls": {
        "relu, norm": partial(transformer, relu_norm_stateful),
        "block linear, linear": partial(transformer, [block_linear, linear_stateful]),
        "linear, diag": partial(transformer, [linear_stateful, partial(diag_attention, block=32)]),
        "linear, softmax": partial(transformer, [linear_stateful, softmax_cached]),
    },
    "10_transnormer_clipped": {
        "relu": partial(transformer, relu_stateful),
        "linear": partial(transformer, linear_stateful),
    },
    "11_flash": {
        "GAU": flash_model,
        "FLASH": partial(flash_model, chunk_size=32),
        "GAU, softmax": partial(flash_model, kernel="softmax"),
    },
    "11_flash_controls": {
        "separate": partial(flash_model, separate=True),
        "separate, softmax": partial(flash_model, separate=True, kernel="softmax"),
        # As many parameters as the others: 64 · 32 more in W_q and W_k, and three matrices narrower by 32/3 columns.
        "separate, softmax, narrow": partial(flash_model, separate=True, kernel="softmax", expanded=107),
        "one head": partial(transformer, softmax_cached, heads=1),
    },
    "11_flash_rotary": {
        "GAU": partial(flash_model, rotary=True),
        "FLASH": partial(flash_model, rotary=True, chunk_size=32),
        "MHA + FFN": partial(transformer, rotary_softmax),
        "GAU, softmax": partial(flash_model, rotary=True, kernel="softmax"),
        "one head": partial(transformer, rotary_softmax, heads=1),
    },
}

#: By topic: what is measured besides the losses. A fresh one each run, given to `train`; `result` makes named arrays.
METERS: dict[str, Callable[[], TrainingMeter | RowMeter]] = {
    "10_transnormer": TrainingMeter,
    "10_transnormer_controls": TrainingMeter,
    "10_transnormer_clipped": ClippingMeter,
    "11_flash": RowMeter,
    "11_flash_controls": RowMeter,
    "11_flash_rotary": RowMeter,
}


def record(topic: str) -> str:
    """Train every variant of a topic from every seed, on one thread; store losses, and of 08 the first seed's weights.

    Returns
    -------
    str
        What was written.
    """
    torch.set_num_threads(1)
    stored, start = {}, time.perf_counter()
    for name, build in VARIANTS[topic].items():
        losses, validation, extra = [], [], {}
        for seed in range(SEEDS):
            model = build(seed=seed)
            meter = METERS[topic]() if topic in METERS else None
            losses.append(train(model, steps=STEPS, seed=seed, on_step=meter))
            validation.append(validate(model))
            for key, value in meter.result(model).items() if meter else ():
                extra.setdefault(f"extra/{key}/{name}", []).append(value)
            print(f"{topic} {name} seed {seed}: {validation[-1]:.3f}", flush=True)
            if topic == "08_linear_attention" and name in ("softmax", "linear") and seed == 0:
                weights = {key: value.numpy().astype(np.float16) for key, value in model.state_dict().items()}
                np.savez_compressed(DATA / f"byte_model_{name}.npz", **weights)
        stored |= {
            f"losses/{name}": np.array(losses, np.float32),
            f"validation/{name}": np.array(validation, np.float32),
            **{key: np.array(values, np.float32) for key, values in extra.items()},
        }
    minutes = (time.perf_counter() - start) / 60
    today = datetime.date.today().isoformat()
    stored["made"] = f"{today}, one thread of {platform.machine()}, torch {torch.__version__}, {minutes:.0f} minutes"
    np.savez_compressed(DATA / f"runs_{topic}.npz", **stored)
    return f"runs_{topic}.npz: {stored['made']}"
