"""What `graft.child` may start: does as it is ordered, and says so."""

import os
import shutil
import signal
import time

from graft.child import receive, tell


def main() -> None:
    order = receive(lambda given: shutil.rmtree(given["folder"]))
    print("a library talks")
    os.system("echo and so does C code")
    tell("started", pid=os.getpid())
    match order["then"]:
        case "finish":
            tell("finished")
        case "fail":
            raise SystemExit("it went wrong")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            time.sleep(600)


if __name__ == "__main__":
    main()
