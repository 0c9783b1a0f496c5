"""What the server remembers of each browser session: the running answer's stop switch, the last answer and its files.

Conversations are not here: they live in the page of the person who has them. It knows nothing of Gradio.
"""

import secrets
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

from mllm_demo.chat.events import EngineStatus, Finished
from mllm_demo.routing.trace import RoutingTrace

MAX_SESSIONS = 256


@dataclass
class _Session:
    stop: threading.Event = field(default_factory=threading.Event)
    trace: RoutingTrace | None = None
    finished: tuple[EngineStatus, Finished] | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    def drop(self) -> None:
        self.stop.set()
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)


class Sessions:
    """Thread-safe; one object per page. The session unused for longest is dropped beyond `capacity`."""

    def __init__(self, capacity: int = MAX_SESSIONS) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        # Not a TemporaryDirectory, which warns when it is collected without having been closed: pages just end.
        self._folder = Path(tempfile.mkdtemp(prefix="routing-traces-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def begin(self, key: str) -> threading.Event:
        """A fresh stop switch for a new answer; an answer still running in this session is stopped."""
        with self._lock:
            session = self._sessions.setdefault(key, _Session())
            self._sessions.move_to_end(key)
            session.stop.set()
            session.stop = threading.Event()
            while len(self._sessions) > self._capacity:
                _, oldest = self._sessions.popitem(last=False)
                oldest.drop()
            return session.stop

    def is_current(self, key: str, stop: threading.Event) -> bool:
        """False once another answer began in this session, or the session is gone."""
        with self._lock:
            session = self._sessions.get(key)
            return session is not None and session.stop is stop

    def stop(self, key: str) -> None:
        """Stops the running answer, if there is one."""
        with self._lock:
            if session := self._sessions.get(key):
                session.stop.set()

    def forget(self, key: str) -> None:
        """The tab was closed: stops its answer and drops its trace."""
        with self._lock:
            if session := self._sessions.pop(key, None):
                session.drop()

    def keep_trace(self, key: str, trace: RoutingTrace | None) -> None:
        with self._lock:
            self._sessions.setdefault(key, _Session()).trace = trace

    def keep_answer(self, key: str, status: EngineStatus, answer: Finished) -> None:
        """What was answered, by the model of `status`."""
        with self._lock:
            session = self._sessions.setdefault(key, _Session())
            session.trace, session.finished = answer.trace, (status, replace(answer, trace=None))

    def last_answer(self, key: str, status: EngineStatus) -> Finished | None:
        """The last answer, without its trace, if the model of `status` gave it."""
        with self._lock:
            session = self._sessions.get(key)
            by, answer = session.finished if session and session.finished else (None, None)
            return answer if by == status else None

    def trace(self, key: str) -> RoutingTrace | None:
        with self._lock:
            session = self._sessions.get(key)
            return session.trace if session else None

    def save_trace(self, key: str, trace: RoutingTrace) -> Path:
        """Writes the trace for its owner to download, in place of an earlier one; nobody can guess the path."""
        return trace.save(self._fresh_folder(key, "trace") / "routing_trace.safetensors")

    def save_drawing(self, key: str, png: bytes, name: str) -> Path:
        """Writes the picture beside an answer, in place of an earlier one, which the page has copied by then."""
        path = self._fresh_folder(key, "drawing") / f"{name}.png"
        path.write_bytes(png)
        return path

    def _fresh_folder(self, key: str, purpose: str) -> Path:
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir()
        with self._lock:
            session = self._sessions.setdefault(key, _Session())
            former, session.folders[purpose] = session.folders.get(purpose), folder
        if former:
            shutil.rmtree(former, ignore_errors=True)
        return folder

    def close(self) -> None:
        """Forgets everybody and removes every file."""
        for key in list(self._sessions):
            self.forget(key)
        self._remove()
