"""Claims jobs, launches and adopts runs, registers, evaluates and promotes. Does not know the public API."""
