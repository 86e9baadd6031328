import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

HANGING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from deployments.pools import process_end

process_end._ANSWER_S = 0.2
ThreadPoolExecutor(1).submit(threading.Event().wait)
process_end.end_process_soon()
print("still answering", flush=True)
"""


def test_a_process_ends_though_a_thread_of_it_hangs_but_not_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (1, "still answering\n")
