from collections.abc import Callable

import pytest

from buddy_server.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `buddy` in this process, where torch is loaded already. It must refuse; returns the line that says why."""
    monkeypatch.setattr("buddy_server.serve.configure_logs", lambda: None)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        if isinstance(ended.value.code, str):
            said = ended.value.code
        else:
            assert ended.value.code == 2
            said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("buddy ")
        assert "\n" not in said
        return said

    return run
