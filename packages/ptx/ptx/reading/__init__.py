"""PTX as the machine takes it: a kernel's text is read, checked and encoded, once for all launches.

In: the text of a kernel in PTX; the table of opcodes.
Out: a kernel's instructions, registers and constants, encoded; what of its products is misused.
Imports: nothing.
"""
