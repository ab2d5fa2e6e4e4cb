"""The parser of a command, whose help is the module's own text, and types of options."""

from __future__ import annotations

import argparse


def command_parser(command: str, text: str, appendix: str = "", **more) -> argparse.ArgumentParser:
    """A parser of `defectcam <command>`.

    Args:
        command: its name, such as "train".
        text: what the command does, then a paragraph that begins with "Example".
        appendix: comes after the example.
        more: further arguments of ArgumentParser.
    """
    what, _, example = text.partition("\n\nExample")
    return argparse.ArgumentParser(
        prog=f"defectcam {command}",
        description=what,
        epilog=f"Example{example}\n{appendix}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )


def step_counts(text: str) -> list[int]:
    """"0,2,8" -> [0, 2, 8]."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, nor several with commas between them")
    return [int(part) for part in text.split(",")]


def count(text: str) -> int:
    """A number of 1 or more, as argparse takes it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def numbers(text: str) -> list[int]:
    """"1,5" -> [1, 5]; each 1 or more, as argparse takes it."""
    return [count(number.strip()) for number in text.split(",") if number.strip()]
