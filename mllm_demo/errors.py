"""Every error this program raises on purpose; each message is one sentence that says what to do.

    DemoError
    ├── SettingsError            a flag or environment variable that cannot be used
    ├── LoadError                a model could not be made ready
    │   ├── DownloadError        weights could not be fetched
    │   ├── CheckpointError      weights are there but wrong
    │   ├── AdapterError         the adapter does not fit or cannot be read
    │   └── OutOfMemoryError     the machine is too small
    ├── ImageError               an upload that is not a usable picture
    ├── ContextLengthError       the conversation is longer than the model reads
    ├── GenerationError          the model failed while answering
    │   ├── GenerationTimeout    it took longer than allowed
    │   └── QueueFullError       too many people are waiting
    ├── RoutingError             a router or an expert that the model does not have
    ├── TraceError               a routing trace with a hole, or a file that is not one
    └── DataError                a line of training data, or all of them, cannot be learned from

It knows nothing of how errors are shown; the page and the command line each do that once, at the edge.
"""


class DemoError(Exception):
    """Base of all; `str(error)` is written for the person at the keyboard."""


class SettingsError(DemoError):
    """A flag, environment variable or sampling value is out of range."""


class LoadError(DemoError):
    """A model could not be made ready."""


class DownloadError(LoadError):
    """Weights could not be fetched."""


class CheckpointError(LoadError):
    """Weights were found but are damaged, incomplete or of another model."""


class AdapterError(LoadError):
    """The adapter does not fit the base model or cannot be read."""


class OutOfMemoryError(LoadError):
    """The device does not hold the model."""


class ImageError(DemoError):
    """An upload that is not a usable picture."""


class ContextLengthError(DemoError):
    """The conversation with its images is longer than the model can read."""


class GenerationError(DemoError):
    """The model failed while it was answering."""


class GenerationTimeout(GenerationError):
    """An answer took longer than the time allowed."""


class QueueFullError(GenerationError):
    """Too many people are waiting for the model."""


class RoutingError(DemoError):
    """An intervention names a router or an expert that is not there, or leaves none to choose."""


class TraceError(DemoError):
    """A routing trace has a hole, or a file is not a routing trace."""


class DataError(DemoError):
    """A line of training data cannot be learned from, or no line can."""
