"""The method imports only torch."""

import subprocess
import sys

SCRIPT = """
import sys
from importlib.abc import MetaPathFinder

BLOCKED = {"ray", "mlflow", "deepspeed", "webdataset", "open_clip", "timm", "pydantic", "yaml", "numpy.testing"}

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(name + " is refused")
        return None

sys.meta_path.insert(0, Refuse())
import pkgutil, importlib
import pipeline.method
names = [m.name for m in pkgutil.walk_packages(pipeline.method.__path__, "pipeline.method.")]
for name in names:
    importlib.import_module(name)
others = sorted(n for n in sys.modules if n.startswith("pipeline.") and not n.startswith("pipeline.method"))
assert not others, others
print(len(names))
"""


def test_method_imports_without_any_framework() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6
