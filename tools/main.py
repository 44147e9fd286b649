"""The ``reelforge`` command: a group whose commands are imported when they are called.

To add a command, add one line to ``COMMANDS``. ``reelforge --help`` shows the summaries below without importing
anything, so the runtime's commands work where the compiler's libraries are not installed.
"""

from __future__ import annotations

import importlib
from typing import NoReturn

import click

from reelforge.tools import console

# name -> (where the click command is, what `reelforge --help` says about it)
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("reelforge.tools.bench_command:bench", "Run one of the project's benchmarks, or list them."),
    "cache": ("reelforge.tools.cache:cache", "Show the cache of compiled plans, or make room in it."),
    "calibrate": ("reelforge.tools.calibrate:calibrate", "Find the scales for layers in 8 bits."),
    "decode": ("reelforge.tools.decode:decode", "Make a video of latents that were saved."),
    "export-triton": ("reelforge.tools.export_triton:export_triton", "Write a model repository for Triton."),
    "generate": ("reelforge.tools.generate:generate", "Generate a video from a prompt."),
    "inspect": ("reelforge.tools.inspect_bundle:inspect", "Show what a bundle contains and where it came from."),
    "measure-coefficients": (
        "reelforge.tools.measure_coefficients:measure_coefficients",
        "Measure what --step-cache teacache needs.",
    ),
    "measure-ratios": ("reelforge.tools.measure_ratios:measure_ratios", "Measure what --step-cache magcache needs."),
    "plan": ("reelforge.tools.plan:plan", "Predict what a build and its videos cost."),
    "profile": ("reelforge.tools.profile:profile", "Measure where a bundle's time goes, and what would help."),
    "plugins": ("reelforge.tools.plugins_command:plugins", "Show and compile the attention kernels for TensorRT."),
    "recipes": ("reelforge.tools.recipes:recipes", "List the builds that build-engine knows by name."),
    "sensitivity": ("reelforge.tools.sensitivity:sensitivity", "Find the layers that 8 bits cost most."),
    "serve": ("reelforge.tools.serve:serve", "Serve videos over HTTP: a durable jobs API and a web page."),
    "sheet": ("reelforge.tools.contact_sheet:sheet", "Generate clips of several prompts on one picture."),
    "synthesize": ("reelforge.tools.synthesize:command", "Write a checkpoint with invented weights."),
    "verify": ("reelforge.tools.verify:verify", "Compare a bundle's numbers with its checkpoint's."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's name
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reelforge")
def cli() -> None:
    """Text-to-video from compiled bundles, without PyTorch.

    A bundle is made from a checkpoint with `build-engine`; see `build-engine --help`.

    \b
    Examples:
      reelforge inspect my.bundle
      reelforge generate my.bundle -p "a red ball rolls to the left" -o ball.mp4
    """  # noqa: D301 - \b is click's mark for text that it does not wrap


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit (the entry point of the package)."""
    console.run(cli, arguments, "reelforge")
