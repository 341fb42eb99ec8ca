"""How amounts read: bytes and counts, in powers of ten. Shared by the command's tables and the reports."""


def size_text(size_bytes: float) -> str:
    """`1.2 MB`."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count_text(count: int) -> str:
    """`135M`, `1.5B`: as parameters of models are counted, with two digits at least."""
    for power, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= power:
            scaled = count / power
            return f"{scaled:.1f}{letter}" if scaled < 10 else f"{scaled:.0f}{letter}"
    return str(count)
