"""What all commands share: how errors are printed, which exit code they give, and how long words are shown.

A ReelforgeError is printed as it is, without a traceback; a traceback on the screen is therefore always a bug. The
module knows no command.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from reelforge.runtime.errors import ReelforgeError
from reelforge.tools.deferred import defer

INTERRUPTED = 130

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug, with a traceback
  2    the command line or the request is not acceptable
  3    the checkpoint is incomplete, damaged, unsafe or of another family
  4    the bundle is missing, damaged or of another schema version
  5    the build could not be finished
  6    numbers differ from the reference by more than the tolerance
  7    the result cannot be written
  8    an engine failed
  9    it was cancelled, or its deadline passed
  130  interrupted with Ctrl-C
"""


class InterruptedRunError(Exception):
    """Ctrl-C, where something is kept of what was done; the text says what, and how to go on."""


def run(command: click.Command, arguments: list[str] | None = None, name: str | None = None) -> NoReturn:
    """Run a command line to its end and exit.

    ReelforgeError gives its text on stderr and its exit code, a wrong option gives click's usage and 2, Ctrl-C gives
    130. Anything else is a bug and keeps its traceback. ``name`` is what usage messages call the program.
    """
    defer()
    try:
        command.main(args=arguments, prog_name=name, standalone_mode=False)
    except ReelforgeError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except InterruptedRunError as error:
        click.echo(str(error), err=True)
        sys.exit(INTERRUPTED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was written.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): be silent, also when Python flushes at exit.
        sys.stdout = None
        sys.exit(0)
    sys.exit(0)


def print_error(error: ReelforgeError) -> None:
    """Print an error to stderr, with its first word in red on a terminal."""
    name, separator, rest = str(error).partition(":")
    click.echo(click.style(name, fg="red", bold=True) + separator + rest, err=True)


def print_notice(text: str) -> None:
    """Print a remark to stderr that does not stop the command."""
    click.echo(click.style("notice", fg="yellow") + f": {text}", err=True)


def format_bytes(count: int) -> str:
    """Return a size for people: ``25.6 GB`` (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
