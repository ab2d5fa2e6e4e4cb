"""The one command line, `defectcam COMMAND ...`; a command's part is imported when it is called."""

import importlib
import sys

COMMANDS = {
    "demo": ("defectcam.demo", "proposals for one photo as JSON and picture"),
    "sweep": ("defectcam.evaluation.sweep", "what T changes: one picture per photo, T = 0, 1, 2, 4, 8 side by side"),
    "serve": ("defectcam.serve", "a page to try it out on your photos, and the function over HTTP without Nuclio"),
    "propose": ("defectcam.bulk.propose", "proposals for a folder of photos, as files for CVAT"),
    "info": ("defectcam.info", "what a weights folder is, and what its training data allow"),
    "train": ("defectcam.training.train", "train a defect's network from clicks, outlines, or both"),
    "pseudo-labels": ("defectcam.training.pseudo_labels", "masks for a second training, from a network's own proposals"),
    "hard-negatives": ("defectcam.training.hard_negatives", "negative clicks where a network errs, for a further training"),
    "calibrate": ("defectcam.training.calibrate", "choose a defect's thresholds on val, write the manifest"),
    "export": ("defectcam.training.export", "graphs for OpenVINO, the engine of processors, for weights without"),
    "evaluate": ("defectcam.evaluation.evaluate", "the table of all measures on val photos, with overlays"),
    "cvat": ("defectcam.cvat.commands", "labels, T and new proposals of a task in CVAT that keep what people did"),
    "doctor": ("defectcam.cvat.doctor", "whether CVAT, the function in it and a task fit together, and what to do if not"),
    "harvest": ("defectcam.feedback.harvest", "what annotators did with the proposals, from CVAT to a database"),
    "weak-labels": ("defectcam.feedback.labels", "clicks and masks for training from that database"),
    "retrain": ("defectcam.feedback.retrain", "new weights from old and new clicks, promoted if they are no worse"),
    "adapt": ("defectcam.feedback.adapt", "weights for one campaign from a few finished photos, in minutes"),
    "replay": ("defectcam.feedback.replay", "crops of old photos that adapt learns beside new ones, kept with the weights"),
    "next-images": ("defectcam.feedback.next_images", "unlabelled photos ordered by what a label would teach"),
    "loop": ("defectcam.feedback.loop", "what a few finished photos of a campaign bring: the proof of adapt"),
    "audit": ("defectcam.feedback.audit", "labels of old campaigns that the model disagrees with, ranked"),
    "report": ("defectcam.feedback.report", "time saved and shares of accepted proposals, as an HTML page"),
}


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        importlib.import_module(COMMANDS[command][0]).main(sys.argv[2:])
        return
    lines = [f"  {name:14} {what}" for name, (_, what) in COMMANDS.items()]
    usage = "\n".join(["usage: defectcam COMMAND ... (defectcam COMMAND --help says more)", *lines])
    example = "example:\n  defectcam demo docs/sample.jpg --iterations 4"
    if command in ("-h", "--help"):
        print(f"{usage}\n{example}")
    else:
        sys.exit(f"unknown command {command!r}\n{usage}")


if __name__ == "__main__":
    main()
