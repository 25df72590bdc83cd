"""Entry points of the command line: dispatch to a verb, and turn an error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from auto_round import envs
from auto_round._version import __version__
from auto_round.errors import AutoRoundError, OutputError, Stopped
from auto_round.logger import logger, setup_logging, warn_once

_OVERVIEW = """
verbs:
  auto-round [quantize] MODEL ...   quantize a model (the default)
  auto-round eval MODEL ...         measure perplexity, KL divergence and agreement; also auto-round-eval
  auto-round generate MODEL ...     continue a prompt, for a first look
  auto-round verify FOLDER          are the files still those that were saved?
  auto-round list WHAT              format, scheme, algorithm, dataset, backend, env or recipe
  auto-round VERB --help            flags of a verb

recipes, which fill only what you leave unset:
  auto-round, auto-round-best, auto-round-light, auto-round-opt-rtn, auto-round-rtn (see auto-round list recipe)

Underscores and dashes in flag names are equal. A message is one line, and the exit code says what kind it is:
2 arguments, 3 model, 4 data, 5 device, 6 output, 7 not possible, 8 numbers, 9 verification, 1 anything else,
130 stopped by Ctrl-C, 143 by SIGTERM."""


def run(argv: Sequence[str] | None = None) -> int:
    """`auto-round`: the exit code."""
    return _run_guarded(argv, lambda args: _dispatch(args, "default"))


def run_best(argv: Sequence[str] | None = None) -> int:
    """`auto-round-best`."""
    return _run_guarded(argv, lambda args: _dispatch(args, "best"))


def run_light(argv: Sequence[str] | None = None) -> int:
    """`auto-round-light`."""
    return _run_guarded(argv, lambda args: _dispatch(args, "light"))


def run_opt_rtn(argv: Sequence[str] | None = None) -> int:
    """`auto-round-opt-rtn`: tuning off, weighted search on."""
    return _run_guarded(argv, lambda args: _dispatch(args, "opt_rtn"))


def run_rtn(argv: Sequence[str] | None = None) -> int:
    """`auto-round-rtn`: plain rounding to nearest."""
    return _run_guarded(argv, lambda args: _dispatch(args, "rtn"))


def run_mllm(argv: Sequence[str] | None = None) -> int:
    """`auto-round-mllm`, the older name of `auto-round`."""
    return run(argv)


def run_eval(argv: Sequence[str] | None = None) -> int:
    """`auto-round-eval`, the same as `auto-round eval`."""

    def start(args: list[str]) -> int:
        from auto_round.cli.eval import run_verb

        return run_verb(args)

    return _run_guarded(argv, start)


def _dispatch(args: list[str], recipe: str) -> int:
    """Run the verb that `args` names; no verb means quantize. The verbs' modules are imported only when they run."""
    if args and args[0] == "help":
        args = [*args[1:], "--help"]
    if args and args[0] in ("--list", "list"):
        from auto_round.cli.list import run_verb as run_list

        return run_list(args[1:])
    if args and args[0] == "verify":
        from auto_round.cli.verify import run_verb as run_verify

        return run_verify(args[1:])
    if args and args[0] == "eval":
        from auto_round.cli.eval import run_verb as run_evaluation

        return run_evaluation(args[1:])
    if args and args[0] == "generate":
        from auto_round.cli.eval import run_generate

        return run_generate(args[1:])
    if args and args[0] == "quantize":
        args = args[1:]
    from auto_round.cli.quantize import run_verb as run_quantize

    return run_quantize(args, recipe, _OVERVIEW)


def _run_guarded(argv: Sequence[str] | None, start: Callable[[list[str]], int]) -> int:
    """Run `start`; errors leave one line on stderr and their exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args == ["--version"]:
            print(f"auto-round {__version__}", flush=True)
            return 0
        setup_logging()
        _prepare_process()
        with _sigterm_raises():
            code = start(args)
        sys.stdout.flush()  # now, where a reader that has gone is no error
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
        # The reader (head, less) has gone; point stdout elsewhere so that the final flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        return _report_unexpected(err)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """While this is open, SIGTERM stops as Ctrl-C does: what is finished is kept, and one line says where."""

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


def _prepare_process() -> None:
    """What only a program of its own may do: thread count, and a word about variables that mean nothing."""
    threads = envs.get("AR_OMP_NUM_THREADS")
    if threads is not None:
        # Read by OpenMP and MKL when PyTorch is first imported, which no module of the command line has done yet.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    for sentence in envs.without_effect():
        warn_once("%s", sentence)
    for name in envs.unknown():
        logger.warning("%s is set but means nothing in this version; see auto-round list env", name)


def _print_error(message: str) -> None:
    print(f"auto-round: error: {' '.join(message.split())}", file=sys.stderr)


def _debug_traceback() -> bool:
    # Read without checking: a wrong level may be the very error that is being reported.
    if os.environ.get("AR_LOG_LEVEL", "").strip().upper() not in ("DEBUG", "TRACE"):
        return False
    traceback.print_exc()
    return True


def _report_unexpected(err: Exception) -> int:
    """Report a failure nobody planned for: one line, with the traceback on the screen (DEBUG) or in a file."""
    summary = f"{type(err).__name__}: {err}".rstrip(": ")
    debug = _debug_traceback()
    where = "" if debug else f"; {_describe_saved_traceback()}"
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        _print_error(
            f"out of memory ({summary}); lower --batch_size (and raise --gradient_accumulate_steps), --seqlen or "
            f"--nsamples, or add --low_gpu_mem_usage{where}"
        )
        return 1
    _print_error(f"unexpected error: {summary}{where}")
    return 1


def _describe_saved_traceback() -> str:
    """Write the traceback down, and say where."""
    try:
        return f"the traceback is in {_write_traceback()}"
    except (OSError, AutoRoundError):  # a full disk, or a work space that cannot be written
        return "set AR_LOG_LEVEL=DEBUG to see the traceback"


def _write_traceback() -> str:
    folder = envs.work_space()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = f"auto-round {__version__}\narguments: {sys.argv[1:]}\n\n{traceback.format_exc()}"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise OutputError(f"{path} cannot be written: {err}") from err
    return str(path)
