"""What tracking costs: the time of a training epoch with a run on a slow MLflow server against that without any.

The server is MLflow's own, in a process of its own, behind a proxy that lets every request wait for 50 ms. Each round
trains without, then with it; how it is measured, and what does not count, says `benchmarks.overhead`.

    python -m benchmarks.tracking [--rounds 3] [--cases resnet18 lenet5] [--delay 0.05]
"""

import argparse
import http.client
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from benchmarks import Row, machine, table, workshop
from benchmarks.overhead import CASES, median, train_fovea


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


def forward(port: int, target: int, delay: float) -> None:
    """Serves as the proxy."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline()
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            time.sleep(delay)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection("127.0.0.1", target)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        def log_message(self, *args: object) -> None: ...

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def measure(cases: Sequence[str], rounds: int, delay: float = 0.05) -> Iterator[Row]:
    """A row for each case, of `benchmarks.overhead`.

    Args:
        cases: their names.
        rounds: trainings of each side.
        delay: seconds that each request waits.
    """
    with workshop() as folder:
        behind, before = free_port(), free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(behind), "--workers", "1", "--backend-store-uri",
             "sqlite:///server.db", "--artifacts-destination", "artifacts"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        proxy = multiprocessing.Process(target=forward, args=(before, behind, delay), daemon=True)
        proxy.start()
        try:
            wait_for(behind)
            wait_for(before)
            os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{before}"
            for name in cases:
                case = CASES[name]
                what = f"tracking, {case.title}, a server that takes {1000 * delay:.0f} ms more"
                row = Row(what, case.batches * case.batch_size, [], "the same without tracking", [], "≥ 0.99")
                for number in range(rounds):
                    output = folder / f"{name}-{number}"
                    row.theirs.append(median(train_fovea(case, output / "without", "--trainer.logger=false").epochs))
                    row.ours.append(median(train_fovea(case, output / "tracked").epochs))
                yield row
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            proxy.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training epoch with a slow MLflow server and without any.")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side and case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that each request waits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(options.cases, options.rounds, options.delay))
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
