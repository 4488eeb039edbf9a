"""Right and wrong mathematical answers. What is equal to what is known from mathematics, not from the library."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.reward import MathReward, grade, math_processes

# Boxes that are close to each other are one answer.
LATER = " But that forgets what she sold in May. Let me count again, month by month. It is "

EQUAL = [
    ("72", r"So the answer is \boxed{72}."),
    ("72", "She sold 48 + 24 = 72 clips."),
    ("72", "**Answer: 72**"),
    ("She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "The answer is 72."),
    ("#### 1,000", r"\boxed{1000}"),
    ("1000", r"\boxed{1,000}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"$\frac{3}{4}$", r"\boxed{\frac{6}{8}}"),
    ("3/4", r"\[\boxed{\dfrac{3}{4}}\]"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
    ("50%", r"\boxed{50\%}"),
    ("0.5", "50%"),
    ("[0,1)", "$[0, 1)$"),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ("1,2,3", r"\boxed{1, 2, 3}"),
    ("5", r"\boxed{x = 5}"),
    ("x^2-1", "$(x-1)(x+1)$"),
    (r"\frac{\pi}{4}", r"\boxed{\pi/4}"),
    ("-3", r"\boxed{-3}"),
    ("B", r"\boxed{B}"),
    (r"The sum is $3 + 4$, so it is \boxed{7}.", r"\boxed{7}"),
    (72, "72.0"),
    (0.25, r"\boxed{\frac14}"),
    ("72", r"<think>Maybe \boxed{71}?</think>It is \boxed{72}."),
    ("72", r"so it was 72.</think>\boxed{72}"),
    ("72", r"\boxed{71}." + LATER + r"\boxed{72}."),
]

DIFFERENT = [
    ("72", r"\boxed{71}"),
    ("72", r"\boxed{72}." + LATER + r"\boxed{71}."),
    ("72", r"\boxed{72} or \boxed{73}"),
    ("72", "I don't know."),
    ("72", ""),
    ("72", r"<think>It is \boxed{72}."),
    ("72", r"<think>It is \boxed{72}.</think>"),
    ("72", r"\boxed{72}</think>It is \boxed{71}."),
    ("-3", r"\boxed{3}"),
    (r"\sqrt{2}", r"\boxed{1.41}"),
    ("1/3", r"\boxed{0.33}"),
    ("[0,1)", "$(0,1]$"),
    (r"\{1,2\}", r"\boxed{\{1,2,3\}}"),
    ("x+1", r"\boxed{y+1}"),
    ("B", r"\boxed{C}"),
    ("72", r"\boxed{" + "(" * 1000),
]


# Numbers that six decimals say nothing of, in the ways they are written; and what is near to that.
EQUAL_NUMBERS = [
    ("6.63e-34", "\\boxed{6.63 \\times 10^{-34}}"),
    ("6.63e-34", "\\boxed{6.63e-34}"),
    ("6.63 \\times 10^{-34}", "\\boxed{0.663 \\times 10^{-33}}"),
    ("1e-7", "\\boxed{0.0000001}"),
    ("1e-7", "The answer is 1e-7."),
    ("1e-7", "$\\frac{1}{10000000}$"),
    ("1e-07", "\\boxed{10^{-7}}"),
    ("1/3", "\\boxed{0.333333}"),
    ("1/30", "\\boxed{0.033333}"),
    ("6.02\\times 10^{23}", "\\boxed{60.2\\times 10^{22}}"),
    ("1.5e20", "\\boxed{150000000000000000000}"),
    ("1e10", "\\boxed{10000000000}"),
    ("0.00001%", "\\boxed{0.0000001}"),
    ("[0,0.0000001)", "$[0, 1\\times 10^{-7})$"),
    ("\\{1e-7,2\\}", "\\boxed{\\{2, 0.0000001\\}}"),
    ("(0.0000001, 1)", "\\boxed{(0.0000001, 1)}"),
    ("\\begin{pmatrix}0.0000001 & 1\\end{pmatrix}", "\\boxed{\\begin{pmatrix}0.0000001 & 1\\end{pmatrix}}"),
    ("x=0.0000001", "\\boxed{0.0000001}"),
    ("2e-3", "\\boxed{-3+2e}"),
    ("0.002", "\\boxed{2e-3}"),
    ("50%", "\\boxed{0.5}"),
    ("0.5", "50%"),
    ("50%", "50"),
    ("12.5%", "\\boxed{0.125}"),
    ("\\sqrt{2}", "\\boxed{1.414214}"),
    ("1.0000001e-7", "\\boxed{1e-7}"),
    ("0", "\\boxed{0.0}"),
    ("0.0000001x", "\\boxed{10^{-7}x}"),
    ("-1e-7", "\\boxed{-0.0000001}"),
    ("3.14159", "\\boxed{3.14159}"),
    ("1,000.5", "\\boxed{1000.5}"),
    ("10^{-34}", "\\boxed{1\\times10^{-34}}"),
    ("1e-07", "\\boxed{1.0 \\cdot 10^{-7}}"),
    ("\\frac{2}{3}", "\\boxed{0.666667}"),
    ("e", "\\boxed{2.718282}"),
    ("2e^{3}", "\\boxed{2e^3}"),
]

DIFFERENT_NUMBERS = [
    ("6.63e-34", "\\boxed{9.11e-31}"),
    ("6.63 \\times 10^{-34}", "\\boxed{9.11 \\times 10^{-31}}"),
    ("1e-7", "\\boxed{2e-7}"),
    ("0.0000001", "\\boxed{0.0000002}"),
    ("0", "$10^{-7}$"),
    ("0", "\\boxed{0.0000001}"),
    ("1e-7", "\\boxed{0}"),
    ("0.00001%", "\\boxed{0.00002\\%}"),
    ("1e-7", "\\boxed{-1e-7}"),
    ("10^{-34}", "\\boxed{2 \\times 10^{-34}}"),
    ("[0,0.0000001)", "$[0, 0.0000002)$"),
    ("\\{0.0000001,2\\}", "\\boxed{\\{2, 0.0000002\\}}"),
    ("(0.0000001, 1)", "\\boxed{(0.0000002, 1)}"),
    ("\\begin{pmatrix}0.0000001 & 1\\end{pmatrix}", "\\boxed{\\begin{pmatrix}0.0000002 & 1\\end{pmatrix}}"),
    ("x=0.0000001", "\\boxed{x=0.0000002}"),
    ("x=0.0000001", "\\boxed{0.0000002}"),
    ("1.2345e-7", "\\boxed{1.2346e-7}"),
    ("0.0000001x", "\\boxed{0.0000002x}"),
    ("1e10", "\\boxed{1e11}"),
    ("6.02\\times 10^{23}", "\\boxed{6.03\\times 10^{23}}"),
    ("12345678901234567890", "\\boxed{12345678901234567891}"),
    ("\\frac{1}{10000000}", "\\boxed{\\frac{1}{20000000}}"),
    ("1e-7", "The answer is 2e-7."),
    ("1/3", "\\boxed{0.3333}"),
    ("10^{-20}\\sqrt{2}", "\\boxed{10^{-20}\\sqrt{3}}"),
    ("\\{10^{-20},1\\}", "\\boxed{\\{2\\cdot10^{-20},1\\}}"),
    ("1234567.891", "\\boxed{1234567.892}"),
    ("0.0012345", "\\boxed{0.0012346}"),
    ("0 < x < 0.0000001", "$0 < x < 0.0000002$"),
]


@pytest.mark.parametrize(("truth", "completion"), [*EQUAL, *EQUAL_NUMBERS])
def test_equal_answers_are_right(truth: Any, completion: str) -> None:
    assert MathReward(timeout_seconds=60)(completion, {"answer": truth}) == 1.0


@pytest.mark.parametrize(("truth", "completion"), [*DIFFERENT, *DIFFERENT_NUMBERS])
def test_other_answers_are_wrong(truth: Any, completion: str) -> None:
    assert MathReward(timeout_seconds=60)(completion, {"answer": truth}) == 0.0


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "100000000!"])
def test_an_answer_that_can_not_be_computed_is_wrong(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    assert MathReward(timeout_seconds=0.5)(rf"\boxed{{{answer}}}", {"answer": "72"}) == 0.0
    assert "not comparable to '72'" in caplog.text
    assert MathReward(timeout_seconds=60)(r"\boxed{72}", {"answer": "72"}) == 1.0


def test_several_threads_compare_at_once() -> None:
    completions = [rf"\boxed{{{i}}}" for i in range(20)]
    rows = [{"truth": i - i % 2} for i in range(20)]
    scores = grade(MathReward("truth", timeout_seconds=60), completions, rows, num_threads=2)
    assert scores.tolist() == [1.0, 0.0] * 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "?"},
            "answer: expected the true answer as text or number, got NoneType; the columns are question",
        ),
        ({"answer": ["72"]}, "answer: expected the true answer as text or number, got list"),
        ({"answer": True}, "got bool"),
        ({"answer": "####"}, "answer: no mathematical answer in ''"),
    ],
)
def test_a_row_without_an_answer_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        MathReward()("72", row)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_time_must_be_positive(seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout_seconds: "):
        MathReward(timeout_seconds=seconds)


def test_without_the_library_one_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(math_processes, "_idle", [])
    with pytest.raises(InvalidRequest, match=r"not here.*: pip install 'twinkle-core\[math\]'"):
        MathReward()("72", {"answer": "72"})


def test_a_process_that_was_ended_from_outside_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[math_processes.Process] = []
    monkeypatch.setattr(math_processes, "_idle", idle)
    assert math_processes.compare("72", "72", 60) == "equal"
    idle[0].kill()
    assert math_processes.compare("72", "72", 60) == "equal"
    math_processes._end(idle.pop())


FORKING = r"""
import os, sys
from twinkle.reward import MathReward, math_processes
reward = MathReward(timeout_seconds=60)
assert reward("72", {"answer": "72"}) == 1.0
mine = math_processes._idle[0].pid
child = os.fork()
assert reward("72", {"answer": "73"}) == 0.0
assert (math_processes._idle[0].pid == mine) == (child != 0)
if child:
    assert os.waitpid(child, 0)[1] == 0
sys.exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_forked_processes_have_comparing_processes_of_their_own_and_leave_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", FORKING], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
