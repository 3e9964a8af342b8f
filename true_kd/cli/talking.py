"""`compare`, `chat` and `generate`: talk to the result of a run, beside the plain student and the teacher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.completion import domain_names
from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json, watched
from true_kd.config import describe_key
from true_kd.errors import InputError
from true_kd.suggest import printable

if TYPE_CHECKING:
    pass

Asked = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What to ask; - or nothing reads stdin.", show_default=False)
]
Domain = Annotated[
    str | None,
    typer.Option(
        "--domain", "-d", help="The domain whose adapter it is.", show_default=False, autocompletion=domain_names
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="PATH", help="An mlx-lm adapter folder instead of a domain's.", show_default=False
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="Output folder of the run. [default: that of configs/base.yaml]", show_default=False),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Base config that names the output folder, if not configs/base.yaml.", show_default=False
    ),
]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Another teacher than the run's.", show_default=False)]
Student = Annotated[
    str | None,
    typer.Option("--student", help="Where the student lies, if not where the run had it.", show_default=False),
]
Plain = Annotated[bool, typer.Option("--base", help="The plain student, without its adapter.")]
System = Annotated[
    str | None,
    typer.Option("--system", help="System message instead of the domain's; '' for none.", show_default=False),
]
Temperature = Annotated[
    float, typer.Option("--temp", help="Randomness of the text, 0 to 5; 0 takes the most likely token each time.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help=describe_key(("capture", "top_p")), show_default=False)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Longest reply, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of the drawing of text.")]


def compare(
    prompt: Asked = None,
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Only the student, with and without adapter.")
    ] = False,
    system: System = None,
    temp: Temperature = 0.0,
    top_p: TopP = None,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Show plain student, student with adapter and teacher side by side, and where they part.

    All three get the same prompt and seed. Each token is shaded by the KL between the teacher and the side that wrote
    it; on the teacher's text, between the teacher and the student with adapter.
    """
    from true_kd.cli.asking import Asking, read_prompt, sampling_options
    from true_kd.cli.shading import comparison_facts, show_comparison
    from true_kd.comparing import compare_in_stages
    from true_kd.memory import budget_bytes, set_guards

    if no_teacher and teacher is not None:
        raise InputError("--teacher and --no-teacher: both given, expected one. Leave one out.")
    options = sampling_options(temp, top_p, max_tokens)
    asking = Asking.of(
        domain=domain, adapter=adapter, out=out, config=config, student=student, system=system, teacher=teacher
    )
    found = asking.found
    asked = asking.prompt({"prompt": read_prompt(prompt, "compare")}, "prompt")
    # Of an adapter of another tool nobody knows a teacher, unless one is named.
    with_teacher = not no_teacher and (found.domain is not None or teacher is not None)
    set_guards(budget_bytes(None))
    comparison = watched(
        compare_in_stages(found.config, found.folder, asked, options, seed, with_teacher),
        lambda model: f"{model}: writing and reading",
    )
    notes = []
    if with_teacher and comparison.teacher is None:
        notes.append(f"No teacher: the weights of {found.config.teacher.model} are not here.")
    elif not with_teacher and not no_teacher:
        notes.append("No teacher is known of this adapter: name it with --teacher.")
    if not as_json:
        show_comparison(comparison, notes)
        return 0
    about = {
        "messages": [dict(message) for message in asked.messages or ()],
        "domain": found.domain,
        "adapter": str(found.folder),
        "seed": seed,
        **options.model_dump(include={"sampling_temperature", "top_p", "max_tokens"}),
    }
    say_json({**about, **comparison_facts(comparison), "notes": [*notes, *comparison.warnings]})
    return 0


def chat(
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    student: Student = None,
    base: Plain = False,
    system: System = None,
    temp: Temperature = 0.0,
    top_p: TopP = None,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
) -> int:
    """Talk to the student with its adapter: q or Ctrl-D quits, r forgets the conversation, h helps.

    Ctrl-C stops the reply that is being written.
    """
    from true_kd.cli.asking import HELP, Asking, Conversation, end_line, greet, hint, read_line, sampling_options

    options = sampling_options(temp, top_p, max_tokens)
    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=system)
    model = asking.open(base)
    greet(asking.found, model, base)
    conversation = Conversation(asking, model, options, seed)
    while True:
        try:
            line = read_line()
        except EOFError:
            end_line()
            return 0
        except KeyboardInterrupt as interrupt:
            end_line()
            raise SystemExit(getattr(interrupt, "exit_code", 130)) from None
        match line.strip():
            case "q":
                return 0
            case "r":
                conversation = Conversation(asking, model, options, seed)
                hint("The conversation is forgotten.")
            case "h":
                typer.echo(HELP)
            case "":
                pass
            case said:
                conversation.answer(said)


def generate(
    prompt: Asked = None,
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    student: Student = None,
    base: Plain = False,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file",
            metavar="FILE",
            help="Prompts, one a line of a .txt or .jsonl file; prints a line of JSON for each.",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    temp: Temperature = 0.0,
    top_p: TopP = None,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> int:
    """Print the reply of the student with its adapter, and nothing else: for scripts."""
    from true_kd.cli.asking import Asking, Reply, read_prompt, read_prompts, sampling_options

    options = sampling_options(temp, top_p, max_tokens)
    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=system)
    if prompts_file is not None:
        if prompt is not None:
            raise InputError("--prompts-file: given with a prompt, expected one of the two. Leave one out.")
        asked = asking.openings(read_prompts(prompts_file))
    else:
        asked = [asking.prompt({"prompt": read_prompt(prompt, "generate")}, "prompt")]
    model = asking.open(base)
    streams = not as_json and prompts_file is None and sys.stdout.isatty()
    for one in asked:
        reply = Reply(asking, model, one, options, seed)
        for token in reply:
            if streams:
                typer.echo(printable(token.text), nl=False)
        if as_json or prompts_file is not None:
            say_json(reply.facts(), indent=None)
        else:
            typer.echo("" if streams else printable(reply.text))
    return 0
