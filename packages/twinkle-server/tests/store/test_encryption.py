"""Checkpoints that are encrypted with age, decrypted as their owner would."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fake_service import Tenant, make_service
from trained_states import a_pass, a_step, expected_state

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora import peft_format
from twinkle.server.store import encryption

RECIPIENT = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"


async def test_an_encrypted_export_is_read_by_its_recipient_alone(tmp_path: Path) -> None:
    pyrage = pytest.importorskip("pyrage", reason="needs twinkle-server[age]")
    identity, other = (pyrage.x25519.Identity.generate() for _ in range(2))
    service = make_service(tmp_path)
    await service.start()
    tenant = Tenant(service, "a")
    run = await tenant.run()
    await tenant.do(a_pass(run, 1))
    await tenant.do(a_step(run, 2))
    keys = [str(identity.to_public()), RECIPIENT]
    saved = await tenant.do(
        m.SaveWeightsExternalRequest(model_id=run, path="secret", seq_id=3, age_encryption_recipients=keys)
    )
    uri = uris.parse(saved.path)
    assert uri.run_id and uri.kind
    urls = await tenant.ask(m.GetCheckpointUrls(run_id=uri.run_id, kind=uri.kind, name=uri.name))
    assert urls.urls and all(name.endswith(".age") for name in urls.urls)
    files = tmp_path / "checkpoints" / uri.run_id / uri.kind / uri.name
    assert saved.size_bytes == sum(path.stat().st_size for path in files.iterdir())
    assert {path.name for path in files.iterdir()} == {*urls.urls, "manifest.json"}, "nothing in the clear"

    (tmp_path / "plain").mkdir()
    for name in urls.urls:
        pyrage.decrypt_file(
            str(files / name), str(tmp_path / "plain" / name.removesuffix(".age")), [identity]
        )
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt_file(str(files / name), str(tmp_path / "other"), [other])
    read, expected = peft_format.read(tmp_path / "plain", with_optimizer=False), expected_state(1)
    assert all(np.array_equal(read.weights[name], matrix) for name, matrix in expected.weights.items())

    session = await tenant.session()
    with pytest.raises(InvalidRequest, match="is encrypted for whoever has its keys"):
        await service.submit(
            "a", m.LoadWeightsRequest(session_id=session, model_seq_id=0, path=saved.path, optimizer=False)
        )
    with pytest.raises(InvalidRequest, match=r"'ssh-rsa AAAA' is no public key of age's"):
        await service.submit(
            "a",
            m.SaveWeightsExternalRequest(
                model_id=run, path="x", seq_id=4, age_encryption_recipients=["ssh-rsa AAAA"]
            ),
        )
    await service.close()


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="33 are too many"):
        encryption.check_recipients([RECIPIENT] * 33)


def test_without_pyrage_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(InvalidRequest, match=r"twinkle-server\[age\].*save_weights_external"):
        encryption.check_recipients([RECIPIENT])
