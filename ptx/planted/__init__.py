"""Plants faults in the package's GPU kernels, in their PTX and in their source, and tells what notices each.

    python -m ptx.planted                     # all calls on all architectures; writes tests/ptx/planted.json
    python -m ptx.planted --limit 0           # every place of every fault, not a few drawn ones: hours

A fault is noticed by an error that ends a launch, by a finding, or by a result outside the tolerance rule. It is harmless where
several seeds give no finding and the very bits of the results without it, and where reasons.py has decided why: by the paths of the
kernel, or by a run with a check in the place of the fault. Without such a reason it counts as unexplained. A fault in what float32
adds to a bfloat16 (the third part of a split number) may differ by a rounding; it counts by itself where that is at most four ulps.
"""
