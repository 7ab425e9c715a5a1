import os

import pytest


@pytest.fixture(scope="session")
def base_url() -> str:
    return f"{os.environ['SERVER_URL']}/v1"
