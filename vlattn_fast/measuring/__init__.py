"""What measurements share: files of their records, figures of them, the origin that a record
names, the memory of a call.

In: records and calls.
Out: files and tables, commits and versions, bytes and seconds.
Imports: interpret.dataset, _ground.
"""
