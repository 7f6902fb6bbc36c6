"""The CPU kernels: one launcher per operator for csrc/cpu/, called through vlattn_fast/backends/native.py.

A launcher's own time counts on small tensors. It gives torch sizes one by one: a torch.Size takes a microsecond longer to read.

In: the inputs of an operator, checked, as CPU tensors.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, backends.streaming, _ground.
"""
