"""Every test and every notebook run under nbval writes its records to a folder of its own."""

import os
import tempfile
from pathlib import Path

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
SCRATCH = tempfile.TemporaryDirectory(prefix="attention-study-tests-")  # removed when pytest ends
os.environ["ATTENTION_STUDY_OUT"] = SCRATCH.name
if not IS_WORKER:  # all workers have this from the one that started them: its tokens, and an end without a search
    os.environ["ATTENTION_STUDY_CACHE"] = f"{SCRATCH.name}/cache"
    quick_exit = Path(__file__).resolve().parent / "tests" / "quick_exit"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(quick_exit), os.environ.get("PYTHONPATH"))))
else:
    os.environ["OMP_NUM_THREADS"] = "1"  # kernels too: another worker has the other core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
