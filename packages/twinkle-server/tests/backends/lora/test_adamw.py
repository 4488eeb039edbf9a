import dataclasses

import pytest
import torch

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.lora import adamw
from twinkle.server.backends.lora.banks import Bank, Layout, LinearShape

SETTINGS = {
    0: AdamParams(learning_rate=0.1),
    1: AdamParams(learning_rate=0.01, beta1=0.5, beta2=0.999, eps=1e-3, weight_decay=0.3),
    2: AdamParams(learning_rate=0.02, grad_clip_norm=0.5),
    4: AdamParams(learning_rate=0.0, weight_decay=0.3),
    5: AdamParams(learning_rate=0.03, grad_clip_norm=1e6),
}


# By slot, as above, and what the two ways to step could have different ideas of.
ALL_SETTINGS = {
    **SETTINGS,
    3: AdamParams(learning_rate=0.05, eps=0.0),
    6: AdamParams(grad_clip_norm=1e-3, eps=1e-12),
}


def filled_bank() -> Bank:
    bank = Bank(Layout.of([LinearShape("layer", 7, 9)], rank=3), torch.device("cpu"))
    torch.manual_seed(0)
    for _ in range(7):
        slot = bank.take()
        bank.params[slot].normal_()
    return bank


@pytest.mark.parametrize("block", [2**24, 20, 1])
def test_steps_equal_torch(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_CPU_BLOCK", block)
    bank = filled_bank()
    parameters = {slot: torch.nn.Parameter(bank.params[slot].clone()) for slot in SETTINGS}
    optimizers = {
        slot: torch.optim.AdamW(
            [parameters[slot]],
            lr=s.learning_rate,
            betas=(s.beta1, s.beta2),
            eps=s.eps,
            weight_decay=s.weight_decay,
        )
        for slot, s in SETTINGS.items()
    }
    idle = [bank.params[slot].clone() for slot in (3, 6)]
    for step in range(4):
        gradients = torch.randn(7, bank.layout.size) * (step != 2)
        norms: dict[int, float] = {}
        for slot, s in SETTINGS.items():
            parameters[slot].grad = gradients[slot].clone()
            limit = s.grad_clip_norm or float("inf")
            norms[slot] = torch.nn.utils.clip_grad_norm_([parameters[slot]], limit).item()
            optimizers[slot].step()
        bank.grads |= {slot: gradients[slot].clone() for slot in range(7) if step != 2 or slot == 1}
        plan = adamw.plan_steps(bank, SETTINGS)
        assert all(torch.equal(row, gradients[slot]) for slot, row in bank.grads.items()), (
            "a plan changes nothing"
        )
        assert plan.norms == pytest.approx(norms, rel=1e-6)
        plan.apply()
        for slot in SETTINGS:
            torch.testing.assert_close(bank.params[slot], parameters[slot].data, rtol=1e-5, atol=1e-6)
            assert not bank.gradient(slot).any()
        assert set(bank.grads) <= {3, 6}
        bank.grads.clear()
    assert list(bank.steps.values()) == [4, 4, 4, 0, 4, 4, 0]
    for slot, before in zip((3, 6), idle, strict=True):
        assert torch.equal(bank.params[slot], before)
        assert not bank.exp_avg[slot].any() and not bank.exp_avg_sq[slot].any()


def test_a_learning_rate_of_zero_leaves_every_bit() -> None:
    bank = filled_bank()
    before = {slot: row.clone() for slot, row in bank.params.items()}
    bank.grads[0] = torch.randn(bank.layout.size)
    adamw.plan_steps(bank, {0: AdamParams(learning_rate=0.0, weight_decay=0.5)}).apply()
    assert all(torch.equal(row, before[slot]) for slot, row in bank.params.items())
    assert bank.exp_avg[0].all()


def test_eps_of_zero_is_safe_where_there_never_was_a_gradient() -> None:
    bank = filled_bank()
    before = bank.params[0].clone()
    bank.grads[0] = torch.zeros(bank.layout.size)
    bank.grads[0][::2] = 1
    adamw.plan_steps(bank, {0: AdamParams(learning_rate=0.5, eps=0.0)}).apply()
    assert torch.equal(bank.params[0][1::2], before[1::2])
    torch.testing.assert_close(bank.params[0][::2], before[::2] - 0.5)


@pytest.mark.parametrize("block", [2**24, 350, 20, 1])
def test_steps_together_equal_steps_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_CPU_BLOCK", block)
    one, other = filled_bank(), filled_bank()
    for step in range(4):
        gradients = torch.randn(7, one.layout.size)
        gradients[:, ::3] = 0
        # Slot 0 never has one, the others not in each step.
        having = [slot for slot in range(1, 7) if (slot + step) % 3]
        for bank in (one, other):
            bank.grads |= {slot: gradients[slot].clone() for slot in having}
        adamw.plan_steps(one, ALL_SETTINGS).apply_by_block()
        plan = adamw.plan_steps(other, ALL_SETTINGS)
        # A workspace as on a GPU: of several adapters, but for the small blocks.
        workspace = torch.empty(min(block, other.layout.size * len(ALL_SETTINGS)))
        dataclasses.replace(plan, workspace=workspace).apply_together()
        assert not one.grads and not other.grads and one.steps == other.steps
        for found, wanted in ((other.params, one.params), (other.exp_avg, one.exp_avg)):
            for slot in wanted:
                torch.testing.assert_close(found[slot], wanted[slot], rtol=1e-6, atol=1e-6)
        for slot, row in one.exp_avg_sq.items():
            torch.testing.assert_close(other.exp_avg_sq[slot], row, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_together", [False, True])
def test_steps_behind_a_refused_one_equal_those_of_torch_without_it(is_together: bool) -> None:
    """Of three adapters one has a gradient now and then with which torch's optimizer would be lost for ever."""
    bank = filled_bank()
    parameters = {slot: torch.nn.Parameter(bank.params[slot].clone()) for slot in (0, 1, 2)}
    optimizers = {
        slot: torch.optim.AdamW([row], lr=0.1, eps=1e-8, weight_decay=0.1) for slot, row in parameters.items()
    }
    step = AdamParams(learning_rate=0.1, beta2=0.999, eps=1e-8, weight_decay=0.1)
    for number, bad in enumerate((None, float("nan"), float("inf"), -float("inf"), 1e19, None)):
        for slot in parameters:
            gradient = torch.randn(bank.layout.size)
            bank.grads[slot] = gradient.clone()
            if slot == 1 and bad is not None:
                bank.grads[slot][number] = bad
                continue
            parameters[slot].grad = gradient
            optimizers[slot].step()
        plan = adamw.plan_steps(bank, dict.fromkeys(parameters, step))
        assert list(plan.faults) == ([1] if bad is not None else [])
        if is_together:
            plan.apply_together()
        else:
            plan.apply()
        bank.grads.clear()
        for slot, row in parameters.items():
            torch.testing.assert_close(bank.params[slot], row.data, rtol=1e-5, atol=1e-6)
    assert [bank.steps[slot] for slot in parameters] == [6, 2, 6]


def test_norms_outside_of_float32s_squares_are_those_of_float64() -> None:
    bank = filled_bank()
    for scale in (1e-30, 1e-13, 1.0, 1e17, 1e30, 3e37):
        bank.grads[0] = torch.randn(bank.layout.size) * scale
        expected = bank.grads[0].double().norm().item()
        plan = adamw.plan_steps(bank, {0: AdamParams(grad_clip_norm=1.0)})
        assert plan.norms[0] == pytest.approx(expected, rel=1e-6) and not plan.faults


@pytest.mark.parametrize(
    "params",
    [
        {"learning_rate": 1e39},
        {"learning_rate": 1e308},
        {"learning_rate": 1e30, "weight_decay": 1e10},
        {"learning_rate": 1.0, "weight_decay": 1e39},
    ],
)
def test_a_step_too_long_for_float32_is_refused_and_a_long_one_made(params: dict[str, float]) -> None:
    bank = filled_bank()
    before = bank.params[0].clone()
    bank.grads[0] = torch.ones(bank.layout.size)
    plan = adamw.plan_steps(bank, {0: AdamParams.model_validate(params)})
    plan.apply()
    assert plan.faults and torch.equal(bank.params[0], before) and bank.steps[0] == 0 and not bank.grads
    assert not bank.exp_avg[0].any() and not bank.exp_avg_sq[0].any()
    bank.grads[0] = torch.ones(bank.layout.size)
    adamw.plan_steps(bank, {0: AdamParams(learning_rate=1e30)}).apply()
    torch.testing.assert_close(bank.params[0], torch.full_like(before, -1e30))


@pytest.mark.parametrize("eps", [1e-60, 1e39])
def test_an_eps_that_is_none_of_float32s_numbers_is_safe(eps: float) -> None:
    bank = filled_bank()
    before = bank.params[0].clone()
    bank.grads[0] = torch.zeros(bank.layout.size)
    plan = adamw.plan_steps(bank, {0: AdamParams(learning_rate=0.5, eps=eps)})
    plan.apply()
    assert not plan.faults and torch.equal(bank.params[0], before)
