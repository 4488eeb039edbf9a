"""Routed experts with many adapters' terms: against the formula, row by row, and against PEFT's target_parameters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.lora import experts as lora_experts
from twinkle.server.backends.lora.experts import ExpertTerm, run_experts
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

EXPERTS, HIDDEN, INTERMEDIATE, ROWS = 5, 16, 8, 40

# Ranks, alphas and flags of all kinds; the last has no term on the experts.
TENANTS = {
    "ada": AdapterSpec(rank=8, alpha=32.0, seed=1),
    "bob": AdapterSpec(rank=8, alpha=4.0, seed=2),
    "cyd": AdapterSpec(rank=3, alpha=16.0, seed=3, train_unembed=False),
    "dee": AdapterSpec(rank=1, alpha=2.0, seed=4, train_attn=False, train_unembed=False),
    "eve": AdapterSpec(rank=3, alpha=16.0, seed=5, train_mlp=False),
}


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.save(tmp_path_factory.mktemp("tiny-moe"))


# ---------------------------------------------------------------- run_experts


def make_term(rows: Tensor | None, adapters: int, rank: int) -> ExpertTerm:
    count = ROWS if rows is None else len(rows)
    shapes = ((rank, HIDDEN), (2 * INTERMEDIATE, rank), (rank, INTERMEDIATE), (HIDDEN, rank))
    matrices = [torch.randn(adapters, EXPERTS, *shape, requires_grad=True) for shape in shapes]
    return ExpertTerm(rows, torch.randint(0, adapters, (count,)), *matrices)


def one_by_one(x: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor, terms: list[ExpertTerm]) -> Tensor:
    """The formula, for a row and an expert at a time."""
    out: list[Tensor] = []
    for i, experts in enumerate(expert):
        for e in experts:
            w1, w2 = gate_up[e], down[e]
            for term in terms:
                rows = list(range(ROWS)) if term.rows is None else term.rows.tolist()
                if i in rows:
                    k = term.adapter[rows.index(i)]
                    w1 = w1 + term.gate_up_b[k, e] @ term.gate_up_a[k, e]
                    w2 = w2 + term.down_b[k, e] @ term.down_a[k, e]
            h = w1 @ x[i]
            out.append(w2 @ (silu(h[:INTERMEDIATE]) * h[INTERMEDIATE:]))
    return torch.stack(out).view(*expert.shape, -1)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch before 2.10")
@pytest.mark.parametrize("most_groups", [1023, 4])
@pytest.mark.parametrize("case", ["no term", "some rows", "all rows", "two terms"])
def test_torchs_grouped_product_gives_the_same(
    case: str, most_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU it takes float32 too, and wants the same alignment. More groups than it takes go in parts."""
    monkeypatch.setattr(lora_experts, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(lora_experts, "_MOST_GROUPS", most_groups)
    test_each_row_gets_its_experts_and_its_adapters_terms(case)


@pytest.mark.parametrize("case", ["no term", "some rows", "all rows", "two terms"])
def test_each_row_gets_its_experts_and_its_adapters_terms(case: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, requires_grad=True)
    gate_up, down = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN), torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    expert = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(ROWS)])  # the last one has no row
    mixed = torch.randperm(ROWS)
    terms = {
        "no term": [],
        "some rows": [make_term(mixed[:17], 2, 3)],
        "all rows": [make_term(None, 3, 2)],
        "two terms": [make_term(mixed[:17], 2, 3), make_term(mixed[20:], 3, 2)],
    }[case]
    found = run_experts(x, expert, gate_up, down, silu, terms)
    expected = one_by_one(x, expert, gate_up, down, terms)
    assert relative_error(found, expected) < 1e-6
    leaves = [x, *(m for t in terms for m in (t.gate_up_a, t.gate_up_b, t.down_a, t.down_b))]
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad((found * direction).sum(), leaves)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    for one, other in zip(gradients, wanted, strict=True):
        assert relative_error(one, other) < 1e-6
    flat = run_experts(x, expert[:, 0], gate_up, down, silu, terms)
    assert relative_error(flat, found[:, 0]) < 1e-6


def test_no_rows_are_still_in_the_graph() -> None:
    """Ranks that share out experts must all take part in the backward pass."""
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    term = make_term(nothing, 2, 3)
    weights = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN), torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    out = run_experts(x, nothing, *weights, silu, [term])
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, HIDDEN)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------- in the backend


def test_without_a_term_the_numbers_are_the_plain_models(moe_dir: Path, random_row: Any) -> None:
    """Also of rows that have none beside rows that have one, and of a new adapter, whose term is zero."""
    backend = TransformersBackend(ModelConfig(moe_dir))
    for who in ("ada", "eve"):
        backend.add_adapter(who, TENANTS[who])
    rows = [random_row(who, 30, i, vocab_size=128) for i, who in enumerate(("eve", "ada"))]
    plain = load_base_model(ModelConfig(moe_dir)).model
    for micro_batch in (rows[:1], rows):
        [results] = backend.forward_backward([micro_batch])
        for row, result in zip(micro_batch, results, strict=True):
            with torch.no_grad():
                logits = plain(torch.from_numpy(row.tokens)[None]).logits[0]
            targets = torch.from_numpy(row.loss_inputs["target_tokens"])
            expected = torch.log_softmax(logits, -1)[torch.arange(30), targets]
            np.testing.assert_allclose(result.logprobs, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "tenants", [["ada", "bob"], list(TENANTS)], ids=["two of a rank", "five of all kinds"]
)
def test_tenants_training_at_once_equal_peft_alone(
    tenants: list[str], moe_dir: Path, make_peft: Any, peft_parameters: Any, peft_loss: Any, random_row: Any
) -> None:
    backend = TransformersBackend(ModelConfig(moe_dir))
    for who in tenants:
        backend.add_adapter(who, TENANTS[who])
    peft = {who: make_peft(moe_dir, backend.export_adapter(who, with_optimizer=False)) for who in tenants}
    step = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    optimizers = {who: torch.optim.AdamW(peft_parameters(m).values(), **settings) for who, m in peft.items()}
    for i in range(5):
        counts = {who: 1 + (i + k) % 3 for k, who in enumerate(tenants)}
        rows = {
            who: [random_row(who, 4 + 5 * k, 100 * i + 10 * k + len(who), vocab_size=128) for k in range(n)]
            for who, n in counts.items()
        }
        mixed = [row for k in range(3) for who in rows for row in rows[who][k : k + 1]]
        [results, more] = backend.forward_backward([mixed[:-1], mixed[-1:]])
        losses = [result.loss for result in (*results, *more)]
        for who, model in peft.items():
            optimizers[who].zero_grad()
            loss = peft_loss(model, rows[who])
            own = sum(value for row, value in zip(mixed, losses, strict=True) if row.adapter_id == who)
            assert own == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
            loss.backward()
            expected = {name: parameter.grad.numpy() for name, parameter in peft_parameters(model).items()}
            found = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
            assert found is not None
            assert_close(found, expected, 1e-5)
            of_experts = [name for name in expected if ".experts." in name]
            assert len(of_experts) == (8 if TENANTS[who].train_mlp else 0)
            assert_close({n: found[n] for n in of_experts}, {n: expected[n] for n in of_experts}, 1e-5)
            optimizers[who].step()
        backend.optim_step([AdamStep(who, step) for who in tenants])
    for who, model in peft.items():
        expected = {name: parameter.detach().numpy() for name, parameter in peft_parameters(model).items()}
        assert_close(backend.export_adapter(who, with_optimizer=False).weights, expected, 1e-4)


def test_a_new_adapter_is_uniform_as_peft_draws_it(
    moe_dir: Path, make_peft: Any, peft_parameters: Any
) -> None:
    """Kaiming's bound is that of one matrix [experts * rank, in], 1 / sqrt(in), and all of it is filled."""
    backend = TransformersBackend(ModelConfig(moe_dir))
    backend.add_adapter("a", AdapterSpec(rank=8, seed=3))
    state = backend.export_adapter("a", with_optimizer=False)
    name = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_A.weight"
    ours = state.weights[name]
    model = make_peft(moe_dir, state)
    layer: Any = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    assert layer.parameter_name == "down_proj"
    layer.reset_lora_parameters("default", True)
    theirs = peft_parameters(model)[name].detach().numpy()
    assert ours.shape == theirs.shape == (4 * 8, 16) and not np.array_equal(ours, theirs)
    for matrix in (ours, theirs):
        assert 0.98 / 4 < np.abs(matrix).max() <= 1 / 4
        assert abs(matrix.std() - 1 / (4 * np.sqrt(3))) < 0.01


def test_half_precision_experts_train_with_float32_adapters(moe_dir: Path, random_row: Any) -> None:
    losses: list[float] = []
    for dtype in ("float32", "bfloat16"):
        backend = TransformersBackend(ModelConfig(moe_dir, torch_dtype=dtype))
        for who, spec in TENANTS.items():
            backend.add_adapter(who, spec)
        rows = [random_row(who, 6 + i, i, vocab_size=128) for i, who in enumerate(TENANTS)]
        for _ in range(2):
            backend.forward_backward([rows])
            backend.optim_step([AdamStep(who, AdamParams(learning_rate=1e-3)) for who in TENANTS])
        [results] = backend.forward_backward([rows])
        losses.append(sum(result.loss for result in results))
        weights = backend.export_adapter("dee", with_optimizer=False).weights
        assert all(np.isfinite(matrix).all() for matrix in weights.values())
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.5)


def test_models_without_experts_have_nothing_wrapped(tiny_model_dir: Path) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    kinds = {type(module).__name__ for module in backend._networks.first.body.modules()}
    assert (
        "LoraLinear" in kinds
        and "ExpertsWithLora" not in kinds
        and isinstance(backend._networks.first.body, nn.Module)
    )
