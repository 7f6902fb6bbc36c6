"""`VLATTN_PTX=90 python -m ptx ...` is `vlattn ...` with the kernels of GPUs emulated on CPU tensors."""

import os
import sys

from ptx.package import install
from vlattn_fast.cli import main

install(os.environ.get("VLATTN_PTX", "90"))
sys.exit(main())
