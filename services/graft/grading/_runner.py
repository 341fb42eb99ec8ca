"""Runs a completion's code, then its tests, inside the sandbox: given to Python as source, standard library only.

Reads three parts from descriptor 3, each a line with its length in bytes and then the bytes: code, tests, proof. The
proof is read when the tests have passed and written to descriptor 4. See `graft.grading.python_tests` for what this
proves and what it does not.
"""

import builtins
import os
import sys
import traceback
import types
import unittest


def main() -> None:
    evaluate, translate, leave, write = exec, compile, os._exit, os.write
    names_of_builtins = vars(builtins)
    plain_builtins = dict(names_of_builtins)
    module = types.ModuleType("completion")
    sys.modules["completion"] = module  # dataclasses and pickle look a class's module up
    status = 1
    try:
        evaluate(translate(take(), "completion.py", "exec"), vars(module))
        names_of_builtins.update(plain_builtins)
        sys.settrace(None)
        sys.setprofile(None)
        # What the code named like a built-in (all, len, ...) must not be what the tests check with.
        names = {name: value for name, value in vars(module).items() if name not in plain_builtins}
        names |= {"__name__": "tests", "__builtins__": builtins, "completion": module}
        before = dict(names)
        evaluate(translate(take(), "tests.py", "exec"), names)
        run_collected({name: value for name, value in names.items() if before.get(name) is not value})
        write(4, take())
        status = 0
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are the code's failures too
        lines = traceback.format_exception_only(error)
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({frame[0].filename}, line {frame[0].lineno})" if frame else ""
        write(2, f"\n{lines[-1].strip() or type(error).__name__}{where}\n".encode("utf-8", "replace"))
    finally:
        leave(status)


def take() -> bytes:
    """The next part of the program."""
    length = b""
    while not length.endswith(b"\n"):
        length += os.read(3, 1)
    wanted, part = int(length), b""
    while len(part) < wanted:
        part += os.read(3, wanted - len(part))
    return part


def run_collected(defined: dict[str, object]) -> None:
    """Calls what tests define rather than do: functions named test…, and unittest's cases."""
    for name, value in defined.items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            for _, trace in result.failures + result.errors:
                raise AssertionError(f"{name}: {trace.strip().splitlines()[-1]}")
            if result.unexpectedSuccesses:
                raise AssertionError(f"{name}: an unexpected success")
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            value()


main()
