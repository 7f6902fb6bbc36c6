"""`VLATTN_PTX=90 python -m tools.emulated ...` is `vlattn ...` with the kernels of GPUs emulated on CPU tensors."""

import os

from tools.emulated.package import install
from vlattn_fast.cli import main

if __name__ == "__main__":
    install(os.environ.get("VLATTN_PTX", "90"))
    main()
