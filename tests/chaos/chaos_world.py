"""Server, actors and learner as real processes, and everything that can happen to them."""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import chaos_actor
import chaos_learner
from failing_network import Proxy
from server_faults import kill, truncate

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer

RUN = "chaos"
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["__main__", "chaos_actor", "chaos_learner"])


class Child:
    """A process of the test; signalled through its descriptor, so that no other can be meant."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.process: ForkServerProcess = context.Process(target=_run, args=(target, *arguments), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self._descriptor = os.pidfd_open(self.process.pid)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    def __del__(self) -> None:
        os.close(self._descriptor)


def _run(target: Callable[..., None], *arguments: object) -> None:
    faulthandler.enable()
    target(*arguments)


class World:
    """One run. Every fault leaves all processes alive, the restarted ones new."""

    def __init__(self, directory: Path, seed: int, num_actors: int) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        self.faults: Counter[str] = Counter()
        self.num_audits = 0
        self.sessions = 0
        self.zombies: list[Child] = []
        self.agenda = self.rng.sample(sorted(self.kinds()), len(self.kinds()))  # each fault once, before chance decides
        self.server = EmbeddedServer.start(directory)
        self.proxy = Proxy(self.server.url.removeprefix("unix://"))
        self.client = connect(self.server.url, reconnect_seconds=20)
        self.buffer = Buffer(self.client, RUN)
        self.learner = self.new_learner()
        self.actors = [self.new_actor() for _ in range(num_actors)]

    def new_learner(self) -> Child:
        self.sessions += 1
        return Child(chaos_learner.learn, self.server.url, RUN, self.directory, self.sessions)

    def new_actor(self) -> Child:
        return Child(chaos_actor.act, f"redis://127.0.0.1:{self.proxy.port}", RUN, self.rng.getrandbits(32))

    def close(self) -> None:
        for child in [*self.actors, self.learner, *self.zombies]:
            child.kill()
        self.proxy.stop()
        self.client.close()

    def inject(self) -> None:
        """One fault."""
        kinds = self.kinds()
        by_chance = self.rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        name = self.agenda.pop() if self.agenda else by_chance
        self.faults[name] += 1
        kinds[name][1]()
        self.restart_learner()

    def kinds(self) -> dict[str, tuple[int, Callable[[], None]]]:
        """Every fault, and how often it happens compared with others."""
        return {
            "actor killed": (5, self.kill_actor),
            "actor stopped": (4, self.stop_actor),
            "learner killed": (4, self.kill_learner),
            "learner stopped": (2, self.stop_learner),
            "learner made a zombie": (2, self.make_zombie),
            "server killed": (2, self.kill_server),
            "server killed, last moments lost": (2, self.kill_server_and_forget),
            "server and learner killed, last moments lost": (2, self.lose_power),
            "server stopped": (2, self.stop_server),
            "network cut": (4, self.cut_network),
            "network held up": (3, self.hold_network),
        }

    def pause(self, most_seconds: float) -> None:
        time.sleep(self.rng.random() * most_seconds)

    def audit(self) -> None:
        """At this instant every ticket is in exactly one state."""
        ledger = self.buffer.ledger()
        assert ledger.discrepancies == [], (ledger, self.faults)
        self.num_audits += 1

    def restart_learner(self) -> None:
        """A learner that gave up is started again, as a supervisor does; one that was fenced must not be the newest."""
        if not self.learner.alive:
            assert self.learner.exit_code in (-signal.SIGKILL, chaos_learner.UNAVAILABLE), self.learner.exit_code
            self.learner = self.new_learner()

    def kill_actor(self) -> None:
        place = self.rng.randrange(len(self.actors))
        self.actors[place].kill()
        self.actors[place] = self.new_actor()

    def stop_actor(self) -> None:
        actor = self.rng.choice(self.actors)
        self.stop([actor], 1.5 * chaos_actor.LEASE_SECONDS)

    def stop(self, children: Iterable[Child], most_seconds: float) -> None:
        for child in children:
            child.send(signal.SIGSTOP)
        self.pause(most_seconds)
        for child in children:
            child.send(signal.SIGCONT)

    def kill_learner(self) -> None:
        self.learner.kill()

    def stop_learner(self) -> None:
        self.stop([self.learner], 1.0)

    def make_zombie(self) -> None:
        """The learner is stopped, another one takes over, and the first wakes up again."""
        version = self.version()
        self.wait_for(lambda: self.version() > version, 20, "the learner is at work")
        zombie, epoch = self.learner, self.epoch()
        zombie.send(signal.SIGSTOP)
        self.learner = self.new_learner()
        self.wait_for(lambda: self.epoch() > epoch, 20, "another learner begins")
        self.zombies.append(zombie)
        zombie.send(signal.SIGCONT)

    def epoch(self) -> int:
        clock = self.buffer.clock.read()
        return 0 if clock is None else clock.epoch

    def kill_server(self) -> None:
        kill(self.server)
        self.pause(0.5)
        self.server = EmbeddedServer.start(self.directory)

    def lose_power(self) -> None:
        self.kill_server_and_forget(self.kill_learner)

    def kill_server_and_forget(self, before_the_crash: Callable[[], None] = lambda: None) -> None:
        """A crash of the machine: what was not on the disk is gone. Nothing that waits for the disk runs meanwhile."""
        version = self.version()
        self.wait_for(lambda: self.version() > version, 20, "the learner is at work")
        log = self.log()
        size = log.stat().st_size
        self.pause(1.0)
        before_the_crash()
        kill(self.server)
        if self.log() == log:
            truncate(log, size)
        self.server = EmbeddedServer.start(self.directory)

    def log(self) -> Path:
        return max((self.directory / "appendonlydir").glob("*.incr.aof"))

    def version(self) -> int:
        clock = self.buffer.clock.read()
        return -1 if clock is None else clock.version

    def stop_server(self) -> None:
        process = os.pidfd_open(self.server.pid)
        signal.pidfd_send_signal(process, signal.SIGSTOP)
        self.pause(1.5 * chaos_actor.LEASE_SECONDS)
        signal.pidfd_send_signal(process, signal.SIGCONT)
        os.close(process)

    def cut_network(self) -> None:
        self.proxy.cut()

    def hold_network(self) -> None:
        self.proxy.hold()
        self.pause(1.5 * chaos_actor.LEASE_SECONDS)
        if self.rng.random() < 0.5:
            self.proxy.cut()
        self.proxy.release()

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; {self.faults}"
            self.restart_learner()
            time.sleep(0.02)

    def drain(self) -> None:
        """Everybody finishes; whoever does not in time has hung."""
        version = self.version()
        self.wait_for(lambda: self.version() > version + 5, 30, "work goes on after the last fault")
        self.buffer.control.set_state("draining", "the test ends")
        self.wait_for_end([self.learner, *self.actors], chaos_learner.DRAINED)
        self.wait_for_end(self.zombies, chaos_learner.FENCED)

    def wait_for_end(self, children: list[Child], exit_code: int) -> None:
        for child in children:
            child.process.join(30)
            if child.alive:
                child.send(signal.SIGABRT)  # shows where it hangs
            assert child.exit_code == exit_code, (child.exit_code, self.faults)
