"""Three processes of one process group, shared by all tests, since starting processes takes longer than most tests."""

import pickle
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

NUMBER = 3
SECONDS = 240
CONTEXT = get_context("forkserver")  # which imports packages once for all processes
CONTEXT.set_forkserver_preload(["lightning_invariance", "lightning.pytorch", "scipy.stats"])


class Ranks:
    """Runs functions on every rank; the processes start with the first call.

    Args:
        folder: where the processes meet.
    """

    def __init__(self, folder):
        self.folder = folder
        self.starts, self.processes, self.connections = 0, [], []

    def __call__(self, function, *args):
        """Return what ``function(*args)`` returns on each rank, a list; raise where it raises on one of them."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, args)))
        returned, waiting = {}, list(self.connections)
        while waiting:
            ready = wait(waiting, SECONDS)
            errors = [] if ready else [f"no answer of {len(waiting)} ranks within {SECONDS} s"]
            for connection in ready:
                waiting.remove(connection)
                try:
                    error, returned[connection] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    error = "a rank has died"
                errors += [error] if error else []
            if errors:  # the other ranks may wait for this one without end
                self.stop()
                raise RuntimeError("\n".join(errors))
        return [returned[connection] for connection in self.connections]

    def start(self):
        self.starts += 1
        meeting = f"file://{self.folder}/{self.starts}"
        for rank in range(NUMBER):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(rank, meeting, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def stop(self):
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.terminate()
            process.join()
        self.processes, self.connections = [], []


def serve(rank, meeting, connection):
    """Run functions until the connection is closed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=NUMBER)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = None, function(*args)
        except Exception:
            answer = f"on rank {rank}:\n{traceback.format_exc()}", None
        connection.send_bytes(pickle.dumps(answer))
