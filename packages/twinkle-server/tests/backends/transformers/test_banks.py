import torch

from twinkle.server.backends.transformers import banks
from twinkle.server.backends.transformers.banks import Bank, Layout, LinearShape, consecutive, initial_row

LAYOUT = Layout.of([LinearShape("one", 3, 5), LinearShape("two", 4, 2)], rank=2)


def test_a_row_is_all_a_then_all_b() -> None:
    assert LAYOUT.size == 2 * (3 + 5 + 4 + 2)
    assert LAYOUT.b_start == 2 * (3 + 4)
    rows = torch.arange(2.0 * LAYOUT.size).reshape(2, LAYOUT.size)
    assert LAYOUT.a["two"].view(rows).shape == (2, 2, 4)
    assert LAYOUT.b["one"].view(rows).shape == (2, 5, 2)
    assert torch.equal(LAYOUT.b["one"].view(rows)[1].flatten(), rows[1, 14:24])
    LAYOUT.a["one"].view(rows)[1].zero_()
    assert not rows[1, :6].any() and rows[1, 6:].all()


def test_split_and_join_are_inverse() -> None:
    row = torch.randn(LAYOUT.size)
    matrices = LAYOUT.split(row)
    assert {name: matrix.shape for name, matrix in matrices.items()} == {
        "base_model.model.one.lora_A.weight": (2, 3),
        "base_model.model.one.lora_B.weight": (5, 2),
        "base_model.model.two.lora_A.weight": (2, 4),
        "base_model.model.two.lora_B.weight": (2, 2),
    }
    assert torch.equal(LAYOUT.join(matrices), row)


def test_experts_matrices_lie_together_and_are_split_as_peft_has_them() -> None:
    layout = Layout.of([LinearShape("one", 3, 5), LinearShape("experts", 4, 6, experts=3)], rank=2)
    row = torch.randn(layout.size)
    a, b = layout.a["experts"].view(row[None])[0], layout.b["experts"].view(row[None])[0]
    assert a.shape == (3, 2, 4) and b.shape == (3, 6, 2)
    matrices = layout.split(row)
    assert {name: matrix.shape for name, matrix in matrices.items()} == layout.shapes()
    # PEFT's own way to an expert's product (ParamWrapper.get_delta_weight).
    peft_a = torch.from_numpy(matrices["base_model.model.experts.lora_A.weight"]).reshape(3, -1, 4)
    peft_b = torch.from_numpy(matrices["base_model.model.experts.lora_B.weight"]).reshape(6, -1, 3)
    torch.testing.assert_close(torch.einsum("o r e, e r i -> e o i", peft_b, peft_a), b @ a)
    assert torch.equal(layout.join(matrices), row)


def test_a_single_expert_keeps_its_dimension() -> None:
    layout = Layout.of([LinearShape("experts", 4, 6, experts=1)], rank=2)
    assert layout.a["experts"].view(torch.zeros(5, layout.size)).shape == (5, 1, 2, 4)


def test_an_initial_row_has_b_zero_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    row = initial_row(LAYOUT, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert row[: LAYOUT.b_start].all() and not row[LAYOUT.b_start :].any()
    assert torch.equal(row, initial_row(LAYOUT, seed=3))


def test_growth_keeps_values_and_doubles() -> None:
    bank = Bank(LAYOUT, torch.device("cpu"))
    capacities: list[int] = []
    for i in range(5):
        slot = bank.take()
        assert slot == i
        for k, tensor in enumerate((bank.params, bank.grads, bank.exp_avg, bank.exp_avg_sq)):
            assert not tensor[slot].any()
            tensor[slot] = 10 * i + k + 1
        bank.steps[slot] = i
        capacities.append(bank.capacity)
    assert capacities == [1, 2, 4, 4, 8]
    for i in range(5):
        rows = [tensor[i] for tensor in (bank.params, bank.grads, bank.exp_avg, bank.exp_avg_sq)]
        assert [row.unique().tolist() for row in rows] == [[10 * i + k + 1] for k in range(4)]
        assert bank.steps[i] == i


def test_growth_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(banks, "_MAX_GROWTH", 3 * 4 * LAYOUT.size)
    bank = Bank(LAYOUT, torch.device("cpu"))
    for _ in range(8):
        bank.take()
    assert bank.capacity == 10  # 1, 2, 4, then three at a time


def test_a_freed_slot_is_wiped_at_once_and_used_again() -> None:
    bank = Bank(LAYOUT, torch.device("cpu"))
    first, second = bank.take(), bank.take()
    for tensor in (bank.params, bank.grads, bank.exp_avg, bank.exp_avg_sq):
        tensor[:] = 1
    bank.steps[first] = 9
    bank.free(first)
    for tensor in (bank.params, bank.grads, bank.exp_avg, bank.exp_avg_sq):
        assert not tensor[first].any() and tensor[second].all()
    assert bank.steps[first] == 0 and not bank.is_empty
    assert bank.take() == first
    bank.free(first)
    bank.free(second)
    assert bank.is_empty


def test_consecutive() -> None:
    assert consecutive([4]) and consecutive([2, 3, 4])
    assert not consecutive([2, 4]) and not consecutive([1, 3, 2, 4])
