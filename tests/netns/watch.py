"""Print the names of a scheduler's workers, a line of JSON each time they change. Runs on a host."""

from __future__ import annotations

import json
import sys
import time

from distributed import Client


def main(address: str) -> None:
    last = None
    with Client(address, timeout=60) as client:
        while True:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            names = sorted(str(worker["name"]) for worker in workers)
            if names != last:
                print(json.dumps({"time": time.time(), "workers": names}), flush=True)
                last = names
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
