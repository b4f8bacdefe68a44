"""The byte-level model: in pieces as whole, no look ahead, honest batches, and records that can be repeated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.authoring.train import VARIANTS
from helpers.byte_model import (
    AttentionBlock,
    batches,
    linear_stateful,
    load_bytes,
    load_runs,
    load_trained,
    next_byte_loss,
    softmax_cached,
    train,
    transformer,
    validate,
)
from helpers.data import load_moby_dick

ATTENTIONS = {"softmax": softmax_cached, "linear": linear_stateful}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


def tokens(n=24, batch=2):
    return torch.randint(0, 256, (batch, n), generator=torch.Generator().manual_seed(1))


@every_attention
def test_pieces_give_what_the_whole_gives(attention):
    model = transformer(attention, dtype=torch.float64)
    whole, _ = model(tokens())
    for cuts in ([1] * 24, [5, 1, 18], [24]):
        state, parts, start = None, [], 0
        for cut in cuts:
            part, state = model(tokens()[:, start : start + cut], state)
            parts.append(part)
            start += cut
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
        assert state[0] == 24


@every_attention
def test_no_logit_depends_on_a_later_byte(attention):
    model = transformer(attention, dtype=torch.float64)
    changed = tokens().clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % 256
    a, b = model(tokens())[0], model(changed)[0]
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.equal(a[:, 15:], b[:, 15:])


def test_only_the_softmax_s_state_grows():
    sizes = {}
    for name, attention in ATTENTIONS.items():
        model = transformer(attention)
        for n in (10, 40):
            _, (_, layers) = model(tokens(n))
            sizes[name, n] = sum(t.numel() for layer in layers for t in layer)
    assert sizes["softmax", 40] == 4 * sizes["softmax", 10]
    assert sizes["linear", 40] == sizes["linear", 10]


def test_one_seed_gives_two_attentions_the_same_weights_and_leaves_torch_s_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = (transformer(attention, seed=3).state_dict() for attention in ATTENTIONS.values())
    assert torch.rand(1) == expected
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = transformer(softmax_cached, seed=4).state_dict()
    assert not torch.equal(one["logits.weight"], other["logits.weight"])


def test_batches_are_pieces_of_the_text_from_all_of_it():
    text = np.arange(200, dtype=np.uint8)
    drawn = [next(pieces) for pieces in [batches(text, 10, 64, seed=0)] for _ in range(20)]
    assert all(piece.shape == (64, 11) and (piece.diff(dim=1) == 1).all() for piece in drawn)
    starts = {int(first) for piece in drawn for first in piece[:, 0]}
    assert starts == set(range(190))
    assert torch.equal(next(batches(text, 10, 64, seed=0)), drawn[0])
    with pytest.raises(ValueError, match="too short"):
        next(batches(text[:10], 10, 1, seed=0))


def test_the_text_and_its_two_parts():
    text = load_moby_dick()
    assert text.dtype == np.uint8 and len(text) == 363_088 and len(set(text)) == 82
    assert bytes(text[:22]).decode() == "CHAPTER 1. Loomings.\n\n"
    first, last = load_bytes()
    assert np.array_equal(np.concatenate([first, last]), text) and 0.89 < len(first) / len(text) < 0.91


def test_the_loss_is_the_mean_surprise_at_the_next_byte():
    model = transformer(softmax_cached, dtype=torch.float64)
    piece = tokens(6)
    shares = model(piece[:, :-1])[0].softmax(-1).detach()
    surprises = [-math.log(shares[b, i, piece[b, i + 1]]) for b in range(2) for i in range(5)]
    loss = next_byte_loss(model, piece).item()
    assert abs(loss - sum(surprises) / 10) < 1e-9


def test_training_learns_and_calls_back():
    model, seen = transformer(linear_stateful, width=16, heads=2), []
    losses = train(model, steps=30, length=32, batch=4, on_step=lambda step, m: seen.append((step, m is model)))
    assert seen == [(step, True) for step in range(30)]
    assert losses[0] > 5 and losses[-1] < 4 and validate(model, length=32) < 4.3
    assert all(p.grad is not None for p in model.parameters())


def test_stopping_early_keeps_the_schedule():
    whole = train(transformer(linear_stateful, width=16, heads=2), steps=12, length=16, batch=2)
    part = train(transformer(linear_stateful, width=16, heads=2), steps=12, length=16, batch=2, stop=5)
    assert part == whole[:5]


@pytest.mark.parametrize("topic", VARIANTS)
def test_the_first_steps_of_every_record_can_be_repeated(topic):
    recorded = load_runs(topic)
    assert set(recorded.losses) == set(VARIANTS[topic])
    for name, build in VARIANTS[topic].items():
        seeds, steps = recorded.losses[name].shape
        assert seeds >= 3 and steps >= 500 and recorded.validation[name].shape == (seeds,)
        last = seeds - 1
        again = train(build(seed=last), steps=steps, stop=6, seed=last)
        assert np.abs(again - recorded.losses[name][last, :6]).max() < 1e-3


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_trained_model_is_as_good_as_recorded(name):
    recorded = load_runs("08_linear_attention").validation[name][0]
    assert abs(validate(load_trained(name)) - recorded) < 5e-3  # its weights are rounded to half precision


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="width 10 cannot be split into 4 heads"):
        AttentionBlock(10, 4, softmax_cached)
    with pytest.raises(ValueError, match="3 attentions were given for 2 layers"):
        transformer([softmax_cached] * 3)
