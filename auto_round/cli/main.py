"""Entry points of the command line: run a verb, and turn an error into one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from auto_round import envs
from auto_round._version import __version__
from auto_round.errors import AutoRoundError, Stopped
from auto_round.logger import logger, setup_logging, warn_once

# Each verb is a module of this folder with a function `run_verb`, imported only when the verb runs.
VERBS = ("quantize", "eval", "generate", "verify", "list")

_OVERVIEW = """
verbs:
  auto-round [quantize] MODEL ...   quantize a model (the default)
  auto-round eval MODEL ...         measure perplexity, KL divergence and agreement; also auto-round-eval
  auto-round generate MODEL ...     continue a prompt, for a first look
  auto-round verify FOLDER          check that the files of a saved model are unchanged
  auto-round list WHAT              format, scheme, algorithm, dataset, backend, env or recipe
  auto-round VERB --help            flags of a verb

recipes, which set only what you leave unset:
  auto-round, auto-round-best, auto-round-light, auto-round-opt-rtn, auto-round-rtn (see auto-round list recipe)

Underscores and dashes in flag names are equal. A message is one line, and the exit code gives its kind:
2 arguments, 3 model, 4 data, 5 device, 6 output, 7 not possible, 8 numbers, 9 verification, 1 anything else,
130 stopped by Ctrl-C, 143 by SIGTERM."""


def _run(recipe: str, named: tuple[str, ...], argv: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments name, or quantize, and return its exit code; an error is one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args == ["--version"]:
            print(f"auto-round {__version__}", flush=True)
            return 0
        setup_logging()
        threads = envs.get("AR_OMP_NUM_THREADS")
        if threads is not None:
            # OpenMP and MKL read these when PyTorch is imported, which has not happened yet.
            os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        for sentence in envs.without_effect():
            warn_once("%s", sentence)
        for name in envs.unknown():
            logger.warning("%s is set but unknown to this version; see auto-round list env", name)
        args = [*named, *args]
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        verb = args[0].replace("--list", "list") if args else ""
        if verb not in VERBS:
            verb, args = "quantize", ["quantize", *args]
        run_verb: Callable[..., int] = import_module(f"auto_round.cli.{verb}").run_verb
        with _sigterm_raises():
            code = run_verb(args[1:], recipe, _OVERVIEW) if verb == "quantize" else run_verb(args[1:])
        sys.stdout.flush()  # here, where a closed pipe is not an error
        return code
    except AutoRoundError as err:
        _print_error(str(err))
        _debug_traceback()
        return err.exit_code
    except Stopped as stop:
        _print_error(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        _print_error("stopped by the user")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) closed the pipe; redirect stdout so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        return _report_unexpected(err)


# The console scripts: auto-round, auto-round-best and so on. Each takes the arguments, or those of the process.
run = partial(_run, "default", ())
run_best = partial(_run, "best", ())
run_light = partial(_run, "light", ())
run_opt_rtn = partial(_run, "opt_rtn", ())
run_rtn = partial(_run, "rtn", ())
run_mllm = run  # the older name
run_eval = partial(_run, "default", ("eval",))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within this context SIGTERM stops the run as Ctrl-C does: finished blocks are kept, and one line says where."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped("stopped by a signal", number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_error(message: str) -> None:
    print(f"auto-round: error: {' '.join(message.split())}", file=sys.stderr)


def _debug_traceback() -> bool:
    # Not through `envs`: a wrong level may be the error that is reported here.
    if os.environ.get("AR_LOG_LEVEL", "").strip().upper() not in ("DEBUG", "TRACE"):
        return False
    traceback.print_exc()
    return True


def _report_unexpected(err: Exception) -> int:
    """Report an error that is not an AutoRoundError: one line, the traceback on the screen (DEBUG) or in a file."""
    summary, where = f"{type(err).__name__}: {err}".rstrip(": "), ""
    if not _debug_traceback():
        text = f"auto-round {__version__}\narguments: {sys.argv[1:]}\n\n{traceback.format_exc()}"
        try:
            folder = envs.work_space()
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            path.write_text(text, encoding="utf-8")
            where = f"; the traceback is in {path}"
        except (OSError, AutoRoundError):  # a full disk, or a work space that is not writable or not valid
            where = "; set AR_LOG_LEVEL=DEBUG to see the traceback"
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        _print_error(
            f"out of memory ({summary}); lower --batch_size (and raise --gradient_accumulate_steps), --seqlen or "
            f"--nsamples, or add --low_gpu_mem_usage{where}"
        )
    else:
        _print_error(f"unexpected error: {summary}{where}")
    return 1
