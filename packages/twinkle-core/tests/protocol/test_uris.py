import pytest

from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest


@pytest.mark.parametrize("scheme", ["tinker", "twinkle"])
def test_both_schemes_mean_the_same(scheme: str):
    parsed = uris.parse(f"{scheme}://abc:train:0/weights/step-10")
    assert parsed == uris.CheckpointUri("step-10", "abc:train:0", "weights")
    assert str(parsed) == "tinker://abc:train:0/weights/step-10"


def test_a_bare_name_has_no_run():
    assert uris.parse("twinkle://my-lora-checkpoint") == uris.CheckpointUri("my-lora-checkpoint")


@pytest.mark.parametrize(
    "uri",
    [
        "my-lora",
        "http://a/weights/b",
        "twinkle://",
        "twinkle://../weights/x",
        "twinkle://run/weights/..",
        "twinkle://run/weights/a/b",
        "twinkle://run/other/name",
        "twinkle://run/weights/",
        "twinkle:///etc/passwd",
        "twinkle://run/weights/a\x00b",
        "twinkle://run/weights/.hidden",
        "twinkle://run/weights/" + "a" * 129,
    ],
)
def test_anything_else_is_refused_with_the_forms_that_are_allowed(uri: str):
    with pytest.raises(InvalidRequest, match="use "):
        uris.parse(uri)
