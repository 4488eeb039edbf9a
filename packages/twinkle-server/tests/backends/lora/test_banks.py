import torch

from twinkle.server.backends.lora.banks import Bank, Layout, LinearShape, consecutive

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
    row = LAYOUT.initial_row(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert row[: LAYOUT.b_start].all() and not row[LAYOUT.b_start :].any()
    assert torch.equal(row, LAYOUT.initial_row(seed=3))


def test_matrices_of_several_rows_are_views_of_them() -> None:
    rows = torch.arange(3.0 * LAYOUT.size).reshape(3, LAYOUT.size)
    a, b = LAYOUT.matrices(rows)
    assert list(a) == list(b) == ["one", "two"]
    assert torch.equal(a["two"], rows[:, 6:14].reshape(3, 2, 4))
    assert torch.equal(b["one"], rows[:, 14:24].reshape(3, 5, 2))
    b["two"].zero_()
    assert not rows[:, 24:].any() and rows[1:, :24].all()


def test_an_adapter_costs_weights_and_moments_and_a_gradient_while_it_has_one() -> None:
    bank = Bank(LAYOUT, torch.device("cpu"))
    slots = [bank.take() for _ in range(3)]
    kept = [*bank.params.values(), *bank.exp_avg.values(), *bank.exp_avg_sq.values(), *bank.grads.values()]
    assert sum(row.untyped_storage().nbytes() for row in kept) == 3 * 3 * 4 * LAYOUT.size
    assert not any(row.any() for row in kept)
    bank.grads[slots[1]] = torch.ones(LAYOUT.size)
    assert bank.gradient(slots[1]).all() and not bank.gradient(slots[0]).any()
    assert list(bank.grads) == [slots[1]]


def test_nothing_moves_when_others_come_and_go() -> None:
    bank = Bank(LAYOUT, torch.device("cpu"))
    first, second = bank.take(), bank.take()
    bank.params[second].fill_(2)
    before = bank.params[second].data_ptr()
    for _ in range(20):
        bank.take()
    bank.free(first)
    assert bank.params[second].data_ptr() == before and (bank.params[second] == 2).all()


def test_a_slot_is_wiped_in_place_and_freed_for_good() -> None:
    bank = Bank(LAYOUT, torch.device("cpu"))
    first, second = bank.take(), bank.take()
    for slot in (first, second):
        bank.grads[slot] = torch.ones(LAYOUT.size)
        for rows in (bank.params, bank.exp_avg, bank.exp_avg_sq):
            rows[slot].fill_(1)
        bank.steps[slot] = 9
    bank.wipe(first)
    for rows in (bank.params, bank.exp_avg, bank.exp_avg_sq):
        assert not rows[first].any() and rows[second].all()
    assert bank.steps == {first: 0, second: 9} and list(bank.grads) == [second]
    bank.free(second)
    assert not bank.grads and not bank.is_empty
    assert bank.take() not in (first, second)
    for slot in list(bank.params):
        bank.free(slot)
    assert bank.is_empty and not (bank.exp_avg or bank.exp_avg_sq or bank.steps)


def test_consecutive() -> None:
    assert consecutive([4]) and consecutive([2, 3, 4])
    assert not consecutive([2, 4]) and not consecutive([1, 3, 2, 4])
