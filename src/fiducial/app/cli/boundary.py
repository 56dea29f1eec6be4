"""The outermost boundary: whatever ends a command becomes an exit code and at most a few lines.

Exit codes: 0 done and nothing objected, 1 done and a gate refused or a weakness was found, 2 could not run, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from fiducial.app.cli.commands import Group, NoSuchName
from fiducial.app.cli.output import Output, UnwritableError, give_streams, one_line, settle, tell
from fiducial.core.errors import FiducialError, StorageError, nearest

DONE, OBJECTED, FAILED, INTERRUPTED = 0, 1, 2, 130


class Program(Group):
    """The root command. Its `main` always ends in SystemExit with one of the four exit codes."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any) -> NoReturn:
        """Runs the command line `args` (of the process when None)."""
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or "fiducial"
        self._complete(name)
        output = Output.of(words)
        give_streams()
        with _warnings(output):
            code = self._run(words, name, output)
        try:
            settle()
        except UnwritableError as error:
            code = _unwritable(error)
        sys.exit(code)

    def _run(self, words: list[str], name: str, output: Output) -> int:
        """The one place where every exception is met; each branch names what it stands for."""
        try:
            with self.make_context(name, list(words), obj=output) as context:
                code = self.invoke(context)
            return code if isinstance(code, int) else DONE
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.UsageError as error:
            return _usage(error, output)
        except click.ClickException as error:
            output.fail("usage", error.format_message())
            return FAILED
        except (KeyboardInterrupt, EOFError, click.Abort):
            return _interrupted(words, output)
        except UnwritableError as error:
            return _unwritable(error)
        except FiducialError as error:
            _trace(output)
            output.refuse(error)
            return FAILED
        except BrokenPipeError:
            return DONE
        except OSError as error:
            return _system(error, output)
        except Exception as error:
            return _fault(error, output)

    def _complete(self, name: str) -> None:
        """Answers the shell when it asks for completions, as click's own `main` does."""
        variable = "_" + name.replace("-", "_").upper() + "_COMPLETE"
        if instruction := os.environ.get(variable):
            from click.shell_completion import shell_complete

            sys.exit(shell_complete(self, {}, name, variable, instruction))


def _unwritable(error: UnwritableError) -> int:
    """The result has nowhere to go; an object with the error has neither."""
    Output().refuse(error)
    return FAILED


def _usage(error: click.UsageError, output: Output) -> int:
    """A command line that cannot be understood: the nearest name is offered."""
    context = error.ctx
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        if output.json:
            output.fail("usage", "a command is needed", f"see: {context.command_path} --help" if context else "")
        else:
            tell(sys.stderr, error.format_message())
        return FAILED
    message, hint = error.format_message(), f"see: {context.command_path} --help" if context else ""
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [name for parameter in context.command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
        message, hint = f"{context.command_path} has no option '{error.option_name}'", nearest(error.option_name, known)
    elif isinstance(error, NoSuchName):
        hint = error.hint
    output.fail("usage", message, hint)
    return FAILED


def _interrupted(words: list[str], output: Output) -> int:
    """The last line names the command that goes on."""
    command = output.resume or "fiducial " + shlex.join(words)
    hint = f"go on with: {command}" if output.resume else f"start again with: {command}"
    if output.json:
        output.fail("interrupted", "interrupted", hint)
    else:
        tell(sys.stderr, f"\ninterrupted{'; what was done is kept in ' + output.run if output.run else ''}\n{one_line(hint)}")
    return INTERRUPTED


def _system(error: OSError, output: Output) -> int:
    """What the operating system refused: the user's to mend where a file is named or the disk is full, otherwise a fault of ours."""
    translated = StorageError.from_os(error, error.filename or "the results")
    if error.filename is None and translated.message.startswith("the results:"):
        return _fault(error, output)
    _trace(output)
    output.refuse(translated)
    return FAILED


def _fault(error: Exception, output: Output) -> int:
    """A fault of the program: one line, and the traceback in a file."""
    text = traceback.format_exc()
    if output.debug:
        tell(sys.stderr, text)
    where = "its traceback could not be saved"
    try:
        descriptor, path = tempfile.mkstemp(prefix="fiducial-", suffix=".traceback.txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        where = f"traceback: {path}"
    except OSError:
        pass
    output.fail("internal", f"internal fault, {type(error).__name__}: {one_line(str(error), 200)} ({where})")
    return FAILED


def _trace(output: Output) -> None:
    if output.debug:
        tell(sys.stderr, traceback.format_exc())


@contextmanager
def _warnings(output: Output) -> Iterator[None]:
    """Warnings of the package go to stderr, one line each."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(sys.stderr, f"{record.levelname.lower()}: {one_line(record.getMessage())}")

    handler, logger = Lines(logging.ERROR if output.quiet else logging.WARNING), logging.getLogger("fiducial")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
