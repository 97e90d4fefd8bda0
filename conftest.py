"""Every test and every notebook run under nbval writes its records to a folder of its own."""

import os
import tempfile

SCRATCH = tempfile.TemporaryDirectory(prefix="attention-study-tests-")  # removed when pytest ends
os.environ["ATTENTION_STUDY_OUT"] = SCRATCH.name
os.environ["ATTENTION_STUDY_CACHE"] = f"{SCRATCH.name}/cache"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
