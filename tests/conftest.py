"""One thread per test process: the tensors are tiny, and threads waiting for each other on busy cores cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start

import torch

torch.set_num_threads(1)
