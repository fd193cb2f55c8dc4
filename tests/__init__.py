"""Tests of both packages, room by room.

Without a GPU the Triton kernels run in Triton's interpreter. It must be chosen before triton is first imported, which
open_clip does: hence here, where every other module of the tests comes later.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
