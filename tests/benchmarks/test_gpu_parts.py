"""What `benchmarks/gpu.py` is made of: the report, the reckoning, and checks that find what is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import checks, device, memory, models, syncs, training
from on_gpu.reckoning import Work
from on_gpu.report import Part, Report, Skipped
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from twinkle.server.backends.protocol import AdapterSpec, AdapterState
from twinkle.server.samplers.transformers import TransformersEngine

CPU = torch.device("cpu")


def saved(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "report.json").read_text(encoding="utf-8"))["parts"]


# ---------------------------------------------------------------- the report


def test_a_part_that_fails_is_reported_and_the_next_one_is_done(tmp_path: Path) -> None:
    report = Report(tmp_path, 1, {"device": "none"})

    def fails(part: Part) -> None:
        report.add(part, {"case": "first", "value": 12.5})
        report.attempt(part, "second", lambda: part.rows[7])
        report.add(part, {"case": "third", "other": 1})
        raise ValueError("broken")

    def cannot(part: Part) -> None:
        raise Skipped("there is no such device")

    report.do("one", fails)
    report.do("two", cannot)
    report.do("three", lambda part: report.add(part, {"x": 1}))
    assert [(part["name"], part["status"]) for part in saved(tmp_path)] == [
        ("one", "failed"),
        ("two", "skipped"),
        ("three", "passed"),
    ]
    second, last = saved(tmp_path)[0]["problems"]
    assert second.startswith("second: ") and "IndexError" in second and "ValueError: broken" in last
    assert report.failed == ["one"]
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| case | value | other |\n| --- | --- | --- |\n| first | 12.5 |  |\n| third |  | 1 |" in page
    assert "there is no such device" in page and "ValueError: broken" in page


def test_a_run_that_is_cut_off_has_left_what_it_had(tmp_path: Path) -> None:
    report = Report(tmp_path, 1, {})

    def is_cut_off(part: Part) -> None:
        report.add(part, {"case": "first"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.do("one", is_cut_off)
    [part] = saved(tmp_path)
    assert (part["status"], part["rows"], part["seconds"]) == ("running", [{"case": "first"}], None)


def test_a_part_for_which_there_is_no_time_is_skipped(tmp_path: Path) -> None:
    report = Report(tmp_path, 0.1, {})
    report.do("long", lambda part: pytest.fail("it was begun"), needs_seconds=60)
    report.do("short", lambda part: None, needs_seconds=1)
    long, short = saved(tmp_path)
    assert long["status"] == "skipped" and "of the 60 that it may take" in long["notes"][0]
    assert short["status"] == "passed"


# ---------------------------------------------------------------- the reckoning


@pytest.mark.parametrize(("name", "parameters"), [("Qwen3-0.6B", 596_049_920), ("Qwen3-4B", 4_022_468_096)])
def test_sizes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    """The embedding is the head too, and so is multiplied with."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config_of(name, is_toy=False), dtype=torch.bfloat16)
    assert Work.of(model).weights == parameters


def test_a_training_step_takes_the_operations_that_torch_counts() -> None:
    """PEFT on all linear layers, forward and backward; attention without mask, of which a causal one is a half."""
    length = 40
    config = models.config_of("Qwen3-4B", is_toy=True)
    config._attn_implementation = "eager"
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    work = Work.of(base)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=layers))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # With a gradient, so that the first layer's is not left out.
    inputs = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    whole = 12 * work.full_layers * length * work.query_width
    causal = 6 * work.full_layers * (length + 1) * work.query_width
    expected = counter.get_total_flops() / length - whole + causal
    # Norms are weights, and no product; rope's angles are one, and no weights.
    assert work.training_flops(numbers, length) == pytest.approx(expected, rel=0.01)


def test_a_decode_step_of_qwen3_4b_by_hand() -> None:
    with torch.device("meta"):
        config = models.config_of("Qwen3-4B", is_toy=False)
        work = Work.of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    weights = 2 * 4_022_468_096
    token = 36 * 2 * 8 * 128 * 2  # layers, keys and values, heads, size, bytes
    assert work.decode_bytes(256, 1024, adapters=0, adapter_numbers=0) == weights + 256 * 1024 * token
    assert work.decode_bytes(1, 1, adapters=8, adapter_numbers=1000) == weights + 2 * 8000 + token


def test_states_of_linear_attention_are_read_and_written() -> None:
    with torch.device("meta"):
        config = models.config_of("Qwen3.5-4B", is_toy=False)
        work = Work.of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    state = 32 * 128 * 128 * 4 + (16 * 128 + 16 * 128 + 32 * 128) * 4 * 2
    one, two = (work.decode_bytes(n, 0, adapters=0, adapter_numbers=0) for n in (1, 2))
    assert two - one == 24 * 2 * state
    assert work.decode_bytes(1, 1, 0, 0) - one == 8 * 2 * 4 * 256 * 2


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128>", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "linear attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums and norms"),
        ("void at::native::index_elementwise_kernel<128, 4>", "indexing"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("ncclDevKernel", "other"),
    ],
)
def test_kernels_have_their_classes(kernel: str, expected: str) -> None:
    assert device.class_of(kernel) == expected


# ---------------------------------------------------------------- the checks


def test_a_sampler_with_other_weights_than_the_trainer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = checks.trained_adapter

    def other(*arguments: Any) -> AdapterState:
        state = trained(*arguments)
        return replace(state, weights={name: 1.5 * matrix for name, matrix in state.weights.items()})

    monkeypatch.setattr(checks, "trained_adapter", other)
    report, part = Report(tmp_path, 1, {}), Part("sampler")
    checks.check_sampler(report, part, "Qwen3-4B", CPU, "float32")
    [problem] = part.problems
    assert problem.startswith("trainer: log-probabilities differ")


def test_only_float32_is_held_to_the_contracts_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(make: object) -> None:
        raise AssertionError("1 > 0")

    def crashes(make: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(checks.contract, "CHECKS", (differs, crashes))
    found: dict[str, list[str]] = {}
    for dtype in ("float32", "bfloat16"):
        part = Part(dtype)
        checks.check_contract(Report(tmp_path, 1, {}), part, CPU, dtype)
        assert [row["check"] for row in part.rows] == ["differs", "crashes"]
        found[dtype] = [problem.partition(":")[0] for problem in part.problems]
    assert found == {"float32": ["differs", "crashes"], "bfloat16": ["crashes"]}


def test_a_case_that_runs_out_of_memory_is_tried_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        made = models.make(stack, models.config_of("Qwen3-4B", is_toy=True), CPU, "float32")
        backend = made.backend()
        stack.callback(backend.close)
        compute = backend.forward_backward
        sizes: list[int] = []

        def lacks_memory(batches: list[list[Any]]) -> object:
            sizes.append(max(sum(len(row.tokens) for row in rows) for rows in batches))
            if sizes[-1] > 512:
                raise torch.OutOfMemoryError("out of memory")
            return compute(batches)

        monkeypatch.setattr(backend, "forward_backward", lacks_memory)
        ceiling = device.Ceiling(1e12, 1e11, None)
        trainer = training.Trainer(backend, Work.of(made.loaded.model), ceiling, rank=4)
        part = Part("training")
        case = training.Case("cross_entropy", tenants=1, rows=32, length=64)
        trainer.measure(Report(tmp_path, 1, {}), part, case, seconds_left=60)
    [row] = part.rows
    assert (row["micro-batches"], row["tokens in a micro-batch"]) == (4, 512)
    assert sizes[:3] == [2048, 1024, 512]
    assert len(part.notes) == 2


# ---------------------------------------------------------------- what only a GPU does, as far as a CPU can


@pytest.fixture(scope="module")
def toy() -> Iterator[models.Made]:
    with ExitStack() as stack:
        yield models.make(stack, models.config_of("Qwen3-4B", is_toy=True), CPU, "float32")


def test_decoding_steps_and_draws_go_on(toy: models.Made) -> None:
    with ExitStack() as stack:
        backend = toy.backend()
        stack.callback(backend.close)
        states = [models.trained_adapter(backend, name, spec) for name, spec in checks.SPECS.items()]
        running, step, draw = syncs.decoding(toy, states)
        for _ in range(3):
            step()
            draw()
    assert {len(sequence.tokens) for sequence in running.sequences} == {4}  # one is of the prompt


def test_lines_that_wait_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    [(place, count)] = syncs.waits(work).items()
    assert place.startswith("benchmarks/test_gpu_parts.py:") and count == 3
    assert modes == ["warn", "default"]


def test_the_first_line_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def work(message: str) -> None:
        raise RuntimeError(message)

    assert syncs.first_wait(lambda: work("called a synchronizing CUDA operation")).startswith(
        "benchmarks/test_gpu"
    )
    assert syncs.first_wait(lambda: None) == "no line"
    with pytest.raises(RuntimeError, match="something else"):
        syncs.first_wait(lambda: work("something else"))


@pytest.mark.parametrize("spoils", [False, True])
def test_a_drill_notices_what_a_failed_pass_has_changed(
    toy: models.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoils: bool
) -> None:
    with ExitStack() as stack:
        backend = toy.backend()
        stack.callback(backend.close)
        backend.add_adapter(training.adapter_name(0), AdapterSpec(rank=4))
        before = memory.train(backend, memory.SMALL)
        compute = backend.forward_backward

        def lacks_memory(batches: list[list[Any]]) -> object:
            if sum(len(row.tokens) for row in batches[0]) == memory.LARGE.tokens:
                if spoils:
                    compute([memory.SMALL.rows_of(0, 100)])
                raise torch.OutOfMemoryError("out of memory")
            return compute(batches)

        monkeypatch.setattr(backend, "forward_backward", lacks_memory)
        part = Part("drill")
        memory.drill_training(Report(tmp_path, 1, {}), part, backend, before)
    assert part.problems == (["the gradient has changed by a pass that failed"] if spoils else [])


def test_a_drill_with_enough_memory_has_tried_nothing(
    toy: models.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROMPT", 8)
    monkeypatch.setattr(memory, "TOKENS", 4)
    with ExitStack() as stack:
        engine = TransformersEngine(toy.loaded, toy.config)
        stack.callback(engine.close)
        part = Part("drill")
        memory.drill_sampling(Report(tmp_path, 1, {}), part, engine)
    assert part.rows[0]["found"] == "64 complete"
    assert part.problems == ["the samples fitted into the memory there was: nothing was tried"]
