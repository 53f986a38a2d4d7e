"""The shell: `nextblock VERB`. A verb is the job's function; nothing heavy is imported before it is needed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextblock.errors import NextblockError, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# verb: (module of the function of the same name, what it does)
VERBS = {
    "demo": ("nextblock.jobs.demo", "see it work on scattered handwritten digits, nothing to download"),
    "pretrain": ("nextblock.jobs.pretrain", "pre-train an encoder on images"),
    "knn": ("nextblock.jobs.knn", "how good is it? weighted kNN accuracy"),
    "embed": ("nextblock.jobs.embed", "features of images, to a file"),
    "reconstruct": ("nextblock.jobs.reconstruct", "pictures of the next-cell predictions"),
    "doctor": ("nextblock.jobs.doctor", "what is this machine missing?"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code. Errors made on purpose are told in a sentence, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except NextblockError as error:
        if debug:
            raise
        return _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return _fail(f"unexpected {told}\nRun it again with --debug for the traceback.", 1)


def _fail(message: str, code: int) -> int:
    print(f"nextblock: {message}", file=sys.stderr)
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
    return _call(verb, getattr(module, verb), getattr(module, "SECTIONS", {}), args[1:])


def _overview() -> str:
    lines = [f"  {verb:<12} {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        ["usage: nextblock VERB [options]", "", *lines, "", "nextblock VERB --help tells a verb's options."]
    )


def _call(verb: str, job: Callable[..., Any], sections: dict[str, type], args: list[str]) -> int:
    from jsonargparse import ArgumentError

    parser = _parser(verb, job, sections)
    types = {option: getattr(a, "_typehint", None) for a in parser._actions for option in a.option_strings}
    for i, arg in enumerate(args):
        if not arg.startswith("--") or len(arg) == 2:
            continue
        option, equals, value = arg.partition("=")
        option = "--" + option[2:].replace("-", "_")
        args[i] = arg = option + equals + value
        if option not in types:
            return _fail(f"{verb} has no option {option}.{nearest(option, types)} See: nextblock {verb} --help", 2)
        if types[option] is bool and option == arg and (i + 1 == len(args) or args[i + 1] not in ("true", "false")):
            args[i] = f"{arg}=true"
    try:
        given = parser.parse_args(args, defaults=False).as_dict()
    except ArgumentError as error:
        told = " ".join(str(error).replace("Parser key", "option").split())
        return _fail(f"{verb}: {told}\nSee: nextblock {verb} --help", 2)
    result = job(**given)
    return 128 + result.signal if getattr(result, "signal", 0) else 0


def _parser(verb: str, job: Callable[..., Any], sections: dict[str, type]) -> ArgumentParser:
    """The job's signature as a command line: what has no default stands without dashes, sections get dotted options."""
    from jsonargparse import ArgumentParser

    about = (job.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(prog=f"nextblock {verb}", description=about, exit_on_error=False)
    required = [p.name for p in inspect.signature(job).parameters.values() if p.default is p.empty]
    for name in required:
        parser.add_argument(name, type=str, metavar=name.upper(), nargs="+" if name == "images" else None)
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
    parser.add_function_arguments(job, skip={*sections, *required})
    return parser


if __name__ == "__main__":
    sys.exit(main())
