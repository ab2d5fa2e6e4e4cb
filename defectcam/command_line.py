"""The parser of a command, whose help is the module's own text."""

from __future__ import annotations

import argparse


def command_parser(command: str, text: str, **more) -> argparse.ArgumentParser:
    """A parser of `defectcam <command>`.

    Args:
        command: its name, such as "train".
        text: what the command does, then a paragraph that begins with "Example".
        more: further arguments of ArgumentParser.
    """
    what, _, example = text.partition("\n\nExample")
    return argparse.ArgumentParser(
        prog=f"defectcam {command}",
        description=what,
        epilog="Example" + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
