"""The shell: `nextblock VERB`. A verb is the job's function; nothing heavy is imported before it is needed."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextblock.errors import ConfigError, NextblockError, in_plain_words, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# verb: (module of the function of the same name, what it does)
VERBS = {
    "demo": ("nextblock.jobs.demo", "see it work on scattered handwritten digits, nothing to download"),
    "pretrain": ("nextblock.jobs.pretrain", "pre-train an encoder on images"),
    "probe": ("nextblock.jobs.probe", "how good is it? linear and attentive probes in one pass, or segmentation"),
    "finetune": ("nextblock.jobs.finetune", "train encoder and head together on labelled images"),
    "datasets": ("nextblock.jobs.datasets", "which benchmark data sets there are, and which are here"),
    "knn": ("nextblock.jobs.knn", "how good is it? weighted kNN accuracy"),
    "predict": ("nextblock.jobs.predict", "classes of images, by a probe or a fine-tuned model"),
    "embed": ("nextblock.jobs.embed", "features of images, to a file"),
    "reconstruct": ("nextblock.jobs.reconstruct", "pictures of the next-cell predictions"),
    "visualize": ("nextblock.jobs.visualize", "pictures of features and attention, as one page"),
    "cache-latents": ("nextblock.jobs.cache_latents", "images to latents of a VAE, once, for train-generator"),
    "train-generator": ("nextblock.jobs.train_generator", "train an xAR generator on images or cached latents"),
    "sample": ("nextblock.jobs.sample", "make images with a generator"),
    "fid": ("nextblock.jobs.fid", "how good are they? Fréchet distance and others between two sets of images"),
    "prepare": ("nextblock.jobs.prepare", "images to shards that load fast, once, for every verb"),
    "profile": ("nextblock.jobs.profile", "where a training step's time goes, and what would make it faster"),
    "export": ("nextblock.jobs.export", "an encoder or classifier as ONNX or torch.export, checked"),
    "convert": ("nextblock.jobs.convert", "official weights to a folder that every verb opens, and back"),
    "doctor": ("nextblock.jobs.doctor", "what is this machine missing?"),
}
YES_NO = dict.fromkeys(("", "true", "yes", "on", "1"), "true") | dict.fromkeys(("false", "no", "off", "0"), "false")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code. Errors made on purpose are told in a sentence, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _run(args)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", 128 + getattr(error, "signal", 2))
    except NextblockError as error:
        if debug:
            raise
        return _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"the device's memory is full. Set a lower {_batch_option(args)}.", 1)
        return _fail(f"unexpected {told}\nRun it again with --debug for the traceback.", 1)


def _batch_option(args: list[str]) -> str:
    training = "--training.per_device_batch"
    sections = {"probe": "--probe.per_device_batch", "pretrain": training, "train-generator": training,
                "profile": training}  # fmt: skip
    return sections.get(args[0], "--batch_size (--training.per_device_batch for training)")


def _fail(message: str, code: int) -> int:
    # names of files stand in messages: none may move a terminal's cursor
    told = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in message)
    print(f"nextblock: {told}", file=sys.stderr)
    return code


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] in ("--version", "-V"):
        from nextblock import __version__

        print(__version__)
        return 0
    verb = args[0]
    if verb not in VERBS:
        return _fail(f"there is no verb '{verb}'.{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}.", 2)
    module = import_module(VERBS[verb][0])
    job, needs = getattr(module, verb.replace("-", "_")), getattr(module, "SHELL_NEEDS", {})
    return _call(verb, job, getattr(module, "SECTIONS", {}), needs, args[1:])


def _overview() -> str:
    lines = [f"  {verb:<15} {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        ["usage: nextblock VERB [options]", "", *lines, "", "nextblock VERB --help tells a verb's options."]
    )


def _call(verb: str, job: Callable[..., Any], sections: dict[str, type], needs: dict[str, str], args: list[str]) -> int:
    from jsonargparse import ArgumentError

    parser = _parser(verb, job, sections)
    types = {option: getattr(a, "_typehint", None) for a in parser._actions for option in a.option_strings}
    help_line = f"\nSee: nextblock {verb} --help"
    for option in (_option(arg) for arg in args if arg.startswith("--") and len(arg) > 2):
        if option not in types or option[2:] in sections:  # a section from a file would import its class paths
            return _fail(f"{verb} has no option {option}.{nearest(option, types)}{help_line}", 2)
    try:
        given = parser.parse_args(_spelled_out(args, types), defaults=False).as_dict()
    except ArgumentError as error:
        told = in_plain_words(str(error).replace("Parser key", "option"))
        if "unrecognized arguments" in told and "data" in sections:
            told += ". Images are given with --data.train PATH"
        return _fail(f"{verb}: {told}{help_line}", 2)
    for name, what in needs.items():
        if name not in given and not {"-h", "--help"} & set(args):
            return _fail(f"{verb} needs --{name}: {what}.{help_line}", 2)
    result = job(**given)
    return 128 + result.signal if getattr(result, "signal", 0) else 0


def _option(arg: str) -> str:
    return "--" + arg[2:].partition("=")[0].replace("-", "_")


def _spelled_out(args: list[str], types: dict[str, Any]) -> list[str]:
    """Options with underscores, and switches with their value: `--flag`, `--flag no`, `--flag=0`."""
    out: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--") or len(arg) == 2:
            out.append(arg)
            continue
        option, equals, value = _option(arg), *arg.partition("=")[1:]
        if types[option] is bool:
            if not equals and rest and rest[0].lower() in YES_NO:
                value = rest.pop(0)
            equals, value = "=", YES_NO.get(value.lower(), value)
        elif "." in option and _takes_several(types[option]):
            words = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                words.append(rest.pop(0))
            given = " ".join(words)
            if not words:
                raise ConfigError(f"{option} needs one value or several, with spaces between them.")
            plain = given.startswith(("[", "(", "null")) or (len(words) == 1 and "..." not in str(types[option]))
            equals, value = "=", given if plain else f"[{', '.join(given.split())}]"
        out.append(option + equals + value)
    return out


def _takes_several(kind: Any) -> bool:
    return any(word in str(kind) for word in ("tuple[", "list["))


def _parser(verb: str, job: Callable[..., Any], sections: dict[str, type]) -> ArgumentParser:
    """The job's signature as a command line.

    What has no default stands without dashes, a list of numbers takes several, and sections get dotted options.
    """
    from jsonargparse import ArgumentParser

    about = (job.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(prog=f"nextblock {verb}", description=about, exit_on_error=False)
    parameters = inspect.signature(job).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty]
    optional = ["run"] if "run" in parameters and "run" not in required else []
    lists = [name for name, p in parameters.items() if str(p.annotation) == "list[int] | None"]
    for name in required:
        several = "+" if name == "images" else None
        parser.add_argument(name, type=str, metavar=name.upper(), nargs=several, help=_told_of(job, name))
    for name in optional:
        parser.add_argument(name, type=str, metavar=name.upper(), nargs="?", help=_told_of(job, name))
    for name in lists:
        parser.add_argument(
            f"--{name}", type=int, nargs="+", metavar="N", help=_told_of(job, name) or "one number or several"
        )
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
        for action in parser._actions:
            if f"--{section}" in action.option_strings:  # the whole section from a file: not what anybody looks for
                action.help = SUPPRESS
    parser.add_function_arguments(job, as_group=False, skip={*sections, *required, *optional, *lists})
    return parser


def _told_of(job: Callable[..., Any], name: str) -> str:
    """What the docstring says of a parameter."""
    found = re.search(rf"^ {{8}}{name}: (.+?)(?=^ {{8}}\w|^\s*$)", job.__doc__ or "", flags=re.M | re.S)
    return " ".join(found[1].split()) if found else ""


if __name__ == "__main__":
    sys.exit(main())
