"""Plants faults in the package's GPU kernels, in their PTX and in their source, and tells what notices each.

    python -m tools.planted                     # all calls on all architectures; writes tests/compiled/planted.json
    python -m tools.planted --limit 0           # every place of every fault, not a few drawn ones: hours
    python -m tools.planted --core 200          # faults in the core's own source instead (core.py)

A fault is noticed by an error that ends a launch, by a finding, or by a result outside the tolerance rule. It is harmless where
several seeds give no finding and the very bits of the results without it, and where reasons.py has decided why: by the paths of
the kernel, or by a run with a check in the place of the fault. It is within the tolerance where it changes bits and reasons.py
has decided why so little: a later part of a split number makes up for it, it is a term of a series, or a sum corrects it. All
else is unexplained.
"""
