"""Frozen types, names, the job state machine and the errors. No I/O, and no library but the standard one."""
