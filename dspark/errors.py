"""The one error tree of the project.

DSparkError                 everything a caller may want to catch
├── UsageError              an option or parameter has a value that cannot be used (exit status 2)
│   └── RecipeError         a recipe has an unknown key or a value that cannot be used
├── CheckpointError         a checkpoint is missing, incomplete, damaged or of an unknown layout
├── CompatibilityError      an architecture is not supported, or drafter and target do not fit
├── DataError               a data file is missing, empty or malformed
├── RequestError            a request cannot be served (empty prompt, longer than the context, ...)
│   ├── QueueFullError      too many requests are waiting already
│   └── UnavailableError    the server is stopping, or its engine has failed
├── NumericsError           a model produced NaN or infinite numbers
└── TrainingError           a training run cannot go on

Each message is one sentence that names the thing, its value and the remedy. What can be done
without is warned of in the same way: `DSparkWarning`, with what is done in its place.
"""


class DSparkError(Exception):
    """Root of every error that this package raises on purpose."""


class UsageError(DSparkError):
    """An option or parameter has a value that cannot be used."""


class RecipeError(UsageError):
    """A recipe has an unknown key or a value that cannot be used."""


class CheckpointError(DSparkError):
    """A checkpoint is missing, incomplete, damaged or of an unknown layout."""


class CompatibilityError(DSparkError):
    """An architecture is not supported, or a drafter does not fit its target."""


class DataError(DSparkError):
    """A data file is missing, empty or malformed."""


class RequestError(DSparkError):
    """A request cannot be served as it was asked."""


class QueueFullError(RequestError):
    """Too many requests are waiting already; this one may be asked again later."""


class UnavailableError(RequestError):
    """The server takes no requests: it is stopping, or its engine has failed."""


class NumericsError(DSparkError):
    """A model produced NaN or infinite numbers."""


class TrainingError(DSparkError):
    """A training run cannot go on."""


class DSparkWarning(UserWarning):
    """Something was left out because it cannot be used; decoding goes on without it."""


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: bytes that are no text come in as half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for a sentence: no line but its first."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
