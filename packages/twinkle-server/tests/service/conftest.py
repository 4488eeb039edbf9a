from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_service import Tenant, make_service

from twinkle.server.service.service import Service


@pytest.fixture
async def service(tmp_path: Path, database_url: str) -> AsyncIterator[Service]:
    service = make_service(tmp_path, database_url=database_url)
    await service.start()
    yield service
    await service.close()


@pytest.fixture
def alice(service: Service) -> Tenant:
    return Tenant(service, "alice")


@pytest.fixture
def bob(service: Service) -> Tenant:
    return Tenant(service, "bob")
