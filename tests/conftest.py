"""One thread per test process: the tensors are tiny, and threads waiting for each other on busy cores cost minutes.

And a cache folder of its own, so that tests leave nothing in the user's.
"""

import os
import tempfile

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
_cache = tempfile.TemporaryDirectory(prefix="test-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
torch.set_num_threads(1)
