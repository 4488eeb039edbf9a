"""Messages and trajectories are the dictionaries that JSON gives."""

import json

from twinkle.data_format import FunctionCall, Message, ToolCall, Trajectory


def test_a_message_is_the_dict_that_json_gives() -> None:
    message = Message(role="system", content="You are a helpful assistant")
    assert message == json.loads('{"role": "system", "content": "You are a helpful assistant"}')


def test_a_trajectory_goes_through_json_unchanged() -> None:
    call = ToolCall(type="function", id="c1", function=FunctionCall(name="add", arguments={"a": 1, "b": 2}))
    trajectory = Trajectory(
        messages=[
            Message(role="user", content="1 + 2?"),
            Message(role="assistant", content="", reasoning_content="a sum", tool_calls=[call]),
            Message(role="tool", content="3", tool_call_id="c1", name="add"),
        ],
        tools=[{"type": "function", "function": {"name": "add"}}],
    )
    assert json.loads(json.dumps(trajectory)) == trajectory
