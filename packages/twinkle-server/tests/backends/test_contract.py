"""Every backend that is shipped keeps the contract."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_moe

from twinkle.server.backends import contract
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.hf.base_model import LoadedModel, load_base_model
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_base_model(ModelConfig(tiny_model_dir))


@pytest.fixture(scope="module")
def loaded_moe(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_base_model(ModelConfig(tiny_moe.save(tmp_path_factory.mktemp("tiny-moe"))))


@pytest.fixture(scope="module")
def loaded_tied(tiny_tied_model_dir: Path) -> LoadedModel:
    return load_base_model(ModelConfig(tiny_tied_model_dir))


def name_of(check: Callable[..., None]) -> str:
    return check.__name__


@pytest.mark.parametrize("check", contract.CHECKS, ids=name_of)
def test_fake(check: contract.Check) -> None:
    check(lambda: FakeBackend(ModelConfig(Path("fake"))))


@pytest.mark.parametrize("check", contract.CHECKS, ids=name_of)
def test_transformers(check: contract.Check, loaded: LoadedModel, tiny_model_dir: Path) -> None:
    check(lambda: TransformersBackend(ModelConfig(tiny_model_dir), loaded))


@pytest.mark.parametrize("check", contract.CHECKS, ids=name_of)
def test_transformers_with_tied_embeddings(
    check: contract.Check, loaded_tied: LoadedModel, tiny_tied_model_dir: Path
) -> None:
    check(lambda: TransformersBackend(ModelConfig(tiny_tied_model_dir), loaded_tied))


@pytest.mark.parametrize("check", contract.CHECKS, ids=name_of)
def test_transformers_with_routed_experts(check: contract.Check, loaded_moe: LoadedModel) -> None:
    check(lambda: TransformersBackend(ModelConfig(Path("tiny-moe")), loaded_moe))
