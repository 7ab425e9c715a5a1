"""What the HTTP layer must not bring with it."""

import subprocess
import sys


def test_http_layer_imports_no_torch() -> None:
    code = "import sys, buddy_server.api.app; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
