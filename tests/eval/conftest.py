import pytest

from tiny_engine import TinySite, save_tiny_site


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySite:
    return save_tiny_site(tmp_path_factory.mktemp("tiny"))
