"""What a weights folder is: version, defects, the values in force, and what its training data allow: `defectcam info`.

The terms of a defect are the strictest of its data sets, those of the folder the strictest of its defects: "unknown" is
stricter than "research only", and that is stricter than "free".

Example:
    defectcam info --weights out/weights
"""

from __future__ import annotations

from collections.abc import Sequence

from defectcam.command_line import command_parser
from defectcam.weights import Weights, WeightsError, add_weights_option, load_weights


def lines_of(weights: Weights) -> list[str]:
    """The report on a weights folder."""
    lines = [f"weights {weights.version} in {weights.folder.resolve()}", f"terms: {weights.terms}"]
    for defect, config in weights.configs.items():
        lines += [
            "",
            f"{defect}: encoder {config.encoder}, finest scale {config.finest_scale:g}, T {config.iterations}, "
            f"threshold {config.threshold:g}, theta {config.cam_threshold:g}",
            f"  terms: {config.terms}",
        ]
        width = max(map(len, config.licences), default=0)
        for name, licence in config.licences.items():
            lines.append(f"    {name:{width}}  {licence['terms']:13}  {licence['licence']} ({licence['source']})")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam info`."""
    parser = command_parser("info", __doc__)
    add_weights_option(parser)
    args = parser.parse_args(argv)
    try:
        weights = load_weights(args.weights)
    except WeightsError as error:
        parser.error(str(error))
    print("\n".join(lines_of(weights)))


if __name__ == "__main__":
    main()
